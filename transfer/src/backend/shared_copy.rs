//! A large copy within the process, shared by several threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};

use super::copy::{
    Go, Place, Progress, SHARED_BYTES_MIN, STEP_BYTES, WORD_BYTES_MAX, copy_extents, copy_part,
    local_memory,
};
use crate::plan::{Extent, Plan};
use crate::sys::memory::Mapping;

/// As [`super::copy::copy_plan`], with up to `threads` threads for each run of extents that is large enough.
pub(super) fn copy_plan<'a>(
    plan: &Plan,
    threads: usize,
    place: &mut Place,
    go_on: &dyn Fn() -> Result<Go>,
    remote: impl Fn(u32) -> Result<&'a Mapping> + Sync,
) -> Result<Progress> {
    if !is_shared(plan, threads) {
        return super::copy::copy_plan(plan, place, go_on, remote);
    }
    for run in plan.extents.chunk_by(|a, b| !is_word(a) && !is_word(b)) {
        let bytes: u64 = run.iter().map(|extent| extent.len).sum();
        if bytes < SHARED_BYTES_MIN {
            copy_extents(plan, run, &mut Place::default(), go_on, &remote)?;
        } else {
            let sharing = Sharing {
                plan,
                run,
                taken: Mutex::default(),
                stopped: AtomicBool::new(false),
            };
            sharing.copy(threads, &|| go_on().map(drop), &remote)?;
        }
    }
    Ok(Progress::Done)
}

/// Whether several threads take part; the copy is then not to be left half-way.
pub(super) fn is_shared(plan: &Plan, threads: usize) -> bool {
    threads >= 2 && !plan.sums && plan.bytes >= SHARED_BYTES_MIN
}

fn is_word(extent: &Extent) -> bool {
    extent.len <= WORD_BYTES_MAX
}

/// Extents that threads take from, a step at a time.
struct Sharing<'a> {
    plan: &'a Plan,
    run: &'a [Extent],
    taken: Mutex<Taken>,
    stopped: AtomicBool,
}

/// The first byte of a run that nobody has taken.
#[derive(Clone, Copy, Default)]
struct Taken {
    extent: usize,
    done: u64,
}

impl Sharing<'_> {
    /// With the calling thread, and as many others as the system gives. None of them is left when it returns.
    fn copy<'m>(
        &self,
        threads: usize,
        go_on: &dyn Fn() -> Result<()>,
        remote: &(impl Fn(u32) -> Result<&'m Mapping> + Sync),
    ) -> Result<()> {
        std::thread::scope(|scope| {
            let mut helpers = Vec::with_capacity(threads - 1);
            for _ in 1..threads {
                let thread = std::thread::Builder::new().name("kvf-copy-part".into());
                let help = || self.take_and_copy(&|| Ok(()), remote);
                match thread.spawn_scoped(scope, help) {
                    Ok(helper) => helpers.push(helper),
                    Err(error) => tracing::warn!(%error, "start a thread for a large copy"),
                }
            }
            let mut outcome = self.take_and_copy(go_on, remote);
            for helper in helpers {
                let helped = helper.join().unwrap_or_else(|_| {
                    let text = "a thread that shared a copy panicked";
                    Err(Error::new(ErrorKind::Internal, text))
                });
                outcome = outcome.and(helped);
            }
            outcome
        })
    }

    fn take_and_copy<'m>(
        &self,
        go_on: &dyn Fn() -> Result<()>,
        remote: &impl Fn(u32) -> Result<&'m Mapping>,
    ) -> Result<()> {
        while !self.stopped.load(Ordering::Relaxed)
            && let Some((from, to)) = self.take()
        {
            let copied = go_on().and_then(|()| self.copy_range(from, to, remote));
            if copied.is_err() {
                self.stopped.store(true, Ordering::Relaxed);
                return copied;
            }
        }
        Ok(())
    }

    /// About a step of bytes: where they begin and end.
    fn take(&self) -> Option<(Taken, Taken)> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let from = *taken;
        let mut bytes = 0;
        while bytes < STEP_BYTES
            && let Some(extent) = self.run.get(taken.extent)
        {
            let count = (extent.len - taken.done).min(STEP_BYTES - bytes);
            bytes += count;
            taken.done += count;
            if taken.done == extent.len {
                *taken = Taken {
                    extent: taken.extent + 1,
                    done: 0,
                };
            }
        }
        (bytes > 0).then_some((from, *taken))
    }

    fn copy_range<'m>(
        &self,
        mut from: Taken,
        to: Taken,
        remote: &impl Fn(u32) -> Result<&'m Mapping>,
    ) -> Result<()> {
        while from.extent < to.extent || from.done < to.done {
            let extent = &self.run[from.extent];
            let end = match from.extent == to.extent {
                true => to.done,
                false => extent.len,
            };
            let (local, remote) = (local_memory(self.plan, extent)?, remote(extent.remote)?);
            let operation = self.plan.operation;
            copy_part(operation, extent, from.done, end - from.done, local, remote)?;
            from = match from.extent == to.extent {
                true => to,
                false => Taken {
                    extent: from.extent + 1,
                    done: 0,
                },
            };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
