//! Blocks of the engine that go into slots within the device.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use kvcache_core::{BlockInfo, Checksum, Result};
use kvfabric_transfer::Operation;

use super::Inner;
use super::moves::{BATCH_BLOCKS_MAX, Reserved, Room, Sums};
use crate::cache::{StoreBlock, StoreReport};
use crate::mover::{Part, Unsettled, transfer_each};
use crate::pages::{self, BlockMemory};

impl Inner {
    pub(super) async fn store(
        self: &Arc<Self>,
        blocks: Vec<StoreBlock>,
        deadline: Instant,
    ) -> Result<StoreReport> {
        let devices = self.cache.sums();
        let slot = BlockMemory::from(self.slot(0));
        let all = blocks.iter().map(|block| &block.memory).chain([&slot]);
        if devices.of_all(all, deadline).await.is_none() {
            return self.store_by_host(blocks, deadline).await;
        }
        let mut report = StoreReport::default();
        let stay = blocks.iter().map(|block| block.info.key).collect();
        for batch in blocks.chunks(BATCH_BLOCKS_MAX) {
            let infos = batch.iter().map(|block| block.info);
            let room = self.make_room(infos, &stay, deadline).await;
            report.already_held += room.already_held;
            let is_full = room.is_full;
            self.copy_in(room, batch, deadline, &mut report).await;
            if is_full {
                report.refused += blocks.len() as u32 - report_total(&report);
                break;
            }
        }
        Ok(report)
    }

    /// Copies blocks of the engine within the device; those whose sums are the same on both sides are here.
    async fn copy_in(
        self: &Arc<Self>,
        mut room: Room,
        blocks: &[StoreBlock],
        deadline: Instant,
        report: &mut StoreReport,
    ) {
        if room.reserved.is_empty() {
            return;
        }
        let parts = room.reserved.iter().map(|one| {
            let mut part: Part = Vec::new();
            let to = BlockMemory::from(self.slot(one.slot));
            pages::pair(&blocks[one.position].memory, &to, &mut part);
            part
        });
        let mut unsettled = Unsettled::default();
        let copied = transfer_each(
            &self.agent,
            Operation::Write,
            parts.collect(),
            deadline,
            &mut unsettled,
        )
        .await;
        let came = copied.iter().zip(&room.reserved);
        let came = came.filter(|(copied, _)| copied.is_ok());
        let came: Vec<Reserved> = came.map(|(_, one)| *one).collect();
        let slots = came.iter().map(|one| self.slot(one.slot).into());
        let slots: Vec<BlockMemory> = slots.collect();
        let sources = came.iter().map(|one| &blocks[one.position].memory);
        let both: Vec<&BlockMemory> = slots.iter().chain(sources).collect();
        let filled: Vec<(Reserved, Checksum)> = match self.sums_of(&both, deadline).await {
            Sums::Of(sums) => {
                let (there, here) = sums.split_at(came.len());
                let equal = came.iter().zip(there).zip(here);
                let equal = equal.filter(|((_, there), here)| there == here);
                equal.map(|((one, sum), _)| (*one, *sum)).collect()
            }
            Sums::ByNobody | Sums::Late => Vec::new(),
        };
        report.stored += filled.len() as u32;
        report.failed += (room.reserved.len() - filled.len()) as u32;
        self.counts
            .stored
            .fetch_add(filled.len() as u64, Ordering::Relaxed);
        self.fill(&mut room, &filled);
        if unsettled.is_empty() {
            return;
        }
        let lasting: Vec<u32> = room.reserved.iter().map(|one| one.slot).collect();
        room.keep(&lasting);
        self.end_later(unsettled, move |slots| {
            lasting.iter().for_each(|slot| slots.give_up(*slot));
        });
    }

    /// Stores blocks in the cache, which sums them in host memory, and brings them up from there.
    async fn store_by_host(
        self: &Arc<Self>,
        blocks: Vec<StoreBlock>,
        deadline: Instant,
    ) -> Result<StoreReport> {
        let infos: Vec<BlockInfo> = blocks.iter().map(|block| block.info).collect();
        let kept = self.cache.store(blocks, deadline).await?;
        let up = self.promote(&infos, deadline).await?;
        let failed = kept.failed.min(up.missed);
        Ok(StoreReport {
            stored: up.promoted,
            already_held: up.already_held,
            refused: up.refused + up.missed - failed,
            failed: up.failed + failed,
        })
    }
}

fn report_total(report: &StoreReport) -> u32 {
    report.stored + report.already_held + report.refused + report.failed
}
