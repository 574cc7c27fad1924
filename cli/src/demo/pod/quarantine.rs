//! Engine slots that a transfer may still write to after its fetch has ended: they are exchanged, or stay with their
//! request, and reach no other block before the transfer has drained.

use kvcache_core::pool::{Filling, Slot};
use kvcache_core::{Error, Result};
use kvfabric::FetchReport;
use kvfabric_sim::engine::{EnginePool, Running};

/// A request's blocks whose slots must not return to the pool with the others.
#[derive(Debug, Default)]
pub(super) struct Doubtful {
    positions: Vec<usize>,
    held: Option<Held>,
}

/// Slots out of use until a fetch has drained.
#[derive(Debug)]
pub(super) struct Held {
    slots: Vec<Slot<Filling>>,
    /// Of the fetch; none when nobody will ever say that it has drained.
    report: Option<FetchReport>,
}

impl Doubtful {
    /// These blocks may be written to for as long as this process lives.
    pub(super) fn for_ever(positions: std::ops::Range<usize>) -> Self {
        Self {
            positions: positions.collect(),
            held: Some(Held {
                slots: Vec::new(),
                report: None,
            }),
        }
    }
}

/// Gives the unsettled blocks of `report`, whose fetch began at block `start`, other slots. What is to be kept until it
/// has drained; and if the pool has too few others, the error, and which blocks must take their slots out with them.
pub(super) fn exchange(
    pool: &mut EnginePool,
    running: &mut Running,
    start: usize,
    report: FetchReport,
) -> Result<Held, (Doubtful, Error)> {
    let unsettled = report.unsettled.iter();
    let positions: Vec<usize> = unsettled.map(|p| start + *p as usize).collect();
    let mut slots = Vec::with_capacity(positions.len());
    for (exchanged, position) in positions.iter().enumerate() {
        match pool.quarantine(running, *position) {
            Ok(slot) => slots.push(slot),
            Err(error) => {
                let doubtful = Doubtful {
                    positions: positions[exchanged..].to_vec(),
                    held: Some(Held {
                        slots,
                        report: Some(report),
                    }),
                };
                return Err((doubtful, error));
            }
        }
    }
    Ok(Held {
        slots,
        report: Some(report),
    })
}

/// Ends a request; what is to be kept until its fetch has drained.
pub(super) fn leave(pool: &mut EnginePool, running: Running, doubtful: Doubtful) -> Option<Held> {
    let kept = pool.abort(running, &doubtful.positions);
    let mut held = doubtful.held?;
    held.slots.extend(kept);
    Some(held)
}

impl Held {
    /// The slots, once no transfer can write to them any more. None if that is never certain: then the cache is gone,
    /// and they stay out of use, as this process ends anyway.
    pub(super) async fn drained(self) -> Option<Vec<Slot<Filling>>> {
        let mut report = self.report?;
        report.drained().await.then_some(self.slots)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kvcache_core::ErrorKind;
    use kvcache_core::prefix::data::{ModelIdentity, Shard};
    use kvcache_core::prefix::{IndexScheme, Namespace};
    use kvfabric_sim::sequence::{Sequence, Sequencer};
    use kvfabric_sim::workload::{Output, Prompt, Request};

    use super::*;

    const BLOCK_TOKENS: u32 = 4;

    fn sequence(id: u32, blocks: u32) -> Arc<Sequence> {
        let sequencer = Sequencer::new(
            &ModelIdentity([7; 32]),
            &Shard::whole(1, 1),
            &IndexScheme::parse("xxh3:1337").unwrap(),
            &Namespace::default(),
            BLOCK_TOKENS,
        );
        let tokens = (0..blocks * BLOCK_TOKENS).map(|token| id * 1000 + token);
        Arc::new(sequencer.unwrap().request(&Request {
            id: id.into(),
            at_ms: 0,
            after: None,
            prompt: Prompt::Tokens(tokens.collect()),
            output: Output::Blocks(0),
        }))
    }

    fn unsettled(positions: &[u32]) -> FetchReport {
        let mut report = FetchReport::default();
        report.unsettled = positions.to_vec();
        report
    }

    /// Five slots, four of them the request's: the first of two unsettled blocks gets the fifth, the second none.
    #[test]
    fn a_slot_that_cannot_be_exchanged_does_not_return_to_the_pool_with_its_request() {
        let mut pool = EnginePool::new(5);
        let mut running = pool.admit(sequence(1, 4), 4).unwrap();
        let doubted = [running.slots()[1], running.slots()[3]];
        let (doubtful, error) =
            exchange(&mut pool, &mut running, 1, unsettled(&[0, 2])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let held = leave(&mut pool, running, doubtful).expect("slots are kept");
        let kept: Vec<_> = held.slots.iter().map(|slot| slot.place().index).collect();
        assert_eq!(kept, doubted);
        assert_eq!(pool.available(), 3);
        let next = pool.admit(sequence(2, 3), 3).unwrap();
        assert!(next.slots().iter().all(|slot| !doubted.contains(slot)));
        held.slots.into_iter().for_each(|slot| pool.readmit(slot));
        leave(&mut pool, next, Doubtful::default());
        assert_eq!(pool.available(), 5);
    }

    /// Room for all: the request goes on with other slots.
    #[test]
    fn unsettled_blocks_get_other_slots() {
        let mut pool = EnginePool::new(5);
        let mut running = pool.admit(sequence(1, 2), 2).unwrap();
        let before = running.slots().to_vec();
        let held = exchange(&mut pool, &mut running, 0, unsettled(&[0, 1])).unwrap();
        let kept: Vec<_> = held.slots.iter().map(|slot| slot.place().index).collect();
        assert_eq!(kept, before);
        assert!(running.slots().iter().all(|slot| !before.contains(slot)));
        assert!(leave(&mut pool, running, Doubtful::default()).is_none());
        assert_eq!(pool.available(), 3);
    }

    /// The cache ended by a fault of its own while it had the slots.
    #[tokio::test]
    async fn slots_that_nobody_can_vouch_for_are_never_used_again() {
        let mut pool = EnginePool::new(3);
        let running = pool.admit(sequence(1, 2), 2).unwrap();
        let held = leave(&mut pool, running, Doubtful::for_ever(1..2)).expect("slots are kept");
        assert!(held.drained().await.is_none());
        assert_eq!(pool.available(), 2);
    }
}
