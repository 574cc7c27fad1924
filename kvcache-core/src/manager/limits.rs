//! The manager's bounds, each a setting.

use std::time::Duration;

use crate::error::{Error, Result};

/// The most slots an arena may have, so that their bookkeeping stays below a few GiB.
pub const HOST_SLOTS_MAX: u32 = 1 << 26;
/// The most records the disk tier may have, for the same reason.
pub const DISK_SLOTS_MAX: u64 = 1 << 28;

/// Sizes and bounds of one manager. [`Limits::default`] is for tests and small nodes; set the sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one block; only for the statistics.
    pub block_bytes: u64,
    /// Blocks that fit into DRAM.
    pub host_slots: u32,
    /// Segments of the disk tier; 0 for none, else at least 2: one is filled while another is dropped.
    pub disk_segments: u32,
    /// Blocks in one segment.
    pub disk_segment_slots: u32,
    /// Whether there is a shared object store.
    pub object: bool,
    /// Blocks remembered to be in the object store; beyond that the oldest are forgotten (not deleted).
    pub object_known_max: u32,
    /// Stores and fetches at once; more are refused with [`ErrorKind::Busy`](crate::ErrorKind::Busy).
    pub operations_max: u32,
    /// Blocks in one store or fetch; more are [`ErrorKind::Invalid`](crate::ErrorKind::Invalid).
    pub operation_blocks_max: u32,
    /// Commands handed to the driver and not answered.
    pub commands_in_flight_max: u32,
    /// Of these, copies that nobody waits for: demotion and rescue.
    pub background_in_flight_max: u32,
    /// Blocks in one copy command.
    pub batch_blocks_max: u32,
    /// Leases granted to peers at once; more are refused with [`ErrorKind::Busy`](crate::ErrorKind::Busy).
    pub leases_max: u32,
    /// Blocks in one lease, asked or granted; longer requests are cut.
    pub lease_blocks_max: u32,
    /// Pins at once; more are refused with [`ErrorKind::Busy`](crate::ErrorKind::Busy).
    pub pins_max: u32,
    /// Blocks that pins may keep together, in thousandths of the slots; a pin that would need more is cut.
    pub pinned_per_mille_max: u32,
    /// How long a pin may last at most.
    pub pin_ttl_max: Duration,
    /// Pins let go of while they are not in force that are remembered, in case they are asked for yet; beyond that the
    /// oldest are forgotten.
    pub early_unpins_max: u32,
    /// How long each of them is remembered.
    pub early_unpin_wait: Duration,
    /// How long leases last: asked of peers, and at most granted to them.
    pub lease_ttl: Duration,
    /// How much of a lease must be left when a copy from it has ended; else the bytes count as doubtful.
    pub lease_margin: Duration,
    /// How long a peer may take to answer a lease request.
    pub lease_wait: Duration,
    /// How long we bring blocks up from disk before a lease is granted without them.
    pub stage_wait: Duration,
    /// How long before the deadline of a store or fetch its copies must be done, so that their answers are not late;
    /// an eighth of what is left when that is less.
    pub answer_margin: Duration,
    /// The deadline of copies that nobody waits for.
    pub background_wait: Duration,
    /// How long disk or object store are left alone after the disk was full or an action failed there.
    pub retry_after: Duration,
    /// Blocks of a segment that are saved to the object store before the segment is dropped.
    pub rescue_blocks_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            block_bytes: 1 << 20,
            host_slots: 1024,
            disk_segments: 0,
            disk_segment_slots: 64,
            object: false,
            object_known_max: 1 << 20,
            operations_max: 1024,
            operation_blocks_max: 1 << 16,
            commands_in_flight_max: 64,
            background_in_flight_max: 16,
            batch_blocks_max: 64,
            leases_max: 4096,
            lease_blocks_max: 4096,
            pins_max: 4096,
            pinned_per_mille_max: 500,
            pin_ttl_max: Duration::from_secs(600),
            early_unpins_max: 4096,
            early_unpin_wait: Duration::from_secs(60),
            lease_ttl: Duration::from_secs(10),
            lease_margin: Duration::from_millis(50),
            lease_wait: Duration::from_secs(1),
            stage_wait: Duration::from_millis(500),
            answer_margin: Duration::from_millis(20),
            background_wait: Duration::from_secs(30),
            retry_after: Duration::from_secs(5),
            rescue_blocks_max: 1024,
        }
    }
}

impl Limits {
    /// Checks every value and how they fit together.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) with the first field that is out of its range.
    pub fn check(&self) -> Result<()> {
        if self.block_bytes == 0 {
            return Err(Error::invalid("block_bytes", 0, 1..=u64::MAX));
        }
        if !(1..=HOST_SLOTS_MAX).contains(&self.host_slots) {
            return Err(Error::invalid(
                "host_slots",
                self.host_slots,
                1..=HOST_SLOTS_MAX,
            ));
        }
        self.check_disk()?;
        let at_least_one = [
            ("operations_max", self.operations_max),
            ("operation_blocks_max", self.operation_blocks_max),
            ("batch_blocks_max", self.batch_blocks_max),
            ("background_in_flight_max", self.background_in_flight_max),
            ("leases_max", self.leases_max),
            ("lease_blocks_max", self.lease_blocks_max),
            ("pins_max", self.pins_max),
            ("object_known_max", self.object_known_max),
        ];
        for (field, value) in at_least_one {
            if value == 0 {
                return Err(Error::invalid(field, value, 1..=u32::MAX));
            }
        }
        if self.pinned_per_mille_max > 1000 {
            let value = self.pinned_per_mille_max;
            return Err(Error::invalid("pinned_per_mille_max", value, 0..=1000));
        }
        // With less room background copies could keep all of it, and a fetch would wait for a demotion.
        if self.commands_in_flight_max <= self.background_in_flight_max {
            let accepted = self.background_in_flight_max.saturating_add(1)..=u32::MAX;
            let value = self.commands_in_flight_max;
            return Err(Error::invalid("commands_in_flight_max", value, accepted));
        }
        if self.lease_ttl <= self.lease_margin {
            let value = self.lease_ttl.as_nanos();
            return Err(Error::invalid(
                "lease_ttl (ns)",
                value,
                self.lease_margin.as_nanos() + 1..,
            ));
        }
        let above_zero = [
            ("lease_wait", self.lease_wait),
            ("stage_wait", self.stage_wait),
            ("pin_ttl_max", self.pin_ttl_max),
            ("background_wait", self.background_wait),
            ("retry_after", self.retry_after),
        ];
        for (field, value) in above_zero {
            if value.is_zero() {
                return Err(Error::invalid(
                    field,
                    "0 ns",
                    Duration::from_nanos(1)..=Duration::MAX,
                ));
            }
        }
        Ok(())
    }

    fn check_disk(&self) -> Result<()> {
        if self.disk_segments == 0 {
            return Ok(());
        }
        if self.disk_segments == 1 {
            return Err(Error::invalid("disk_segments", 1, 2..=u32::MAX));
        }
        if self.disk_segment_slots == 0 {
            return Err(Error::invalid("disk_segment_slots", 0, 1..=u32::MAX));
        }
        let slots = u64::from(self.disk_segments) * u64::from(self.disk_segment_slots);
        if slots > DISK_SLOTS_MAX {
            let field = "disk_segments * disk_segment_slots";
            return Err(Error::invalid(field, slots, 2..=DISK_SLOTS_MAX));
        }
        Ok(())
    }
}
