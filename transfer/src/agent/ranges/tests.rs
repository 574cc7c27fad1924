//! Ranges of memory that the test owns, and never touches but through the agent.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

const BYTES: usize = 4096;
const OPEN: RegionOptions = RegionOptions {
    remote_read: true,
    remote_write: true,
};

/// Memory that outlives what is registered of it.
struct Pool(HostMemory);

impl Pool {
    fn new() -> Self {
        Self(HostMemory::anonymous(BYTES as u64).unwrap())
    }

    fn address(&self) -> u64 {
        self.0.mapping().address()
    }

    fn range(&self, offset: usize, bytes: usize) -> HostMemory {
        self.0.lend(offset as u64, bytes as u64).unwrap()
    }
}

fn agent() -> Agent {
    Agent::builder("owner").build().unwrap()
}

/// A pool, parts of it, and parts of parts: one region, and its bytes are where they were.
#[test]
fn a_range_within_another_shares_its_region() {
    let (pool, agent) = (Pool::new(), agent());
    let whole = agent.register_range(pool.range(0, BYTES), OPEN).unwrap();
    let part = agent.register_range(pool.range(1024, 512), OPEN).unwrap();
    let same = agent.register_range(pool.range(0, BYTES), OPEN).unwrap();
    assert_eq!(agent.core().ranges.registrations(), 1);
    assert_eq!(
        (part.region().id(), part.offset()),
        (whole.region().id(), 1024)
    );
    assert_eq!(same.region().id(), whole.region().id());
    whole.region().fill_at(1024, 1, 42).unwrap();
    let mut byte = [0];
    let place = part.descriptor(0, 1);
    part.region().read_at(place.offset, &mut byte).unwrap();
    assert_eq!(byte, [42]);
    assert_eq!(agent.metadata().len(), {
        let single = Agent::builder("owner").build().unwrap();
        let _region = single.register_range(pool.range(0, BYTES), OPEN).unwrap();
        single.metadata().len()
    });
    drop((whole, part, same));
    assert_eq!(agent.core().ranges.registrations(), 0);
}

/// The pool goes first: its region stays for the part, and the memory is not called free before that goes, too.
#[test]
fn the_last_holder_ends_the_registration() {
    let (pool, agent) = (Pool::new(), agent());
    let whole = agent.register_range(pool.range(0, BYTES), OPEN).unwrap();
    let part = agent.register_range(pool.range(0, 64), OPEN).unwrap();
    let gone = whole.deregister();
    let busy = gone.wait(Duration::ZERO).unwrap_err();
    assert!(busy.to_string().contains("other ranges"), "{busy}");
    part.region().fill_at(0, 1, 1).unwrap();
    let region = part.region().clone();
    part.deregister().wait(Duration::from_secs(30)).unwrap();
    gone.wait(Duration::from_secs(30)).unwrap();
    // What was there is not found again: the same memory is another region now.
    assert!(region.fill_at(0, 1, 1).is_err());
    let again = agent.register_range(pool.range(0, 64), OPEN).unwrap();
    assert_ne!(again.region().id(), region.id());
    assert_eq!(again.region().bytes(), 64);
}

/// A holder ends the region itself: the next one gets another.
#[test]
fn a_region_that_was_deregistered_is_not_shared() {
    let (pool, agent) = (Pool::new(), agent());
    let first = agent.register_range(pool.range(0, BYTES), OPEN).unwrap();
    let gone = first.region().deregister();
    gone.wait(Duration::from_secs(30)).unwrap();
    let second = agent.register_range(pool.range(0, 64), OPEN).unwrap();
    second.region().fill_at(0, 1, 1).unwrap();
    assert_ne!(second.region().id(), first.region().id());
}

/// Ranges that touch, overlap or may do other things are regions of their own, as is memory of the agent's.
#[test]
fn what_is_not_within_is_by_itself() {
    let (pool, agent) = (Pool::new(), agent());
    let read_only = RegionOptions {
        remote_write: false,
        ..OPEN
    };
    let held = [
        agent.register_range(pool.range(1024, 1024), OPEN),
        agent.register_range(pool.range(0, 1024), OPEN),
        agent.register_range(pool.range(1536, 1024), OPEN),
        agent.register_range(pool.range(1024, 64), read_only),
        agent.register_range(HostMemory::shared(4096).unwrap(), OPEN),
    ];
    let ids: std::collections::BTreeSet<_> = held
        .iter()
        .map(|range| range.as_ref().unwrap().region().id())
        .collect();
    assert_eq!(ids.len(), held.len());
    assert!(
        held.iter()
            .all(|range| range.as_ref().unwrap().offset() == 0)
    );
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Registered and given back in any order: each range lies in its region, regions are open for as long as one is held,
    /// and nothing is left.
    #[test]
    fn any_order_of_registrations_is_sound(
        steps in proptest::collection::vec((0..BYTES, 1..BYTES, any::<bool>()), 1..40),
    ) {
        let (pool, agent) = (Pool::new(), agent());
        let mut held: Vec<(RegisteredRange, u64)> = Vec::new();
        for (start, len, give_back) in steps {
            if give_back && !held.is_empty() {
                drop(held.swap_remove(start % held.len()));
            } else {
                let len = len.min(BYTES - start);
                let address = pool.address() + start as u64;
                let range = agent.register_range(pool.range(start, len), OPEN).unwrap();
                let inside = held.iter().any(|(other, at)| {
                    *at <= address && address + len as u64 <= *at + other.bytes()
                });
                let shares = held.iter().any(|(other, _)| other.region().id() == range.region().id());
                prop_assert!(shares || !inside);
                held.push((range, address));
            }
            for (range, address) in &held {
                let base = range.region().core().mapping().unwrap().address();
                prop_assert_eq!(base + range.offset(), *address);
                prop_assert!(range.offset() + range.bytes() <= range.region().bytes());
                prop_assert!(!range.region().core().is_closed());
            }
        }
        drop(held);
        prop_assert_eq!(agent.core().ranges.registrations(), 0);
    }
}
