//! Copies between two regions of this process, as if one were a peer's.

use std::cell::Cell;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::backend::abandoned;
use crate::descriptor::Target;
use crate::metadata::{RemoteKind, RemoteRegion};
use crate::plan::Extent;
use crate::region::{Body, RegionOptions};
use crate::sys::memory::HostMemory;

const BYTES: u64 = 8 << 20;

/// A socket whose other end, gone by now, was this process's.
fn link() -> Arc<Link> {
    let (reactor, thread) = Reactor::start().unwrap();
    let kind = SocketType::SEQPACKET;
    let (end, _other) = socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    let link = Arc::new(Link::new(end, &reactor).unwrap());
    reactor.close();
    thread.join().unwrap();
    link
}

/// Two regions, and all that it takes to copy between them.
struct Bench {
    local: Arc<RegionCore>,
    peer: Arc<RegionCore>,
    process: PeerProcess,
    held: Arc<Held<Cma>>,
    _word: Mapping,
}

impl Bench {
    fn new() -> Self {
        let region = || {
            let memory = HostMemory::anonymous(BYTES).unwrap();
            let options = RegionOptions {
                remote_read: true,
                remote_write: true,
            };
            Arc::new(RegionCore::new(Body::Host(memory), options).unwrap())
        };
        let (local, peer) = (region(), region());
        let link = link();
        let word = Mapping::anonymous(NONCE_BYTES as u64).unwrap();
        word.write(0, &[5; NONCE_BYTES]).unwrap();
        let process = PeerProcess::meet(link.pid(), word.address(), [5; NONCE_BYTES]).unwrap();
        let window = Window {
            address: peer.mapping().unwrap().address(),
            bytes: BYTES,
            writable: true,
        };
        Self {
            held: Arc::new(Held::new(peer.id(), window, &link)),
            local,
            peer,
            process,
            _word: word,
        }
    }

    fn plan(&self, operation: Operation, extents: &[(u64, u64, u64)]) -> Plan {
        let remote = RemoteRegion {
            secret: self.peer.secret(),
            id: self.peer.id(),
            key: self.peer.key(),
            bytes: BYTES,
            kind: RemoteKind::Host,
            readable: true,
            writable: true,
            shareable: false,
        };
        let extents: Vec<_> = extents
            .iter()
            .map(|&(local_offset, remote_offset, len)| Extent {
                local: 0,
                remote: 0,
                local_offset,
                remote_offset,
                len,
            })
            .collect();
        Plan {
            operation,
            local: Arc::from([Target::Local(self.local.clone())]),
            remote: Arc::from([Target::Remote(Arc::new(remote))]),
            bytes: extents.iter().map(|extent| extent.len).sum(),
            descriptors: extents.len() as u32,
            extents,
            ..Plan::empty()
        }
    }

    fn copy(&self, plan: &Plan, go_on: &dyn Fn() -> Result<Go>) -> Result<Progress> {
        let (memory, place) = (std::slice::from_ref(&self.held), &mut Place::default());
        Cma::copy(&self.process, plan, memory, place, go_on)
    }

    /// Where the bytes of an operation come from, and where they go.
    fn ends(&self, operation: Operation) -> (&Mapping, &Mapping) {
        let (local, peer) = (self.local.mapping().unwrap(), self.peer.mapping().unwrap());
        match operation {
            Operation::Read => (peer, local),
            Operation::Write => (local, peer),
        }
    }
}

/// Whoever gives up is asked before each step, and nothing lands after the answer; one large range, and ranges that
/// straddle the steps.
#[test]
fn a_copy_that_is_called_off_stops_before_the_next_step() {
    let bench = Bench::new();
    let odd = 700_000;
    let whole = vec![(0, 0, BYTES)];
    let cut: Vec<_> = (0..BYTES / odd).map(|n| (n * odd, n * odd, odd)).collect();
    for operation in [Operation::Read, Operation::Write] {
        for extents in [&whole, &cut] {
            let plan = bench.plan(operation, extents);
            for steps in [0, 1, 3] {
                let (from, to) = bench.ends(operation);
                from.fill(0, BYTES, 1).unwrap();
                to.fill(0, BYTES, 0).unwrap();
                let left = Cell::new(steps);
                let go_on = || {
                    left.set(left.get() - 1);
                    if left.get() < 0 {
                        Err(abandoned())
                    } else {
                        Ok(Go::On)
                    }
                };
                let error = bench.copy(&plan, &go_on).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Cancelled);
                let moved = steps as usize * STEP_BYTES as usize;
                let mut found = vec![0; BYTES as usize];
                to.read(0, &mut found).unwrap();
                assert!(found[..moved].iter().all(|&byte| byte == 1), "{steps}");
                assert!(found[moved..].iter().all(|&byte| byte == 0), "{steps}");
            }
        }
    }
}

/// More ranges than one call carries, of odd lengths, some longer than a step.
#[test]
fn a_copy_goes_on_until_all_is_moved() {
    let bench = Bench::new();
    let mut extents = Vec::new();
    let mut at = 0;
    for n in 0..2000_u64 {
        let len = if n % 900 == 17 {
            1_300_001
        } else {
            1 + n % 1000
        };
        extents.push((at, BYTES - at - len, len));
        at += len;
    }
    assert!(at < BYTES);
    for operation in [Operation::Read, Operation::Write] {
        let plan = bench.plan(operation, &extents);
        let (from, to) = bench.ends(operation);
        let data: Vec<u8> = (0..BYTES).map(|n| (n * n % 253) as u8).collect();
        from.write(0, &data).unwrap();
        to.fill(0, BYTES, 0).unwrap();
        bench.copy(&plan, &|| Ok(Go::On)).unwrap();
        let mut model = vec![0; BYTES as usize];
        for &(local, remote, len) in &extents {
            let (source, target) = match operation {
                Operation::Read => (remote, local),
                Operation::Write => (local, remote),
            };
            let (source, target, len) = (source as usize, target as usize, len as usize);
            model[target..target + len].copy_from_slice(&data[source..source + len]);
        }
        let mut found = vec![0; BYTES as usize];
        to.read(0, &mut found).unwrap();
        assert!(found == model, "{operation:?}");
    }
}

/// Part of the peer's memory is gone under a copy that was allowed: an error that says where, not a success.
#[test]
fn memory_that_is_not_there_fails_the_copy() {
    let bench = Bench::new();
    let window = Window {
        address: 1 << 47,
        bytes: BYTES,
        writable: true,
    };
    let gone = Arc::new(Held::<Cma>::new(bench.peer.id(), window, &link()));
    for operation in [Operation::Read, Operation::Write] {
        let plan = bench.plan(operation, &[(0, 4096, 4096)]);
        let (memory, place) = (std::slice::from_ref(&gone), &mut Place::default());
        let error = Cma::copy(&bench.process, &plan, memory, place, &|| Ok(Go::On)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("4096 bytes at 4096"), "{error}");
    }
}
