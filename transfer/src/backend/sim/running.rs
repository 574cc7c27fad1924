//! A job on its way through the simulated network.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use crate::agent::{Door, Exports};
use crate::backend::copy::{Go, Place, copy_plan};
use crate::backend::{Job, Operation};
use crate::descriptor::Target;
use crate::region::RegionUse;
use crate::sys::memory::Mapping;

/// A job on its way.
pub(super) struct Running {
    pub(super) job: Job,
    /// By position in the plan's remote side.
    pub(super) remote: Vec<RegionUse>,
    /// Where each extent starts in the transfer.
    pub(super) starts: Vec<u64>,
    pub(super) channel: u64,
    pub(super) from: Arc<str>,
    pub(super) peer: Arc<Exports>,
    pub(super) failure: Option<Error>,
    /// Its notification has come, and the inbox had no room for it.
    pub(super) is_unheard: bool,
    pub(super) door: Door,
    pub(super) cancelled: bool,
}

impl Running {
    /// Copies bytes `offset..offset + len` of the transfer, and spoils one bit if asked to.
    pub(super) fn land(&self, offset: u64, len: u64, corruption: Option<u64>) -> Result<()> {
        let plan = self.job.plan();
        if plan.sums {
            return Ok(());
        }
        let wrong = corruption.map(|random| (offset + random / 8 % len, random % 8));
        let mut done = offset;
        let end = offset + len;
        while done < end {
            let position = self.starts.partition_point(|start| *start <= done) - 1;
            let extent = &plan.extents[position];
            let within = done - self.starts[position];
            let count = (extent.len - within).min(end - done);
            let Target::Local(local) = &plan.local[extent.local as usize] else {
                return Err(Error::new(
                    ErrorKind::Internal,
                    "a local side names a peer's memory",
                ));
            };
            let local = (local.mapping()?, extent.local_offset + within);
            let remote = self.remote[extent.remote as usize].region().mapping()?;
            let remote = (remote, extent.remote_offset + within);
            let (from, to) = match plan.operation {
                Operation::Read => (remote, local),
                Operation::Write => (local, remote),
            };
            Mapping::copy(from.0, from.1, to.0, to.1, count)?;
            if let Some((byte, bit)) = wrong
                && (done..done + count).contains(&byte)
            {
                let place = to.1 + (byte - done);
                let mut value = [0];
                to.0.read(place, &mut value)?;
                to.0.write(place, &[value[0] ^ (1 << bit)])?;
            }
            done += count;
        }
        Ok(())
    }

    /// The notification is there. Without room for it the job waits, once the network has done with it.
    pub(super) fn notify(&mut self) {
        if let Some(bytes) = self.job.notification() {
            let taken = self.peer.inbox().try_deliver(&self.from, bytes.clone());
            self.is_unheard = taken.is_err();
        }
    }

    /// Checksums are taken when the answer is there: the network damages blocks, not them.
    fn sum(&self) -> Result<()> {
        let (place, go_on) = (&mut Place::default(), || Ok(Go::On));
        let copied = copy_plan(self.job.plan(), place, &go_on, |remote| {
            self.remote[remote as usize].region().mapping()
        });
        copied.map(drop)
    }

    pub(super) fn finish(&mut self, failure: Option<ErrorKind>, free: bool) {
        let Some(kind) = failure else {
            if self.job.plan().sums
                && let Err(error) = self.sum()
            {
                self.failure.get_or_insert(error);
            }
            return;
        };
        let peer = self.peer.name();
        let error = match kind {
            ErrorKind::PeerLost => format!("agent {peer:?} does not answer"),
            kind => format!("simulated transfer with agent {peer:?} ended: {kind}"),
        };
        self.failure.get_or_insert(Error::new(kind, error));
        // Whoever asked learns of it now; the memory follows when the network has let go of it.
        if let Some(error) = self.failure.as_ref().filter(|_| !free) {
            self.job.report(Error::new(error.kind(), error.to_string()));
        }
    }
}
