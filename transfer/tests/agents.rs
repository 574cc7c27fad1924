//! Two agents of one process, over each way that connects them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, HostMemory, MemoryFate, Operation, RegionOptions, RequestOptions, Side, Status,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use support::{OPEN, Pair, WAIT, WAYS, Way, contents, loopback, pattern};

fn options() -> RequestOptions {
    RequestOptions::default()
}

fn notifying(text: &'static str) -> RequestOptions {
    RequestOptions {
        notification: Some(Bytes::from_static(text.as_bytes())),
        ..options()
    }
}

/// A megabyte and a bit goes over and comes back, over each way; the report and the statistics name the way.
#[test]
fn bytes_written_to_a_peer_are_read_back_from_it() {
    for way in WAYS {
        let len = (1 << 20) + 4097;
        let pair = Pair::new(way, len);
        let data = pattern(len as usize, 7);
        pair.local.write_at(0, &data).unwrap();
        let done = pair
            .moves(Operation::Write, &[(0, 0, len)], options())
            .wait(WAIT)
            .unwrap();
        assert_eq!((done.backend, done.bytes), (way.name(), len));
        assert_eq!(contents(&pair.remote), data, "{way:?}");
        pair.local.fill_at(0, len, 0).unwrap();
        pair.moves(Operation::Read, &[(0, 0, len)], options())
            .wait(WAIT)
            .unwrap();
        assert_eq!(contents(&pair.local), data, "{way:?}");
        assert_eq!(
            pair.local.checksum(0, len).unwrap(),
            pair.remote.checksum(0, len).unwrap()
        );
        assert_eq!(pair.initiator.path_to(&pair.peer).backend, Some(way.name()));
        let stats = pair.initiator.stats().backends[way.name()];
        assert_eq!((stats.bytes_written, stats.bytes_read), (len, len));
        assert_eq!((stats.requests, stats.failures), (2, 0));
    }
}

/// 4 KiB blocks in an order of their own on each side, more of them than one frame names.
#[test]
fn scattered_blocks_land_where_the_descriptors_say() {
    const BLOCK: u64 = 4096;
    const BLOCKS: u64 = 3000;
    for way in WAYS {
        let pair = Pair::new(way, BLOCK * BLOCKS);
        let data = pattern((BLOCK * BLOCKS) as usize, 3);
        pair.local.write_at(0, &data).unwrap();
        // 7 and 11 have no factor in common with 3000, so both orders visit every block once.
        let pairs: Vec<_> = (0..BLOCKS)
            .map(|n| (n * 7 % BLOCKS * BLOCK, n * 11 % BLOCKS * BLOCK, BLOCK))
            .collect();
        pair.moves(Operation::Write, &pairs, options())
            .wait(WAIT)
            .unwrap();
        let moved = contents(&pair.remote);
        for (from, to, len) in pairs {
            let (from, to, len) = (from as usize, to as usize, len as usize);
            assert!(
                data[from..from + len] == moved[to..to + len],
                "{way:?} {from} → {to}"
            );
        }
    }
}

/// The notification is taken from the inbox first, then the data is looked at: it must be there. Small writes
/// carry it along, large writes and reads send it after.
#[test]
fn a_notification_arrives_after_its_data() {
    for way in WAYS {
        for len in [64, 5 << 20] {
            let pair = Pair::new(way, len);
            let data = pattern(len as usize, 11);
            pair.local.write_at(0, &data).unwrap();
            let write = pair.moves(Operation::Write, &[(0, 0, len)], notifying("written"));
            let arrived = pair.target.wait_notifications(WAIT);
            assert_eq!(arrived.len(), 1, "{way:?}");
            assert_eq!(
                (&*arrived[0].peer, &arrived[0].bytes[..]),
                ("initiator", &b"written"[..])
            );
            assert!(contents(&pair.remote) == data, "{way:?} {len}");
            write.wait(WAIT).unwrap();
            let read = pair.moves(Operation::Read, &[(0, 0, len)], notifying("read"));
            assert_eq!(pair.target.wait_notifications(WAIT)[0].bytes, "read");
            read.wait(WAIT).unwrap();
        }
    }
}

/// An inbox takes 8 MiB; the sender of more waits, which the target counts, until somebody takes them.
#[test]
fn a_full_inbox_holds_back_and_counts() {
    for way in WAYS {
        let pair = Pair::new(way, 64);
        let large = Bytes::from(vec![1; 64 << 10]);
        let notify = || pair.initiator.notify(&pair.peer, large.clone()).unwrap();
        for _ in 0..128 {
            notify().wait(WAIT).unwrap();
        }
        let waiting = notify();
        while pair.target.stats().notifications_held_back == 0 {
            std::thread::yield_now();
        }
        assert!(matches!(waiting.poll(), Status::InFlight), "{way:?}");
        assert_eq!(pair.target.notifications().len(), 128);
        waiting.wait(WAIT).unwrap();
        assert_eq!(pair.target.notifications().len(), 1);
        let stats = pair.target.stats();
        assert_eq!(stats.notifications_held_back, 1, "{way:?}");
        assert_eq!(stats.notifications_refused, 0);
    }
}

/// Who waits for room hears of it when the agent that has none goes, or is forgotten.
#[test]
fn who_waits_for_room_is_told_of_the_end() {
    for way in WAYS {
        for forgotten in [false, true] {
            let Pair {
                initiator,
                target,
                peer,
                remote,
                ..
            } = Pair::new(way, 64);
            let large = Bytes::from(vec![1; 64 << 10]);
            let notify = || initiator.notify(&peer, large.clone()).unwrap();
            for _ in 0..128 {
                notify().wait(WAIT).unwrap();
            }
            let waiting = notify();
            while target.stats().notifications_held_back == 0 {
                std::thread::yield_now();
            }
            if forgotten {
                initiator.forget_peer(&peer);
            } else {
                drop((target, remote));
            }
            let lost = waiting.wait(WAIT).unwrap_err();
            assert_eq!(lost.kind(), ErrorKind::PeerLost, "{way:?}");
            assert!(waiting.wait_drained(WAIT));
        }
    }
}

/// A request is posted again and again with new data; positions choose descriptors of both lists.
#[test]
fn a_prepared_request_is_reused_and_positions_choose() {
    for way in WAYS {
        let pair = Pair::new(way, 4096);
        let blocks: Vec<_> = (0..4).map(|n| n * 1024).collect();
        let descriptors = |region: &kvfabric_transfer::Region| -> Vec<_> {
            blocks
                .iter()
                .map(|&offset| region.descriptor(offset, 1024))
                .collect()
        };
        let local = pair
            .initiator
            .prepare(Side::Local, &descriptors(&pair.local))
            .unwrap();
        let remote = pair
            .initiator
            .prepare(Side::Peer(&pair.peer), &descriptors(&pair.remote))
            .unwrap();
        let positions = Some((vec![0, 3], vec![2, 1]));
        let chosen = RequestOptions {
            positions,
            ..options()
        };
        let request = pair
            .initiator
            .request(Operation::Write, &local, &remote, chosen)
            .unwrap();
        assert!(matches!(request.poll(), Status::Idle));
        assert_eq!(request.bytes(), 2048);
        for round in 1..5 {
            let data = pattern(4096, round);
            pair.local.write_at(0, &data).unwrap();
            request.post().unwrap();
            request.wait(WAIT).unwrap();
            let moved = contents(&pair.remote);
            assert!(moved[2048..3072] == data[..1024], "{way:?}");
            assert!(moved[1024..2048] == data[3072..], "{way:?}");
            assert!(moved[..1024].iter().all(|&byte| byte == 0), "{way:?}");
        }
        let outside = RequestOptions {
            positions: Some((vec![4], vec![0])),
            ..options()
        };
        let refused = pair
            .initiator
            .request(Operation::Write, &local, &remote, outside);
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
    }
}

/// A region exported for reading refuses writes, by what the metadata says and without asking the peer.
#[test]
fn writing_to_a_read_only_export_is_refused() {
    for way in WAYS {
        let read_only = RegionOptions {
            remote_read: true,
            remote_write: false,
        };
        let pair = Pair::with_options(way, 4096, read_only);
        let (local, remote) = (pair.local.descriptor(0, 64), pair.remote.descriptor(0, 64));
        let side = Side::Peer(&pair.peer);
        let refused =
            pair.initiator
                .transfer(Operation::Write, &[(local, remote)], side, options());
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Denied);
        pair.moves(Operation::Read, &[(0, 0, 64)], options())
            .wait(WAIT)
            .unwrap();
    }
}

/// The owner deregisters: it waits for its peers (which unmap, where memory is shared), and later requests of
/// theirs are refused, new ones and prepared ones.
#[test]
fn a_deregistered_region_is_refused_to_peers() {
    for way in WAYS {
        let pair = Pair::new(way, 4096);
        let request = pair.moves(Operation::Read, &[(0, 0, 4096)], options());
        request.wait(WAIT).unwrap();
        pair.remote.deregister().wait(WAIT).unwrap();
        let again = request.post().map_err(|error| error.kind());
        let outcome = again.and_then(|()| request.wait(WAIT).map_err(|error| error.kind()));
        let kind = outcome.unwrap_err();
        assert!(
            matches!(kind, ErrorKind::Denied | ErrorKind::NotFound),
            "{way:?} {kind}"
        );
        // What the initiator is told after a new exchange of metadata.
        pair.initiator.load_peer(&pair.target.metadata()).unwrap();
        let remote = pair.remote.descriptor(0, 64);
        let unknown = pair.initiator.prepare(Side::Peer(&pair.peer), &[remote]);
        assert_eq!(unknown.unwrap_err().kind(), ErrorKind::NotFound);
    }
}

/// The initiator's own region: requests over it are refused from the moment it is deregistered.
#[test]
fn a_request_over_a_deregistered_local_region_is_refused() {
    for way in WAYS {
        let pair = Pair::new(way, 4096);
        let request = pair.moves(Operation::Write, &[(0, 0, 4096)], options());
        request.wait(WAIT).unwrap();
        pair.local.deregister().wait(WAIT).unwrap();
        assert_eq!(request.post().unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(
            pair.local.read_at(0, &mut [0]).unwrap_err().kind(),
            ErrorKind::NotFound
        );
    }
}

/// An allow list names who may connect; the refused one learns why.
#[test]
fn an_agent_that_is_not_allowed_is_refused() {
    for way in WAYS {
        let target = way
            .builder("target")
            .allow_peers(["friend"])
            .build()
            .unwrap();
        target
            .register(HostMemory::shared(64).unwrap(), OPEN)
            .map(std::mem::forget)
            .unwrap();
        let stranger = way.agent("stranger");
        let peer = stranger.load_peer(&target.metadata()).unwrap();
        let path = stranger.path_to(&peer);
        assert_eq!(path.backend, None);
        assert!(path.refused[0].1.contains("allow list"), "{path:?}");
        let friend = way.agent("friend");
        let peer = friend.load_peer(&target.metadata()).unwrap();
        assert_eq!(friend.path_to(&peer).backend, Some(way.name()));
    }
}

/// Private memory can't be mapped, so the same peer is reached another way for it, and the reports say which and why.
#[test]
fn each_region_gets_the_fastest_way_that_reaches_it() {
    for (cma, way) in [(true, "cma"), (false, "tcp")] {
        let build = |name| {
            let builder = Agent::builder(name).memcpy(false).tcp(Some(loopback()));
            builder.cma(cma).build().unwrap()
        };
        let (initiator, target) = (build("initiator"), build("target"));
        let shared = target
            .register(HostMemory::shared(4096).unwrap(), OPEN)
            .unwrap();
        let own = initiator
            .register(HostMemory::anonymous(4096).unwrap(), options_closed())
            .unwrap();
        let peer = initiator.load_peer(&target.metadata()).unwrap();
        assert_eq!(initiator.path_to(&peer).backend, Some("shm"));
        let private = target
            .register(HostMemory::anonymous(4096).unwrap(), OPEN)
            .unwrap();
        let peer = initiator.load_peer(&target.metadata()).unwrap();
        for (region, way) in [(&shared, "shm"), (&private, way), (&shared, "shm")] {
            let pair = (own.descriptor(0, 64), region.descriptor(0, 64));
            let request = initiator
                .transfer(Operation::Read, &[pair], Side::Peer(&peer), options())
                .unwrap();
            assert_eq!(request.wait(WAIT).unwrap().backend, way);
            let report = initiator.path_to_region(&peer, region.id()).unwrap();
            assert_eq!(report.backend, Some(way));
        }
        // Together they are reached by a way that reaches both.
        let report = initiator.path_to(&peer);
        assert_eq!(report.backend, Some(way));
        let (name, reason) = &report.refused[0];
        assert_eq!(*name, "shm");
        assert!(reason.contains(&private.id().to_string()), "{reason}");
        let unknown = initiator.path_to_region(&peer, own.id()).unwrap_err();
        assert_eq!(unknown.kind(), ErrorKind::NotFound);
    }
}

/// Memory that its owner made and maps itself: a peer maps it too, and reads what the owner wrote without asking anybody.
#[test]
fn shared_memory_of_another_owner_is_reached_as_shared() {
    let file = sealed(4096, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL);
    let build = |name| Agent::builder(name).memcpy(false).build().unwrap();
    let (initiator, target) = (build("initiator"), build("target"));
    let memory = HostMemory::of_file(file.try_clone().unwrap()).unwrap();
    assert!(memory.is_shareable());
    let region = target.register(memory, OPEN).unwrap();
    let own = initiator
        .register(HostMemory::anonymous(4096).unwrap(), options_closed())
        .unwrap();
    let peer = initiator.load_peer(&target.metadata()).unwrap();
    rustix::io::pwrite(&file, b"written by its owner", 64).unwrap();
    let pair = (own.descriptor(0, 20), region.descriptor(64, 20));
    let request = initiator
        .transfer(Operation::Read, &[pair], Side::Peer(&peer), options())
        .unwrap();
    assert_eq!(request.wait(WAIT).unwrap().backend, "shm");
    let mut read = [0; 20];
    own.read_at(0, &mut read).unwrap();
    assert_eq!(&read, b"written by its owner");
}

/// Its owner could cut such memory away under everybody who maps it.
#[test]
fn shared_memory_whose_size_may_change_is_refused() {
    for seals in [
        SealFlags::GROW | SealFlags::SEAL,
        SealFlags::SHRINK | SealFlags::SEAL,
        SealFlags::SHRINK | SealFlags::GROW,
    ] {
        let refused = HostMemory::of_file(sealed(4096, seals)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid, "{seals:?}");
    }
    let plain = std::fs::File::open("/proc/self/exe").unwrap();
    let refused = HostMemory::of_file(plain.into()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
}

fn sealed(bytes: u64, seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("test", flags).unwrap();
    ftruncate(&file, bytes).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file
}

fn options_closed() -> RegionOptions {
    RegionOptions::default()
}

/// A peer that restarts under its name is reached again once its new metadata is loaded; what was prepared for
/// its former life is refused.
#[test]
fn a_restarted_peer_is_reached_anew() {
    for way in WAYS {
        let Pair {
            initiator,
            target,
            local,
            remote,
            peer,
        } = Pair::new(way, 4096);
        let side = Side::Peer(&peer);
        let pair = (local.descriptor(0, 64), remote.descriptor(0, 64));
        let before = initiator
            .transfer(Operation::Read, &[pair], side, options())
            .unwrap();
        before.wait(WAIT).unwrap();
        drop((target, remote));
        let target = way.agent("target");
        let remote = target
            .register(HostMemory::shared(4096).unwrap(), OPEN)
            .unwrap();
        let peer = initiator.load_peer(&target.metadata()).unwrap();
        let pair = (local.descriptor(0, 64), remote.descriptor(0, 64));
        let after = initiator.transfer(Operation::Read, &[pair], Side::Peer(&peer), options());
        assert_eq!(after.unwrap().wait(WAIT).unwrap().bytes, 64);
        let stale = before.post().map_err(|error| error.kind());
        assert!(stale.is_err() || before.wait(WAIT).is_err(), "{way:?}");
    }
}

/// Futures resolve without an executor's help from the agent; dropping the request is fine.
#[test]
fn completion_is_a_future() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    for way in WAYS {
        let pair = Pair::new(way, 3 << 20);
        let request = pair.moves(Operation::Write, &[(0, 0, 3 << 20)], notifying("over"));
        let done = runtime.block_on(async {
            tokio::time::timeout(WAIT, request.completion())
                .await
                .unwrap()
        });
        assert_eq!(done.unwrap().bytes, 3 << 20);
        runtime.block_on(async {
            tokio::time::timeout(WAIT, pair.target.notified())
                .await
                .unwrap();
            tokio::time::timeout(WAIT, request.drained()).await.unwrap();
        });
        assert_eq!(pair.target.notifications()[0].bytes, "over");
    }
}

/// Regions of one agent are copied without a peer, also onto themselves with an overlap.
#[test]
fn regions_of_one_agent_are_copied() {
    let agent = Way::Memcpy.agent("alone");
    let region = agent
        .register(HostMemory::anonymous(4096).unwrap(), options_closed())
        .unwrap();
    let data = pattern(4096, 5);
    region.write_at(0, &data).unwrap();
    let pair = (region.descriptor(0, 2048), region.descriptor(1024, 2048));
    let done = agent
        .transfer(Operation::Write, &[pair], Side::Local, options())
        .unwrap();
    assert_eq!(done.wait(WAIT).unwrap().backend, "memcpy");
    assert!(contents(&region)[1024..3072] == data[..2048]);
    let notified = agent.transfer(Operation::Write, &[pair], Side::Local, notifying("nobody"));
    assert_eq!(notified.unwrap_err().kind(), ErrorKind::Invalid);
}

/// Descriptors without bytes, outside the region, of unknown regions, and lists that don't pair.
#[test]
fn bad_descriptors_are_refused_with_their_position() {
    let pair = Pair::new(Way::Memcpy, 4096);
    let good = pair.local.descriptor(0, 64);
    for (offset, len) in [(0, 0), (4096, 1), (u64::MAX, 2), (0, u64::MAX)] {
        let list = [good, pair.local.descriptor(offset, len)];
        let error = pair.initiator.prepare(Side::Local, &list).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("descriptor 1"), "{error}");
    }
    let error = pair
        .initiator
        .prepare(Side::Local, &[pair.remote.descriptor(0, 1)])
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let uneven = [(pair.local.descriptor(0, 64), pair.remote.descriptor(0, 65))];
    let side = Side::Peer(&pair.peer);
    let error = pair
        .initiator
        .transfer(Operation::Read, &uneven, side, options())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

/// The wait says so at once, and nothing is in use.
#[test]
fn a_request_that_was_not_posted_has_no_outcome() {
    let pair = Pair::new(Way::Memcpy, 64);
    let list = pair
        .initiator
        .prepare(Side::Local, &[pair.local.descriptor(0, 64)])
        .unwrap();
    let request = pair
        .initiator
        .request(Operation::Read, &list, &list, options())
        .unwrap();
    let error = request.wait(Duration::ZERO).unwrap_err();
    assert_eq!(
        (error.kind(), error.fate()),
        (ErrorKind::Invalid, MemoryFate::Settled)
    );
    assert!(request.wait_drained(Duration::ZERO));
}
