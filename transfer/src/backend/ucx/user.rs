//! A peer that uses memory of ours.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::frame::{Origin, Session};
use crate::agent::Door;
use crate::backend::direct::Landing;
use crate::metadata::HostId;
use crate::region::{RegionCore, RegionId};
use crate::sys::ucx::EndpointId;

/// What proves that a peer that says nothing any more uses no memory of ours.
pub(super) enum Proof {
    /// The end of the endpoint: what the peer reads or writes comes in by it.
    Endpoint,
    /// The death of the process, which may copy with system calls of its own.
    Process(OwnedFd),
    /// Nothing while this process runs: the peer is part of it, or cannot be watched.
    None,
}

impl Proof {
    /// For a peer that says it lives there.
    pub(super) fn of(origin: &Origin, host: HostId, namespace: u64) -> Self {
        if origin.host != host || origin.namespace != namespace {
            return Self::Endpoint;
        }
        if origin.pid == std::process::id() {
            return Self::None;
        }
        let pid = i32::try_from(origin.pid).ok().and_then(Pid::from_raw);
        let process = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::NONBLOCK).ok());
        process.map_or(Self::None, Self::Process)
    }
}

/// The number of the process namespace that this process lives in.
pub(super) fn own_namespace() -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self/ns/pid").map_or(0, |found| found.ino())
}

pub(super) struct User {
    pub(super) endpoint: EndpointId,
    /// What it calls itself to us.
    pub(super) session: Session,
    pub(super) name: Arc<str>,
    /// By which its notifications come.
    pub(super) door: Door,
    /// What it may use, with the region that waits for it, if that is being deregistered.
    pub(super) used: HashMap<RegionId, Option<Arc<RegionCore>>>,
    /// What of it is memory of GPUs that it may write.
    pub(super) landing: Landing,
    pub(super) proof: Proof,
    /// The endpoint is closed.
    pub(super) is_cut_off: bool,
}

impl User {
    /// It says that it uses a region no more.
    pub(super) fn let_go(&mut self, region: RegionId) {
        if let Some(Some(region)) = self.used.remove(&region) {
            region.leave();
        }
    }

    /// It uses nothing any more, by proof.
    pub(super) fn bury(&mut self) {
        for region in std::mem::take(&mut self.used).into_values().flatten() {
            region.leave();
        }
    }

    /// Its process, if someone waits for memory that it uses: UCX can take half a minute to notice a death.
    pub(super) fn death(&self) -> Option<BorrowedFd<'_>> {
        let is_waited_for = self.is_cut_off || self.used.values().any(Option::is_some);
        match &self.proof {
            Proof::Process(process) if is_waited_for => Some(process.as_fd()),
            _ => None,
        }
    }
}

/// Whether a process that is watched has died.
pub(super) fn is_dead(process: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut polled, Some(&at_once)).is_ok_and(|count| count > 0)
}
