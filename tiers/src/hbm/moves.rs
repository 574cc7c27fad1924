//! Copies up, across and down, and what their slots wait for.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kvcache_core::ports::Located;
use kvcache_core::{BlockInfo, BlockKey, Checksum, Error, ErrorKind, Result};
use kvfabric_transfer::Operation;
use tokio::sync::oneshot;

use super::slots::{Found, Held, Slots};
use super::{HbmFetch, Inner, PromoteReport};
use crate::cache::{FetchBlock, StoreBlock, StoreReport};
use crate::mover::{Part, Unsettled, transfer_each};
use crate::pages::{self, BlockMemory};

/// Blocks that go up or down in one go.
pub(super) const BATCH_BLOCKS_MAX: usize = 64;

impl Inner {
    pub(super) async fn promote(
        self: &Arc<Self>,
        blocks: &[BlockInfo],
        deadline: Instant,
    ) -> Result<PromoteReport> {
        let mut report = PromoteReport::default();
        let stay = blocks.iter().map(|block| block.key).collect();
        for batch in blocks.chunks(BATCH_BLOCKS_MAX) {
            let room = self.make_room(batch.iter().copied(), &stay, deadline).await;
            report.already_held += room.already_held;
            let is_full = room.is_full;
            let had_all =
                room.reserved.is_empty() || self.bring_up(room, deadline, &mut report).await?;
            let left = blocks.len() as u32 - report.total();
            match (had_all, is_full) {
                (true, false) => {}
                (true, true) => report.refused += left,
                (false, _) => report.missed += left,
            }
            if !had_all || is_full {
                break;
            }
        }
        Ok(report)
    }

    /// Slots for those of these blocks that are not up, in their order, until there is none.
    pub(super) async fn make_room(
        self: &Arc<Self>,
        blocks: impl Iterator<Item = BlockInfo>,
        stay: &HashSet<BlockKey>,
        deadline: Instant,
    ) -> Room {
        let mut room = Room {
            inner: self.clone(),
            reserved: Vec::new(),
            already_held: 0,
            is_full: false,
        };
        for (position, info) in blocks.enumerate() {
            match self.room_for(&info, stay, deadline).await {
                Ok(Some(slot)) => room.reserved.push(Reserved {
                    position,
                    info,
                    slot,
                }),
                Ok(None) => room.already_held += 1,
                // Those behind it would be of no use before it.
                Err(error) => {
                    tracing::debug!(%error, "no slot in HBM");
                    room.is_full = true;
                    break;
                }
            }
        }
        room
    }

    /// A slot for a block; none if it is up already.
    async fn room_for(
        self: &Arc<Self>,
        block: &BlockInfo,
        stay: &HashSet<BlockKey>,
        deadline: Instant,
    ) -> Result<Option<u32>> {
        let busy = |text| Err(Error::new(ErrorKind::Busy, text));
        // Bounded: each turn takes a block out, or ends.
        loop {
            let coldest = {
                let mut slots = self.slots();
                match slots.find(&block.key) {
                    Found::Here => return Ok(None),
                    Found::Coming => return busy("the block is on its way up"),
                    Found::Nothing if slots.is_closed() => {
                        return Err(Error::new(ErrorKind::Cancelled, "the tier is closed"));
                    }
                    Found::Nothing => {}
                }
                if slots.has_room() {
                    return Ok(slots.reserve(block.key));
                }
                slots.coldest(stay)
            };
            let Some(coldest) = coldest else {
                return busy("all slots are in use");
            };
            if self.cache.lookup(&[coldest]).await?.depth == 0 {
                // Where there is no room below either, it is lost, as what leaves the last tier is.
                self.offload(&[coldest], deadline).await?;
            }
            self.take_out(&[coldest]);
            self.counts.evicted.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Fills reserved slots from the cache, which verifies what it brings; whether it had all of the blocks.
    async fn bring_up(
        self: &Arc<Self>,
        mut room: Room,
        deadline: Instant,
        report: &mut PromoteReport,
    ) -> Result<bool> {
        let wanted = room.reserved.iter().map(|one| FetchBlock {
            info: one.info,
            memory: self.slot(one.slot).into(),
        });
        let fetch = self
            .cache
            .fetch_summed(wanted.collect(), Located::default(), deadline);
        let (mut fetched, sums) = match fetch.await {
            Ok(fetched) => (fetched.report, fetched.sums),
            Err(error) => {
                if error.kind() == ErrorKind::Internal {
                    // Nobody can tell what still writes to the slots: they are lent to nobody again.
                    room.reserved.clear();
                }
                return Err(error);
            }
        };
        let mut filled = Vec::new();
        for (one, sum) in room.reserved.iter().zip(&sums).take(fetched.depth()) {
            // Whatever has come was summed.
            filled.extend(sum.map(|sum| (*one, sum)));
        }
        let lasting = fetched.unsettled.iter();
        let lasting: Vec<u32> = lasting.map(|at| room.reserved[*at as usize].slot).collect();
        let all = room.reserved.len();
        report.promoted += filled.len() as u32;
        report.failed += lasting.len() as u32;
        report.missed += (all - filled.len() - lasting.len()) as u32;
        let had_all = filled.len() == all;
        self.counts
            .promoted
            .fetch_add(filled.len() as u64, Ordering::Relaxed);
        room.keep(&lasting);
        self.fill(&mut room, &filled);
        drop(room);
        if !lasting.is_empty() {
            let inner = self.clone();
            tokio::spawn(async move {
                // For ever, if nobody can tell when they are not written to any more.
                if fetched.drained().await {
                    let mut slots = inner.slots();
                    lasting.iter().for_each(|slot| slots.give_up(*slot));
                }
            });
        }
        Ok(had_all)
    }

    /// All bytes of these blocks are in their slots, and are what they should be.
    pub(super) fn fill(&self, room: &mut Room, filled: &[(Reserved, Checksum)]) {
        let mut slots = self.slots();
        let here = filled
            .iter()
            .filter(|(one, sum)| slots.fill(one.slot, one.info, *sum));
        let here: Vec<BlockInfo> = here.map(|(one, _)| one.info).collect();
        // Under the lock, so that the world hears of a block's comings and goings in their order.
        self.cache.announcer().arrived(&here);
        drop(slots);
        let slots: Vec<u32> = filled.iter().map(|(one, _)| one.slot).collect();
        room.keep(&slots);
    }

    /// These blocks are here no more.
    pub(super) fn take_out(&self, keys: &[BlockKey]) {
        let mut slots = self.slots();
        let gone = keys.iter().filter_map(|key| slots.remove(key));
        let gone: Vec<BlockInfo> = gone.collect();
        self.cache.announcer().left(&gone);
    }

    /// A block whose bytes are not those that came up.
    fn drop_corrupt(&self, held: &Held, found: Checksum, place: &str) {
        self.counts.corrupt.fetch_add(1, Ordering::Relaxed);
        let (found, expected) = (found.value, held.checksum.value);
        tracing::warn!(key = ?held.info.key, "{place}: checksum {found:08x}, expected {expected:08x}");
        self.take_out(&[held.info.key]);
    }

    /// Does something with the slots when nothing uses them any more; what it returns tells when.
    pub(super) fn end_later(
        self: &Arc<Self>,
        unsettled: Unsettled,
        end: impl FnOnce(&mut Slots) + Send + 'static,
    ) -> Option<oneshot::Receiver<()>> {
        if unsettled.is_empty() {
            end(&mut self.slots());
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        let inner = self.clone();
        tokio::spawn(async move {
            unsettled.drained().await;
            end(&mut inner.slots());
            // Nobody may wait for it.
            let _ = sender.send(());
        });
        Some(receiver)
    }

    pub(super) async fn fetch(
        self: &Arc<Self>,
        blocks: &[FetchBlock],
        deadline: Instant,
    ) -> HbmFetch {
        let read: Vec<(u32, Held)> = {
            let mut slots = self.slots();
            let read = blocks.iter().map_while(|block| slots.read(&block.info.key));
            read.collect()
        };
        let parts = blocks.iter().zip(&read).map(|(block, (slot, _))| {
            let mut part: Part = Vec::new();
            let from = BlockMemory::from(self.slot(*slot));
            pages::pair(&from, &block.memory, &mut part);
            part
        });
        let parts: Vec<Part> = parts.collect();
        if parts.is_empty() {
            return HbmFetch::default();
        }
        let mut unsettled = Unsettled::default();
        let copied = transfer_each(
            &self.agent,
            Operation::Write,
            parts,
            deadline,
            &mut unsettled,
        )
        .await;
        let came = copied.iter().take_while(|one| one.is_ok()).count();
        let targets: Vec<&BlockMemory> = blocks.iter().map(|block| &block.memory).collect();
        let depth = match self.sums_of(&targets[..came], deadline).await {
            Sums::Of(sums) => {
                let right = sums.iter().zip(&read).take_while(|(sum, (_, held))| {
                    let is_right = **sum == held.checksum;
                    if !is_right {
                        self.drop_corrupt(held, **sum, "copied from HBM");
                    }
                    is_right
                });
                right.count()
            }
            Sums::ByNobody => {
                self.counts
                    .unsummed
                    .fetch_add(came as u64, Ordering::Relaxed);
                came
            }
            Sums::Late => 0,
        };
        self.counts.hits.fetch_add(depth as u64, Ordering::Relaxed);
        let tried = read.len();
        let drained = self.end_later(unsettled, move |slots| {
            read.iter().for_each(|(slot, _)| slots.leave(*slot));
        });
        HbmFetch {
            depth,
            tried,
            drained,
        }
    }

    /// The sums of blocks in memory of this GPU, or of the host.
    pub(super) async fn sums_of(&self, blocks: &[&BlockMemory], deadline: Instant) -> Sums {
        if blocks.is_empty() {
            return Sums::Of(Vec::new());
        }
        let devices = self.cache.sums();
        if let Some(summer) = devices.of_all(blocks.iter().copied(), deadline).await {
            return match devices.sum(&summer, blocks, deadline).await {
                Ok(sums) => Sums::Of(sums),
                Err(error) => {
                    tracing::debug!(%error, "blocks on a device were not summed");
                    match error.kind() == ErrorKind::Timeout && !summer.is_lost() {
                        true => Sums::Late,
                        false => Sums::ByNobody,
                    }
                }
            };
        }
        let mut sums = Vec::with_capacity(blocks.len());
        for block in blocks {
            // Summing a large block takes a while: others may run in between.
            tokio::task::yield_now().await;
            match block.crc32c(&self.agent) {
                Ok(sum) => sums.push(Checksum::crc32c(sum)),
                // Memory of a device.
                Err(_) => return Sums::ByNobody,
            }
        }
        Sums::Of(sums)
    }

    pub(super) async fn offload(
        self: &Arc<Self>,
        keys: &[BlockKey],
        deadline: Instant,
    ) -> Result<StoreReport> {
        let mut sum = StoreReport::default();
        for batch in keys.chunks(BATCH_BLOCKS_MAX) {
            let read: Vec<(u32, Held)> = {
                let mut slots = self.slots();
                batch.iter().filter_map(|key| slots.read(key)).collect()
            };
            let taken = self.take_down(&read, deadline, &mut sum).await;
            let mut slots = self.slots();
            read.iter().for_each(|(slot, _)| slots.leave(*slot));
            drop(slots);
            taken?;
        }
        Ok(sum)
    }

    /// Takes blocks that are being read down: summed here where the device does that, and in host memory by the cache.
    async fn take_down(
        &self,
        read: &[(u32, Held)],
        deadline: Instant,
        report: &mut StoreReport,
    ) -> Result<()> {
        let places = read.iter().map(|(slot, _)| self.slot(*slot).into());
        let places: Vec<BlockMemory> = places.collect();
        let blocks: Vec<&BlockMemory> = places.iter().collect();
        let sums = self.sums_of(&blocks, deadline).await;
        let mut good: Vec<&Held> = Vec::with_capacity(read.len());
        let mut blocks = Vec::with_capacity(read.len());
        for (at, ((_, held), memory)) in read.iter().zip(places).enumerate() {
            match &sums {
                Sums::Of(sums) if sums[at] != held.checksum => {
                    self.drop_corrupt(held, sums[at], "HBM");
                    report.failed += 1;
                    continue;
                }
                _ => good.push(held),
            }
            blocks.push(StoreBlock {
                info: held.info,
                memory,
            });
        }
        let expected = good.iter().map(|held| Some(held.checksum)).collect();
        let stored = self.cache.store_known(blocks, expected, deadline).await?;
        report.stored += stored.report.stored;
        report.already_held += stored.report.already_held;
        report.refused += stored.report.refused;
        report.failed += stored.report.failed;
        for (at, held) in (0..).zip(good) {
            let key = held.info.key;
            if stored.corrupt.contains(&at) {
                // What the device has found right was changed on its way down: it may be better the next time.
                if !matches!(sums, Sums::Of(_)) {
                    self.counts.corrupt.fetch_add(1, Ordering::Relaxed);
                    self.take_out(&[key]);
                }
            // One by one: the report does not tell which were refused.
            } else if self.cache.lookup(&[key]).await?.depth > 0 {
                self.counts.offloaded.fetch_add(1, Ordering::Relaxed);
                self.take_out(&[key]);
            }
        }
        Ok(())
    }
}

/// What is known of bytes that were copied.
pub(super) enum Sums {
    /// The sum of each block.
    Of(Vec<Checksum>),
    /// The device does not sum.
    ByNobody,
    /// The deadline came before the sums.
    Late,
}

/// A slot for a block.
#[derive(Clone, Copy)]
pub(super) struct Reserved {
    /// Which block of those that room was made for.
    pub(super) position: usize,
    info: BlockInfo,
    pub(super) slot: u32,
}

/// Slots that were reserved, and that are free again when this ends.
pub(super) struct Room {
    inner: Arc<Inner>,
    pub(super) reserved: Vec<Reserved>,
    /// Blocks that were up already.
    pub(super) already_held: u32,
    /// There were not as many as were wanted.
    pub(super) is_full: bool,
}

impl Room {
    /// These slots are somebody else's now.
    pub(super) fn keep(&mut self, slots: &[u32]) {
        self.reserved.retain(|one| !slots.contains(&one.slot));
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut slots = self.inner.slots();
        self.reserved.iter().for_each(|one| slots.give_up(one.slot));
    }
}

impl PromoteReport {
    fn total(&self) -> u32 {
        self.promoted + self.already_held + self.missed + self.refused + self.failed
    }
}
