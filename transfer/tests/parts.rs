//! Requests in parts, requests that give way, and rates.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::future::Future;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, FileEngineMode, FileOptions, HostMemory, MemoryFate, ObjectOptions, Operation, Priority,
    RegionOptions, RequestOptions, Side, Status,
};

use support::overtaking::overtakes;
use support::proxy::proxied;
use support::{Pair, WAIT, WAYS, Way, contents, pattern};

const LAYERS: usize = 16;
const BLOCKS: u64 = 32;
const BLOCK: u64 = 8 << 10;
const LAYER: u64 = BLOCKS * BLOCK;
const ALL: u64 = LAYERS as u64 * LAYER;

/// Blocks of all layers, scattered on the local side; each layer is a part.
fn layers() -> (Vec<(u64, u64, u64)>, Vec<u32>) {
    let blocks = LAYERS as u64 * BLOCKS;
    let places = (0..blocks)
        .map(|n| (n * 37 % blocks * BLOCK, n * BLOCK, BLOCK))
        .collect();
    (places, vec![BLOCKS as u32; LAYERS])
}

fn in_parts(parts: &[u32]) -> RequestOptions {
    RequestOptions {
        parts: parts.to_vec(),
        ..RequestOptions::default()
    }
}

/// Every part is waited for, from the first on, and its bytes are in place then; the notification comes after the last.
/// Twice, because the second post starts anew.
#[test]
fn each_part_is_in_place_when_it_is_said_to_be() {
    for way in WAYS {
        let pair = Pair::new(way, ALL);
        let (places, parts) = layers();
        let options = RequestOptions {
            notification: Some(Bytes::from_static(b"all layers")),
            ..in_parts(&parts)
        };
        let request = pair.moves(Operation::Read, &places, options);
        assert_eq!(request.parts(), LAYERS);
        for round in 0..2 {
            let data = pattern(ALL as usize, round + 1);
            if round > 0 {
                request.wait(WAIT).unwrap();
                pair.remote.write_at(0, &data).unwrap();
                request.post().unwrap();
            }
            for layer in 0..LAYERS {
                request.wait_part(layer, WAIT).unwrap();
                if round == 0 {
                    continue;
                }
                for &(to, from, len) in &places[layer * BLOCKS as usize..][..BLOCKS as usize] {
                    let mut bytes = vec![0; len as usize];
                    pair.local.read_at(to, &mut bytes).unwrap();
                    assert!(bytes == data[from as usize..][..len as usize], "{way:?}");
                }
            }
            assert_eq!(request.wait(WAIT).unwrap().bytes, ALL);
            let notifications = pair.target.wait_notifications(WAIT);
            assert_eq!(notifications.len(), 1, "{way:?}");
            assert_eq!(notifications[0].bytes, "all layers");
        }
    }
}

/// A future for each part, and what is answered for parts that there are not.
#[test]
fn parts_are_futures_and_are_counted() {
    let pair = Pair::new(Way::Tcp, ALL);
    let (places, parts) = layers();
    let request = pair.moves(Operation::Read, &places, in_parts(&parts));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        for layer in 0..LAYERS {
            request.part(layer).await.unwrap();
        }
    });
    let none = request.wait_part(LAYERS, WAIT).unwrap_err();
    assert_eq!(none.kind(), ErrorKind::Invalid);
    let mut context = Context::from_waker(Waker::noop());
    let mut none = std::pin::pin!(request.part(LAYERS));
    assert!(matches!(
        none.as_mut().poll(&mut context),
        Poll::Ready(Err(_))
    ));
}

/// Parts that are not all pairs, or have none, are refused with the numbers.
#[test]
fn parts_that_do_not_add_up_are_refused() {
    let pair = Pair::new(Way::Memcpy, 4096);
    let own = [pair.local.descriptor(0, 64), pair.local.descriptor(64, 64)];
    let other = [
        pair.remote.descriptor(0, 64),
        pair.remote.descriptor(64, 64),
    ];
    let own = pair.initiator.prepare(Side::Local, &own).unwrap();
    let other = pair
        .initiator
        .prepare(Side::Peer(&pair.peer), &other)
        .unwrap();
    for (parts, text) in [
        (vec![1], "have 1 pairs together, the request has 2"),
        (vec![2, 1], "have 3 pairs together, the request has 2"),
        (vec![2, 0], "part 1 has no pairs"),
        (vec![1; 5000], "parts"),
    ] {
        let options = in_parts(&parts);
        let refused = pair
            .initiator
            .request(Operation::Read, &own, &other, options);
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(text), "{error}");
    }
}

/// The first part arrives, then the network stands still: the others fail at the deadline, the first stays in place, and
/// the memory of all is settled.
#[test]
fn a_part_stays_in_place_when_the_request_fails_later() {
    let (pair, proxy) = proxied(ALL);
    pair.moves(Operation::Read, &[(0, 0, 64)], RequestOptions::default())
        .wait(WAIT)
        .unwrap();
    let (places, parts) = layers();
    let options = RequestOptions {
        deadline: Some(Duration::from_millis(300)),
        ..in_parts(&parts)
    };
    // The first layer's frame and answer pass, as this many bytes are less than two layers.
    proxy.stall_after(LAYER + LAYER / 2);
    let request = pair.moves(Operation::Read, &places, options);
    request.wait_part(0, WAIT).unwrap();
    let failed = request.wait_part(LAYERS - 1, WAIT).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Timeout);
    assert!(request.wait_drained(WAIT));
    request.wait_part(0, WAIT).unwrap();
    let Status::Failed(failed) = request.poll() else {
        panic!("{:?}", request.poll())
    };
    assert_eq!(failed.fate(), MemoryFate::Settled);
    pair.local.deregister().wait(WAIT).unwrap();
}

/// Adjacent on both sides: one frame of a few bytes, where the same blocks scattered say each where it is. A part's end
/// separates neighbours.
#[test]
fn neighbours_on_both_sides_are_one_operation() {
    let asked = |places: &[(u64, u64, u64)], parts: &[u32]| {
        let (pair, proxy) = proxied(ALL);
        assert!(pair.initiator.path_to(&pair.peer).backend.is_some());
        let before = proxy.passed();
        let request = pair.moves(Operation::Read, places, in_parts(parts));
        request.wait(WAIT).unwrap();
        proxy.passed() - before - request.bytes()
    };
    let blocks = 16;
    let neighbours: Vec<_> = (0..blocks).map(|n| (n * BLOCK, n * BLOCK, BLOCK)).collect();
    let apart: Vec<_> = (0..blocks)
        .map(|n| (n * BLOCK, n * 2 * BLOCK, BLOCK))
        .collect();
    // A header, an access of one region and one range, a header.
    let once = 24 + (8 + 24 + 16) + 24;
    assert_eq!(asked(&neighbours, &[]), once);
    assert_eq!(asked(&apart, &[]), once + (blocks - 1) * 16);
    assert_eq!(asked(&neighbours, &[8, 8]), 2 * once);
}

const BULK: u64 = 64 << 20;

/// Many offloads are posted, then one fetch: it is done before most of them, over every way that has a queue. Writes over UCX
/// are over when the whole path was flushed, whatever went first, so there it is reads that give way.
#[test]
fn a_fetch_overtakes_offloads() {
    for way in WAYS {
        let pair = Pair::new(way, BULK);
        let bulk = match way {
            Way::Ucx => Operation::Read,
            _ => Operation::Write,
        };
        let background = RequestOptions {
            priority: Priority::Background,
            ..RequestOptions::default()
        };
        overtakes(&format!("{way:?}"), || {
            let offload = || pair.moves(bulk, &[(0, 0, BULK)], background.clone());
            let offloads = std::iter::repeat_with(offload).take(8).collect();
            let options = RequestOptions::default();
            (
                offloads,
                pair.moves(Operation::Read, &[(0, 0, 1 << 20)], options),
            )
        });
    }
}

/// The same for files, on four threads, each of which does a whole request: the fetch is next when one of them is free.
#[test]
fn a_fetch_from_a_file_overtakes_offloads_to_it() {
    let agent = Agent::builder("files").build().unwrap();
    agent.start_file_engine(FileEngineMode::Blocking).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = FileOptions {
        create: true,
        len_bytes: Some(BULK),
        ..FileOptions::default()
    };
    let file = agent.open_file(folder.path().join("f"), &options).unwrap();
    let memory = HostMemory::anonymous(BULK).unwrap();
    let memory = agent.register(memory, RegionOptions::default()).unwrap();
    let moves = |operation, bytes, priority| {
        let pairs = [(memory.descriptor(0, bytes), file.descriptor(0, bytes))];
        let options = RequestOptions {
            priority,
            ..RequestOptions::default()
        };
        agent
            .transfer(operation, &pairs, Side::Local, options)
            .unwrap()
    };
    overtakes("a file", || {
        let offload = || moves(Operation::Write, BULK, Priority::Background);
        let offloads = std::iter::repeat_with(offload).take(12).collect();
        (offloads, moves(Operation::Read, 1 << 20, Priority::Normal))
    });
}

/// The same for a store that takes one request at a time.
#[test]
fn a_fetch_from_a_store_overtakes_offloads_to_it() {
    /// Objects in several parts give way between these, whatever matters more.
    const ONE_PART: u64 = 4 << 20;
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().display());
    let options = ObjectOptions {
        concurrency_max: 1,
        ..ObjectOptions::default()
    };
    let agent = Agent::builder("objects").object_store("s", &url, options);
    let agent = agent.build().unwrap();
    let memory = HostMemory::anonymous(BULK).unwrap();
    let memory = agent.register(memory, RegionOptions::default()).unwrap();
    let moves = |operation, key: &str, bytes, priority| {
        let object = agent.object("s", key).unwrap();
        let pairs = [(memory.descriptor(0, bytes), object.descriptor(0, bytes))];
        let options = RequestOptions {
            priority,
            ..RequestOptions::default()
        };
        agent
            .transfer(operation, &pairs, Side::Local, options)
            .unwrap()
    };
    moves(Operation::Write, "wanted", 4096, Priority::Normal)
        .wait(WAIT)
        .unwrap();
    overtakes("a store", || {
        let offload = |number| {
            let key = format!("offload-{number}");
            moves(Operation::Write, &key, ONE_PART, Priority::Background)
        };
        let offloads: Vec<_> = (0..16).map(offload).collect();
        // All of them stand in line then.
        offloads[0].wait(WAIT).unwrap();
        (
            offloads,
            moves(Operation::Read, "wanted", 4096, Priority::Normal),
        )
    });
}

/// Eight requests of 1 MiB at 16 MiB a second cannot all be done before 7 of them are paid for, by any way; without the
/// limit, and for what is not limited, they can.
#[test]
fn a_rate_holds_back_what_it_is_for_and_nothing_else() {
    const RATE: u64 = 16 << 20;
    for way in [Way::Memcpy, Way::Shm, Way::Tcp] {
        let pair = Pair::new(way, 8 << 20);
        let data = pattern(8 << 20, 12);
        pair.remote.write_at(0, &data).unwrap();
        let read = |priority| {
            let options = RequestOptions {
                priority,
                ..RequestOptions::default()
            };
            pair.moves(Operation::Read, &[(0, 0, 8 << 20)], options)
        };
        let (limited, free) = (Priority::Background, Priority::Normal);
        pair.initiator.set_rate(limited, Some(RATE)).unwrap();
        let slow = read(limited);
        read(free).wait(WAIT).unwrap();
        slow.wait(WAIT).unwrap();
        // It was saved for 50 ms at most, and one piece goes on credit.
        let least = Duration::from_secs_f64((8.0 - 1.0) / 16.0 - 0.05);
        assert!(slow.telemetry().unwrap().transfer >= least, "{way:?}");
        assert!(contents(&pair.local) == data);
        pair.initiator.set_rate(limited, None).unwrap();
        pair.initiator
            .set_peer_rate(&pair.peer, Some(RATE))
            .unwrap();
        let slow = read(free);
        slow.wait(WAIT).unwrap();
        assert!(slow.telemetry().unwrap().transfer >= least, "{way:?}");
        pair.initiator.set_peer_rate(&pair.peer, None).unwrap();
    }
    let agent = Way::Memcpy.agent("limits");
    let refused = agent.set_rate(Priority::Normal, Some(0)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
}

/// Given up while most of it waits for its rate: it is settled, and nothing of it moves any more.
#[test]
fn what_waits_for_its_rate_can_be_given_up() {
    let pair = Pair::new(Way::Shm, 8 << 20);
    pair.initiator.set_rate(Priority::Normal, Some(1)).unwrap();
    let places = [(0, 0, 8 << 20)];
    let request = pair.moves(Operation::Read, &places, RequestOptions::default());
    assert!(matches!(request.poll(), Status::InFlight));
    request.cancel();
    assert_eq!(request.wait(WAIT).unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(request.wait_drained(WAIT));
    let late = RequestOptions {
        deadline: Some(Duration::from_millis(20)),
        ..RequestOptions::default()
    };
    let late = pair.moves(Operation::Read, &places, late);
    assert_eq!(late.wait(WAIT).unwrap_err().kind(), ErrorKind::Timeout);
    assert!(late.wait_drained(WAIT));
    // One that nobody waits for any more, when the agent goes.
    let lost = pair.moves(Operation::Read, &places, RequestOptions::default());
    drop((pair.initiator, request, late, lost));
    pair.local.deregister().wait(WAIT).unwrap();
}
