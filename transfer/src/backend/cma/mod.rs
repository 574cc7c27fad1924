//! Cross-memory attach: memory of a process of this host that cannot be mapped, such as an engine's own, is read and
//! written with `process_vm_readv` and `process_vm_writev`, in one copy, on the threads that copy.
//!
//! Who may: the owner hands out where a region is, by key, over the Unix socket between the two (`backend/unix`). The
//! process at the other end of the socket is the one that the kernel names (`SO_PEERCRED`), must run as the same user,
//! and proves that it is the one whose memory is reached: it says which random word it has at which address, and that
//! word is read from there, at first and with every call (`sys::process_vm`). If any of this fails the path is refused
//! with the reason, and another way is taken.
//!
//! When it must end: the owner revokes a deregistered region. It counts as used until this process has answered, which it
//! does after its last call has returned, or is proved dead by its pidfd. A call is synchronous: when it has returned, no
//! byte of it can land any more. So what the memory is freed for is never overwritten, and there is no time limit on it.
//! Bounds and the right to write are checked here, against what the owner handed out; processes of one user trust each
//! other that far, because the kernel does.
//!
//! Between the look at the word and a write lies an instant in which the peer could die and its number go to another
//! process of the user, or in which it could start another program. Then up to one step lands there, and the request
//! fails. Reads have no such instant.

mod explain;
mod sums;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::copy::{Copier, Go, Place, Progress, STEP_BYTES, local_memory};
use super::unix::{self, Access, Held, Link, Outcome, corrupt};
use super::{Fabric, Operation};
use crate::agent::{Exports, RemoteRegion};
use crate::plan::Plan;
use crate::reactor::Reactor;
use crate::region::RegionCore;
use crate::sys::memory::Mapping;
use crate::sys::process_vm::{Batch, NONCE_BYTES, PeerProcess, Window};

/// The way through system calls, and the word by which this process is recognised.
struct Cma {
    memory: Mapping,
    nonce: [u8; NONCE_BYTES],
}

/// Starts to let others reach this agent's memory.
pub(crate) fn fabric(
    exports: &Arc<Exports>,
    reactor: &Arc<Reactor>,
    copier: Arc<Copier>,
) -> Result<Arc<dyn Fabric>> {
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce)
        .map_err(|e| Error::new(ErrorKind::Io, format!("draw a random word: {e}")))?;
    let memory = Mapping::anonymous(NONCE_BYTES as u64)?;
    memory.write(0, &nonce)?;
    unix::fabric(Cma { memory, nonce }, exports, reactor, copier)
}

impl Access for Cma {
    const NAME: &'static str = "cma";

    const IN_PLACE: bool = true;

    type Peer = PeerProcess;

    type Memory = Window;

    fn welcome(&self) -> Outcome {
        Outcome::Welcome {
            nonce_at: self.memory.address(),
            nonce: self.nonce,
        }
    }

    fn grant(&self, region: &RegionCore, _process: i32) -> Result<(Outcome, Option<OwnedFd>)> {
        let located = Outcome::Located {
            address: region.mapping()?.address(),
            bytes: region.bytes(),
            writable: region.options().remote_write,
        };
        Ok((located, None))
    }

    fn meet(link: &Link, welcome: Outcome) -> Result<PeerProcess> {
        let Outcome::Welcome { nonce_at, nonce } = welcome else {
            return Err(corrupt("a greeting is answered by something else"));
        };
        let own = rustix::process::geteuid().as_raw();
        if own != link.uid() {
            let other = link.uid();
            let text = format!("the peer's process runs as user {other}, this one as {own}");
            return Err(Error::new(ErrorKind::Denied, text));
        }
        PeerProcess::meet(link.pid(), nonce_at, nonce)
            .map_err(|error| explain::refusal(link.pid(), error))
    }

    fn accept(
        &self,
        remote: &RemoteRegion,
        (outcome, _file): (Outcome, Option<OwnedFd>),
        _piece: &mut dyn FnMut(u32) -> Result<(Outcome, Option<OwnedFd>)>,
    ) -> Result<Window> {
        let Outcome::Located {
            address,
            bytes,
            writable,
        } = outcome
        else {
            return Err(corrupt("a map is answered without an address"));
        };
        if bytes != remote.bytes {
            let text = format!(
                "region {} has {bytes} bytes, {} are exported",
                remote.id, remote.bytes
            );
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        Ok(Window {
            address,
            bytes,
            writable,
        })
    }

    fn reaches(_region: &RemoteRegion) -> Result<(), String> {
        Ok(())
    }

    fn copy(
        peer: &PeerProcess,
        plan: &Plan,
        memory: &[Arc<Held<Self>>],
        at: &mut Place,
        go_on: &dyn Fn() -> Result<Go>,
    ) -> Result<Progress> {
        if plan.sums {
            return sums::sum(peer, plan, memory, go_on).map(|()| Progress::Done);
        }
        let mut batch = Batch::new(plan.operation, plan.extents.len());
        while at.extent < plan.extents.len() {
            if go_on()? == Go::Later {
                return Ok(Progress::Paused);
            }
            batch.clear();
            fill(&mut batch, *at, plan, memory)?;
            let moved = peer.run(&mut batch);
            let moved = moved.map_err(|error| explain::failure(peer.pid(), error))?;
            if moved == 0 {
                return Err(explain::unreachable(peer, &plan.extents[at.extent]));
            }
            at.advance(&plan.extents, moved);
        }
        if plan.operation == Operation::Write && !plan.extents.is_empty() {
            // What went to the wrong process must not be called done.
            let known = peer.recognise();
            known.map_err(|error| explain::failure(peer.pid(), error))?;
        }
        Ok(Progress::Done)
    }

    fn detail(link: &Link) -> String {
        let (pid, uid) = (link.pid(), link.uid());
        format!("process_vm_readv and process_vm_writev on process {pid} of this host, user {uid}")
    }
}

/// Puts into a batch what comes next, at most one step.
fn fill<'a>(
    batch: &mut Batch<'a>,
    mut at: Place,
    plan: &'a Plan,
    memory: &[Arc<Held<Cma>>],
) -> Result<()> {
    while let Some(extent) = plan.extents.get(at.extent)
        && batch.bytes() < STEP_BYTES
        && !batch.is_full()
    {
        let len = (extent.len - at.done).min(STEP_BYTES - batch.bytes());
        batch.push(
            local_memory(plan, extent)?,
            extent.local_offset + at.done,
            memory[extent.remote as usize].memory()?,
            extent.remote_offset + at.done,
            len,
        )?;
        at.advance(&plan.extents, len);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
