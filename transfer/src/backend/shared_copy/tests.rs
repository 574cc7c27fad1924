//! Copies between mappings of the test's own, with a look at who asks for the remote side, and when.

use std::collections::HashSet;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::backend::Operation;
use crate::descriptor::Target;
use crate::region::{Body, RegionCore, RegionOptions};
use crate::sys::memory::HostMemory;

const BYTES: u64 = 24 << 20;
const WORD: u64 = 8;

/// A remote side of two regions, and the local one of as many bytes.
struct Rig {
    local: Arc<RegionCore>,
    remote: [Mapping; 2],
}

impl Rig {
    fn new() -> Self {
        let local = Body::Host(HostMemory::anonymous(BYTES).unwrap());
        let rig = Self {
            local: Arc::new(RegionCore::new(local, RegionOptions::default()).unwrap()),
            remote: [
                Mapping::anonymous(BYTES).unwrap(),
                Mapping::anonymous(BYTES).unwrap(),
            ],
        };
        // Each MiB is of its own kind, as is each byte around its end.
        for place in 0..BYTES / STEP_BYTES {
            let at = place * STEP_BYTES;
            for (n, remote) in rig.remote.iter().enumerate() {
                remote
                    .fill(at, STEP_BYTES, (place as u8) << 1 | n as u8)
                    .unwrap();
                remote.write(at, &[0xfe, n as u8, place as u8]).unwrap();
            }
        }
        rig
    }

    fn plan(&self, extents: Vec<Extent>) -> Plan {
        Plan {
            operation: Operation::Read,
            local: Arc::from([Target::Local(self.local.clone())]),
            bytes: extents.iter().map(|extent| extent.len).sum(),
            descriptors: extents.len() as u32,
            extents,
            ..Plan::empty()
        }
    }

    fn byte(&self, at: u64) -> u8 {
        let mut byte = [0];
        self.local.mapping().unwrap().read(at, &mut byte).unwrap();
        byte[0]
    }
}

fn extent(remote: u32, at: u64, len: u64) -> Extent {
    Extent {
        local: 0,
        remote,
        local_offset: at,
        remote_offset: at,
        len,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Extents of any length, one after the other, from either region: all of them is copied, and nothing behind them.
    #[test]
    fn a_shared_copy_is_whole(
        lengths in proptest::collection::vec((0..2_u32, prop_oneof![1..600_u64, 1..(9_u64 << 20)]), 1..12),
        threads in 1..5_usize,
    ) {
        let rig = Rig::new();
        let mut at = 0;
        let mut extents = Vec::new();
        for (remote, len) in lengths {
            let len = len.min(BYTES - at);
            if len > 0 {
                extents.push(extent(remote, at, len));
            }
            at += len;
        }
        let plan = rig.plan(extents);
        copy_plan(&plan, threads, &mut Place::default(), &|| Ok(Go::On), |remote| Ok(&rig.remote[remote as usize])).unwrap();
        let local = rig.local.mapping().unwrap();
        for extent in &plan.extents {
            let remote = &rig.remote[extent.remote as usize];
            let (found, expected) = (
                local.crc32c(extent.local_offset, extent.len).unwrap(),
                remote.crc32c(extent.remote_offset, extent.len).unwrap(),
            );
            prop_assert_eq!(found, expected, "{:?}", extent);
        }
        prop_assert_eq!(
            local.crc32c(at, BYTES - at).unwrap(),
            Mapping::anonymous(BYTES).unwrap().crc32c(0, BYTES - at).unwrap()
        );
    }
}

/// Leaves a copy at every look and goes on with it: nothing is left out, nor copied a second time.
#[test]
fn a_copy_that_is_left_goes_on_where_it_was() {
    let rig = Rig::new();
    let plan = rig.plan(vec![
        extent(0, 0, STEP_BYTES / 2),
        extent(1, STEP_BYTES / 2, 5 * STEP_BYTES),
        extent(0, 6 * STEP_BYTES, 8),
    ]);
    let (mut place, mut times) = (Place::default(), 0);
    let remote = |remote: u32| Ok(&rig.remote[remote as usize]);
    while copy_plan(&plan, 1, &mut place, &|| Ok(Go::Later), remote).unwrap() == Progress::Paused {
        // What is in place is not touched again.
        rig.local.mapping().unwrap().fill(times, 1, 0xaa).unwrap();
        times += 1;
    }
    assert_eq!(times, 5);
    let local = rig.local.mapping().unwrap();
    for extent in &plan.extents[1..] {
        let remote = &rig.remote[extent.remote as usize];
        assert_eq!(
            local.crc32c(extent.local_offset, extent.len).unwrap(),
            remote.crc32c(extent.remote_offset, extent.len).unwrap()
        );
    }
    assert!((0..times).all(|at| rig.byte(at) == 0xaa) && rig.byte(times) != 0xaa);
}

/// Nobody goes on before two threads have asked: with one thread alone the wait would run out.
#[test]
fn several_threads_take_part() {
    let rig = Rig::new();
    let plan = rig.plan(vec![extent(0, 0, SHARED_BYTES_MIN)]);
    let (seen, changed) = (Mutex::new(HashSet::new()), Condvar::new());
    let remote = |remote: u32| {
        let mut threads = seen.lock().unwrap();
        threads.insert(std::thread::current().id());
        changed.notify_all();
        let (threads, waited) = changed
            .wait_timeout_while(threads, Duration::from_secs(60), |threads| {
                threads.len() < 2
            })
            .unwrap();
        assert!(!waited.timed_out(), "{threads:?}");
        Ok(&rig.remote[remote as usize])
    };
    copy_plan(&plan, 2, &mut Place::default(), &|| Ok(Go::On), remote).unwrap();
}

/// The word between two large ranges is asked for when the first is in place and the second is not begun. The thread that
/// begins keeps its first step back until the range's end is in place, and then for as long as a word that does not wait for it
/// would need.
#[test]
fn a_word_is_copied_after_what_is_before_it() {
    let rig = Rig::new();
    let half = BYTES / 2;
    let plan = rig.plan(vec![
        extent(0, 0, half - WORD),
        extent(1, half - WORD, WORD),
        extent(0, half, half - WORD),
        extent(1, BYTES - WORD, WORD),
    ]);
    let looks = Mutex::new(Vec::new());
    let begun = AtomicBool::new(false);
    let remote = |remote: u32| {
        if remote == 0 && !begun.swap(true, Ordering::Relaxed) {
            let until = Instant::now() + Duration::from_secs(60);
            while rig.byte(half - WORD - 1) == 0 {
                assert!(Instant::now() < until, "the others do not go on");
                std::thread::yield_now();
            }
            let grace = Instant::now() + Duration::from_millis(300);
            while looks.lock().unwrap().is_empty() && Instant::now() < grace {
                std::thread::yield_now();
            }
        }
        if remote == 1 {
            let places = [0, half - WORD - 1, half, BYTES - WORD - 1];
            looks
                .lock()
                .unwrap()
                .push(places.map(|at| rig.byte(at) != 0));
        }
        Ok(&rig.remote[remote as usize])
    };
    copy_plan(&plan, 4, &mut Place::default(), &|| Ok(Go::On), remote).unwrap();
    assert_eq!(
        *looks.lock().unwrap(),
        [[true, true, false, false], [true; 4]]
    );
}

/// Whoever copies is told to stop, and no thread is left at work.
#[test]
fn a_shared_copy_that_is_called_off_stops() {
    let rig = Rig::new();
    let plan = rig.plan(vec![extent(0, 0, BYTES)]);
    let refuse = || Err(Error::new(ErrorKind::Cancelled, "enough"));
    let stopped = copy_plan(&plan, 2, &mut Place::default(), &refuse, |remote| {
        Ok(&rig.remote[remote as usize])
    });
    assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
    let failed = copy_plan(&plan, 2, &mut Place::default(), &|| Ok(Go::On), |_| {
        Err(Error::new(ErrorKind::Internal, "no memory"))
    });
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::Internal);
}

/// The other thread fails, and the calling one does not: the copy fails.
#[test]
fn a_thread_that_fails_is_not_overlooked() {
    let rig = Rig::new();
    let plan = rig.plan(vec![extent(0, 0, BYTES)]);
    let own = std::thread::current().id();
    let (seen, changed) = (Mutex::new(false), Condvar::new());
    let failed = copy_plan(&plan, 2, &mut Place::default(), &|| Ok(Go::On), |remote| {
        let mut other_came = seen.lock().unwrap();
        if std::thread::current().id() != own {
            *other_came = true;
            changed.notify_all();
            return Err(Error::new(ErrorKind::Internal, "no memory"));
        }
        let waited = changed.wait_timeout_while(other_came, Duration::from_secs(60), |came| !*came);
        assert!(!waited.unwrap().1.timed_out());
        Ok(&rig.remote[remote as usize])
    });
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::Internal);
}
