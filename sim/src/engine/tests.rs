use std::collections::{BTreeMap, BTreeSet};

use kvcache_core::prefix::data::{ModelIdentity, Shard};
use kvcache_core::prefix::{IndexScheme, Namespace};
use proptest::prelude::*;

use super::*;
use crate::sequence::Sequencer;

const BLOCK: u32 = 4;

fn sequencer() -> Sequencer {
    let (identity, shard) = (ModelIdentity([9; 32]), Shard::whole(1, 1));
    let scheme = IndexScheme::default();
    Sequencer::new(&identity, &shard, &scheme, &Namespace::default(), BLOCK).expect("sound sizes")
}

/// A prompt whose blocks are told apart by these numbers, and one token more.
fn prompt(blocks: &[u32]) -> Arc<Sequence> {
    let mut tokens: Vec<u32> = blocks
        .iter()
        .flat_map(|block| [*block; BLOCK as usize])
        .collect();
    tokens.push(0);
    Arc::new(sequencer().tokens(tokens))
}

fn admit(pool: &mut EnginePool, sequence: &Arc<Sequence>) -> Result<Running> {
    pool.admit(sequence.clone(), sequence.reusable_blocks())
}

/// Admits, computes all that is missing, and finishes; returns the hits.
fn serve(pool: &mut EnginePool, sequence: &Arc<Sequence>) -> usize {
    let mut running = admit(pool, sequence).expect("room");
    let hits = running.hits();
    pool.seal(&mut running, sequence.prompt_blocks() - hits);
    pool.finish(running);
    hits
}

fn hashes(sequence: &Sequence, positions: std::ops::Range<usize>) -> Vec<EngineHash> {
    sequence.blocks()[positions]
        .iter()
        .map(|block| engine_hash(&block.key))
        .collect()
}

/// Serves two prompts that share their first two blocks and reads the events.
#[test]
fn shared_blocks_are_hits_and_only_new_ones_are_announced() {
    let mut pool = EnginePool::new(8);
    let (first, second) = (prompt(&[1, 2, 3]), prompt(&[1, 2, 4, 5]));
    assert_eq!(serve(&mut pool, &first), 0);
    let stored = |sequence: &Sequence, start: usize, count: usize| EngineEvent::Stored {
        hashes: hashes(sequence, start..start + count),
        parent: (start > 0).then(|| hashes(sequence, start - 1..start)[0]),
        tokens: sequence.tokens()[start * 4..(start + count) * 4].to_vec(),
        block_size: BLOCK,
        tier: Tier::Device,
    };
    assert_eq!(pool.take_events(), [stored(&first, 0, 3)]);
    assert_eq!(serve(&mut pool, &second), 2);
    assert_eq!(pool.take_events(), [stored(&second, 2, 2)]);
    assert_eq!(pool.take_events(), []);
}

/// Fills a pool of four blocks and asks for more: removals come before the block that displaced them, tails first.
#[test]
fn a_removal_is_announced_before_what_displaced_it() {
    let mut pool = EnginePool::new(4);
    let (old, new) = (prompt(&[1, 2, 3]), prompt(&[7, 8, 9]));
    serve(&mut pool, &old);
    pool.take_events();
    serve(&mut pool, &new);
    let removed = |position: usize| EngineEvent::Removed {
        hashes: hashes(&old, position..position + 1),
        tier: Tier::Device,
    };
    let events = pool.take_events();
    assert_eq!(events[..2], [removed(2), removed(1)]);
    assert!(matches!(&events[2], EngineEvent::Stored { hashes, .. } if hashes.len() == 3));
    assert_eq!(
        (events.len(), pool.evictions(), pool.depth(&old)),
        (3, 2, 1)
    );
}

/// Asks a pool for more than it can ever have, then for more than others leave; the errors name the sizes.
#[test]
fn a_request_that_does_not_fit_is_refused_with_the_sizes() {
    let mut pool = EnginePool::new(4);
    let error = admit(&mut pool, &prompt(&[1, 2, 3, 4, 5])).expect_err("too large");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let expected =
        "the request of 21 tokens takes 5 blocks of 4, but the engine's pool has 4 blocks";
    assert_eq!(error.context(), expected);

    let mut running = admit(&mut pool, &prompt(&[1, 2, 3])).expect("room");
    pool.seal(&mut running, 1);
    let error = admit(&mut pool, &prompt(&[1, 8, 9])).expect_err("no room now");
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert_eq!(error.context(), "2 slots are wanted, 1 of 4 are free now");
    pool.finish(running);
    assert_eq!(pool.available(), 4);
    assert_eq!(serve(&mut pool, &prompt(&[1, 8, 9])), 1);
}

/// Two sequences compute the same block at the same time; the second goes on with the first one's copy.
#[test]
fn a_block_that_two_sequences_compute_is_kept_once() {
    let mut pool = EnginePool::new(4);
    let sequence = prompt(&[1]);
    let mut first = admit(&mut pool, &sequence).expect("room");
    let mut second = admit(&mut pool, &sequence).expect("room");
    assert_ne!(first.slots(), second.slots());
    pool.seal(&mut first, 1);
    pool.seal(&mut second, 1);
    assert_eq!(first.slots(), second.slots());
    assert_eq!(pool.take_events().len(), 1);
    pool.finish(first);
    assert_eq!(pool.available(), 3, "the second sequence still has it");
    pool.finish(second);
    assert_eq!((pool.available(), pool.blocks()), (4, 1));
}

/// Exchanges a slot that a transfer may still write to; it is nobody's until it is handed back.
#[test]
fn a_quarantined_slot_is_used_by_nobody_until_it_is_handed_back() {
    let mut pool = EnginePool::new(3);
    let sequence = prompt(&[1, 2]);
    let mut running = admit(&mut pool, &sequence).expect("room");
    let before = running.slots().to_vec();
    let kept = pool.quarantine(&mut running, 1).expect("one slot is left");
    assert_eq!(kept.place().index, before[1]);
    assert_eq!(running.slots()[0], before[0]);
    assert!(!before.contains(&running.slots()[1]));
    let error = pool.quarantine(&mut running, 0).expect_err("none is left");
    assert_eq!(error.kind(), ErrorKind::Busy);
    pool.seal(&mut running, 2);
    pool.finish(running);
    assert_eq!(pool.available(), 2);
    pool.readmit(kept);
    assert_eq!(pool.available(), 3);
}

/// Ends work while a transfer may still write to one of its slots.
#[test]
fn aborted_work_keeps_only_the_slots_that_are_still_written_to() {
    let mut pool = EnginePool::new(4);
    let mut running = admit(&mut pool, &prompt(&[1, 2, 3, 4])).expect("room");
    pool.seal(&mut running, 1);
    let slot = running.slots()[2];
    let kept = pool.abort(running, &[2]);
    assert_eq!(
        kept.iter()
            .map(|slot| slot.place().index)
            .collect::<Vec<_>>(),
        [slot]
    );
    assert_eq!((pool.available(), pool.blocks()), (3, 1));
    kept.into_iter().for_each(|slot| pool.readmit(slot));
    assert_eq!(pool.available(), 4);
}

/// A prompt that is here completely: its last block is computed again, unless only the answer is to be written.
#[test]
fn the_last_tokens_block_is_computed_again_for_a_prompt_only() {
    let mut pool = EnginePool::new(4);
    let sequence = Arc::new(sequencer().tokens([1; 8].to_vec()));
    serve(&mut pool, &sequence);
    assert_eq!(serve(&mut pool, &sequence), 1);
    let running = pool
        .admit(sequence.clone(), sequence.prompt_blocks())
        .expect("room");
    assert_eq!(running.hits(), 2);
    pool.finish(running);
}

/// Writes an answer: its blocks get slots of their own and are announced behind the prompt's.
#[test]
fn an_answer_extends_its_prompt() {
    use crate::workload::{Output, Prompt, Request};
    let (prompt, output) = (Prompt::Tokens(vec![1; 6]), Output::Tokens(vec![2; 7]));
    let request = Request {
        id: 0,
        at_ms: 0,
        after: None,
        prompt,
        output,
    };
    let sequence = Arc::new(sequencer().request(&request));
    assert_eq!((sequence.prompt_blocks(), sequence.blocks().len()), (1, 3));
    let mut pool = EnginePool::new(3);
    let mut running = admit(&mut pool, &sequence).expect("room");
    pool.seal(&mut running, 1);
    pool.extend(&mut running).expect("room");
    assert_eq!((running.sealed(), running.slots().len()), (1, 3));
    pool.seal(&mut running, 2);
    pool.finish(running);
    assert_eq!((pool.depth(&sequence), pool.blocks()), (3, 3));
    let mut small = EnginePool::new(2);
    let mut running = admit(&mut small, &sequence).expect("room");
    assert_eq!(
        small.extend(&mut running).expect_err("too large").kind(),
        ErrorKind::Invalid
    );
    small.finish(running);
}

/// A tenth of a second for a hundred tokens at a thousand a second, and no division by nothing.
#[test]
fn computing_takes_time_in_proportion() {
    assert_eq!(
        ComputeModel {
            tokens_per_s: 1_000
        }
        .time(100),
        Duration::from_millis(100)
    );
    assert_eq!(
        ComputeModel { tokens_per_s: 0 }.time(2),
        Duration::from_secs(2)
    );
}

proptest! {
    /// Random admissions and endings; replaying the events must give exactly the blocks that can be hit, and no slot
    /// may be held by two sequences for different blocks.
    #[test]
    fn events_tell_the_pools_content(steps in prop::collection::vec((0_u32..3, 0_u32..4, 1_usize..5), 1..80)) {
        let mut pool = EnginePool::new(10);
        let mut running = Vec::<Running>::new();
        let mut announced = BTreeSet::new();
        for (action, first, length) in steps {
            let blocks: Vec<u32> = (0..length as u32).map(|at| first + at * at).collect();
            match action {
                0 => running.extend(admit(&mut pool, &prompt(&blocks)).ok()),
                1 => if let Some(one) = running.first_mut() {
                    let left = one.slots().len() - one.sealed();
                    pool.seal(one, left.min(length));
                },
                _ => if !running.is_empty() {
                    pool.finish(running.remove(length % running.len()));
                },
            }
            for event in pool.take_events() {
                match event {
                    EngineEvent::Stored { hashes, parent, .. } => {
                        prop_assert!(parent.is_none_or(|parent| announced.contains(&parent)));
                        for hash in hashes {
                            prop_assert!(announced.insert(hash), "announced twice");
                        }
                    }
                    EngineEvent::Removed { hashes, .. } => {
                        prop_assert!(hashes.iter().all(|hash| announced.remove(hash)));
                    }
                    EngineEvent::Cleared => announced.clear(),
                }
            }
            prop_assert_eq!(announced.len(), pool.blocks());
            let mut owners = BTreeMap::new();
            for one in &running {
                for (slot, key) in one.slots().iter().zip(one.sequence().keys()) {
                    prop_assert_eq!(*owners.entry(*slot).or_insert(key), key);
                }
            }
        }
        running.into_iter().for_each(|one| pool.finish(one));
        prop_assert_eq!(pool.available(), 10);
    }
}
