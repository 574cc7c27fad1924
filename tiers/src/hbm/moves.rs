//! Copies up, across and down, and what their slots and buffers wait for.

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
use crate::cache::{FetchBlock, FetchReport, StoreBlock, StoreReport};
use crate::mover::{Part, Unsettled, transfer_each};
use crate::pages::{self, BlockMemory};
use crate::scratch::Buffers;

impl Inner {
    pub(super) async fn promote(
        self: &Arc<Self>,
        blocks: &[BlockInfo],
        deadline: Instant,
    ) -> Result<PromoteReport> {
        let mut report = PromoteReport::default();
        let stay = blocks.iter().map(|block| block.key).collect();
        for batch in blocks.chunks(self.buffers_max) {
            let mut wanted = Vec::new();
            let mut reserved = Reserved::new(self);
            let mut is_full = false;
            for block in batch {
                match self.room_for(block, &stay, deadline).await {
                    Ok(Some(slot)) => {
                        wanted.push(*block);
                        reserved.slots.push(slot);
                    }
                    Ok(None) => report.already_held += 1,
                    // Those behind it would be of no use before it.
                    Err(error) => {
                        tracing::debug!(%error, "no slot in HBM");
                        is_full = true;
                        break;
                    }
                }
            }
            let had_all = wanted.is_empty()
                || self
                    .bring_up(&wanted, reserved, deadline, &mut report)
                    .await?;
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
            self.slots().remove(&coldest);
        }
    }

    /// Fills reserved slots; whether the cache had all of the blocks.
    async fn bring_up(
        self: &Arc<Self>,
        blocks: &[BlockInfo],
        mut reserved: Reserved,
        deadline: Instant,
        report: &mut PromoteReport,
    ) -> Result<bool> {
        let places = reserved.slots.clone();
        let (buffers, sums) = self.collect(blocks, deadline).await?;
        let depth = sums.len();
        report.missed += (blocks.len() - depth) as u32;
        let Some(buffers) = buffers else {
            report.failed += depth as u32;
            return Ok(false);
        };
        let pair = |at: usize| {
            vec![(
                buffers.descriptor(at, self.block_bytes),
                self.slot(places[at]),
            )]
        };
        let parts = (0..depth).map(pair).collect();
        let mut unsettled = Unsettled::default();
        let copied = transfer_each(
            &self.agent,
            Operation::Write,
            parts,
            deadline,
            &mut unsettled,
        )
        .await;
        let mut lasting = Vec::new();
        for (at, copied) in copied.into_iter().enumerate() {
            match copied {
                Ok(()) => {
                    reserved.slots.retain(|slot| *slot != places[at]);
                    self.slots().fill(places[at], blocks[at], sums[at]);
                    report.promoted += 1;
                }
                Err((failure, _)) => {
                    report.failed += 1;
                    if !failure.settled {
                        reserved.slots.retain(|slot| *slot != places[at]);
                        lasting.push(places[at]);
                    }
                }
            }
        }
        drop(reserved);
        unsettled.hold(buffers);
        self.end_later(unsettled, move |slots| {
            lasting.iter().for_each(|slot| slots.give_up(*slot));
        });
        Ok(depth == blocks.len())
    }

    /// Fetches blocks into buffers; the sums of those that came, from the first. No buffers where some may still be written to: then
    /// nothing of them can be used.
    async fn collect(
        &self,
        blocks: &[BlockInfo],
        deadline: Instant,
    ) -> Result<(Option<Buffers>, Vec<Checksum>)> {
        let buffers = self.buffers.take(blocks.len(), deadline).await?;
        let place = |(at, info): (usize, &BlockInfo)| FetchBlock {
            info: *info,
            memory: buffers.descriptor(at, self.block_bytes).into(),
        };
        let wanted = blocks.iter().enumerate().map(place).collect();
        let fetched = self.cache.fetch(wanted, Located::default(), deadline);
        let fetched = fetched.await?;
        let sum = |at: usize| buffers.checksum(at, self.block_bytes);
        let sums: Result<Vec<Checksum>> = (0..fetched.depth())
            .map(|at| sum(at).map(Checksum::crc32c))
            .collect();
        if fetched.unsettled.is_empty() {
            return Ok((Some(buffers), sums?));
        }
        keep_until_drained(fetched, buffers);
        Ok((None, sums?))
    }

    /// Does something with the slots when nothing uses them any more; what it returns tells when.
    fn end_later(
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
        let depth = copied.iter().take_while(|one| one.is_ok()).count();
        let drained = self.end_later(unsettled, move |slots| {
            read.iter().for_each(|(slot, _)| slots.leave(*slot));
        });
        HbmFetch { depth, drained }
    }

    pub(super) async fn offload(
        self: &Arc<Self>,
        keys: &[BlockKey],
        deadline: Instant,
    ) -> Result<StoreReport> {
        let mut sum = StoreReport::default();
        for batch in keys.chunks(self.buffers_max) {
            let report = self.take_down(batch, deadline).await?;
            sum.stored += report.stored;
            sum.already_held += report.already_held;
            sum.refused += report.refused;
            sum.failed += report.failed;
        }
        Ok(sum)
    }

    async fn take_down(
        self: &Arc<Self>,
        keys: &[BlockKey],
        deadline: Instant,
    ) -> Result<StoreReport> {
        let buffers = self.buffers.take(keys.len(), deadline).await?;
        let read: Vec<(u32, Held)> = {
            let mut slots = self.slots();
            keys.iter().filter_map(|key| slots.read(key)).collect()
        };
        if read.is_empty() {
            return Ok(StoreReport::default());
        }
        let pair = |(at, (slot, _)): (usize, &(u32, Held))| {
            vec![(buffers.descriptor(at, self.block_bytes), self.slot(*slot))]
        };
        let parts = read.iter().enumerate().map(pair).collect();
        let mut unsettled = Unsettled::default();
        let copied = transfer_each(
            &self.agent,
            Operation::Read,
            parts,
            deadline,
            &mut unsettled,
        )
        .await;
        let mut report = StoreReport::default();
        let came = copied.iter().map(std::result::Result::is_ok);
        let good = self.judge(came, &read, &buffers, &mut report);
        let is_settled = unsettled.is_empty();
        let stored: Vec<BlockKey> = good.iter().map(|block| block.info.key).collect();
        let kept = match is_settled {
            true => self.cache.store(good, deadline).await,
            // Some of the buffers may still be written to: they stay where they are.
            false => Ok(StoreReport {
                failed: good.len() as u32,
                ..StoreReport::default()
            }),
        };
        unsettled.hold(buffers);
        self.end_later(unsettled, move |slots| {
            read.iter().for_each(|(slot, _)| slots.leave(*slot));
        });
        let kept = kept?;
        if is_settled {
            for key in stored {
                // One by one: the report does not tell which were refused.
                if self.cache.lookup(&[key]).await?.depth > 0 {
                    self.slots().remove(&key);
                }
            }
        }
        report.stored += kept.stored;
        report.already_held += kept.already_held;
        report.refused += kept.refused;
        report.failed += kept.failed;
        Ok(report)
    }

    /// Of the blocks that came down those whose bytes are the ones that went up.
    fn judge(
        &self,
        came: impl Iterator<Item = bool>,
        read: &[(u32, Held)],
        buffers: &Buffers,
        report: &mut StoreReport,
    ) -> Vec<StoreBlock> {
        let mut good = Vec::new();
        for (at, (came, (_, held))) in came.zip(read).enumerate() {
            match came.then(|| buffers.checksum(at, self.block_bytes)) {
                Some(Ok(sum)) if Checksum::crc32c(sum) == held.checksum => good.push(StoreBlock {
                    info: held.info,
                    memory: buffers.descriptor(at, self.block_bytes).into(),
                }),
                Some(Ok(sum)) => {
                    self.corrupt.fetch_add(1, Ordering::Relaxed);
                    let expected = held.checksum.value;
                    tracing::warn!(key = ?held.info.key, "HBM: checksum {sum:08x}, expected {expected:08x}");
                    self.slots().remove(&held.info.key);
                    report.failed += 1;
                }
                Some(Err(_)) | None => report.failed += 1,
            }
        }
        good
    }
}

/// Slots that were reserved, and that are free again when this ends.
struct Reserved {
    inner: Arc<Inner>,
    slots: Vec<u32>,
}

impl Reserved {
    fn new(inner: &Arc<Inner>) -> Self {
        Self {
            inner: inner.clone(),
            slots: Vec::new(),
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut slots = self.inner.slots();
        self.slots.iter().for_each(|slot| slots.give_up(*slot));
    }
}

/// Keeps buffers that a fetch may still write to: for ever, if nobody can tell when it ends.
#[expect(
    clippy::mem_forget,
    reason = "memory that may be in use is leaked, never lent again"
)]
fn keep_until_drained(mut fetch: FetchReport, buffers: Buffers) {
    tokio::spawn(async move {
        match fetch.drained().await {
            true => drop(buffers),
            false => std::mem::forget(buffers),
        }
    });
}

impl PromoteReport {
    fn total(&self) -> u32 {
        self.promoted + self.already_held + self.missed + self.refused + self.failed
    }
}
