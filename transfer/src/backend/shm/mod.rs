//! Shared memory: a peer of this host hands over the memory of its regions once, and copies are plain copies.
//!
//! The memory travels as a sealed memfd over the Unix socket between the two (`backend/unix`).

mod peer_region;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};
use rustix::fs::{Mode, OFlags};

use super::Fabric;
use super::copy::{Copier, Go, Place, Progress, copy_plan};
use super::unix::{self, Access, Held, Link, Outcome, corrupt};
use crate::agent::{Exports, RemoteRegion};
use crate::plan::Plan;
use crate::reactor::Reactor;
use crate::region::RegionCore;
use crate::sys::memory::Mapping;

/// The way through mapped memory.
struct Shm;

/// Starts to serve shared memory.
pub(crate) fn fabric(
    exports: &Arc<Exports>,
    reactor: &Arc<Reactor>,
    copier: Arc<Copier>,
) -> Result<Arc<dyn Fabric>> {
    unix::fabric(Shm, exports, reactor, copier)
}

impl Access for Shm {
    const NAME: &'static str = "shm";

    // A peer that has a region mapped keeps the pages, whatever this process does.
    const IN_PLACE: bool = false;

    type Peer = ();

    type Memory = Mapping;

    fn welcome(&self) -> Outcome {
        Outcome::Done
    }

    /// The memory of a region: a descriptor that allows no more than the region does.
    fn grant(&self, region: &RegionCore, _process: i32) -> Result<(Outcome, Option<OwnedFd>)> {
        let Some(file) = region.host().and_then(|memory| memory.shared_file()) else {
            let text = format!("region {} is not in shared memory", region.id());
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let writable = region.options().remote_write;
        let file = if writable {
            file.try_clone()
                .map_err(|e| Error::io("clone a descriptor", e))
        } else {
            read_only(file)
        }?;
        let bytes = region.bytes();
        Ok((Outcome::Granted { bytes, writable }, Some(file)))
    }

    fn meet(_link: &Link, welcome: Outcome) -> Result<()> {
        match welcome {
            Outcome::Done => Ok(()),
            _ => Err(corrupt("a greeting is answered by something else")),
        }
    }

    fn accept(
        &self,
        remote: &RemoteRegion,
        (outcome, file): (Outcome, Option<OwnedFd>),
        _piece: &mut dyn FnMut(u32) -> Result<(Outcome, Option<OwnedFd>)>,
    ) -> Result<Mapping> {
        let Outcome::Granted { bytes, writable } = outcome else {
            return Err(corrupt("a map is answered without memory"));
        };
        let Some(file) = file else {
            return Err(corrupt("memory is granted without a descriptor"));
        };
        peer_region::map(&file, bytes, writable, remote)
    }

    fn reaches(region: &RemoteRegion) -> Result<(), String> {
        if region.shareable {
            return Ok(());
        }
        Err(format!("region {} is not in shared memory", region.id))
    }

    fn copy(
        _peer: &(),
        plan: &Plan,
        memory: &[Arc<Held<Self>>],
        place: &mut Place,
        go_on: &dyn Fn() -> Result<Go>,
    ) -> Result<Progress> {
        copy_plan(plan, place, go_on, |remote| {
            memory[remote as usize].memory()
        })
    }

    fn detail(link: &Link) -> String {
        format!("memory mapped from process {} of this host", link.pid())
    }
}

/// Opens shared memory again, for reading only.
fn read_only(file: &OwnedFd) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| Error::io(format!("open {path} read-only"), e.into()))
}
