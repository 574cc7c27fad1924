//! The path to one peer.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvcache_core::{Error, Result};

use super::NAME;
use super::driver::Driver;
use super::state::Line;
use super::using::Shared;
use crate::agent::{ConnectionReport, RemoteRegion};
use crate::backend::direct::{self, HOST_AND_DEVICES};
use crate::backend::unix::Call;
use crate::backend::{Backend, Capabilities, Channel, Job, NOT_WANTED, Operation, Refusal};
use crate::descriptor::Target;
use crate::look::Look;
use crate::plan::Plan;

pub(super) struct VerbsChannel {
    driver: Arc<Driver>,
    line: Line,
    shared: Arc<Shared>,
    capabilities: Capabilities,
    /// How long the peer may take to hand out a region.
    patience: Duration,
}

impl VerbsChannel {
    pub(super) fn new(
        driver: &Arc<Driver>,
        line: Line,
        shared: Arc<Shared>,
        patience: Duration,
    ) -> Self {
        Self {
            driver: driver.clone(),
            line,
            shared,
            capabilities: Capabilities {
                local: HOST_AND_DEVICES,
                remote: HOST_AND_DEVICES,
                notifications: true,
                checksums: true,
            },
            patience,
        }
    }

    /// Nothing has come by any rail in time: what each was.
    pub(super) fn unproved(&self, error: Error) -> Error {
        error.at(self.shared.describe())
    }

    fn end(&self, reason: &str) {
        self.driver.with(|state| state.lose(self.line, reason));
    }
}

impl Backend for VerbsChannel {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// A job is settled when the device has nothing of it left; a write of a path that was lost, when the peer has said that
    /// its queue pairs are gone, or was not heard of in time: then it may still be on its way.
    fn fences(&self, operation: Operation) -> bool {
        let is_drained = !self.shared.undrained.load(Ordering::Acquire);
        let is_fenced = !self.shared.unfenced.load(Ordering::Acquire);
        is_drained && (operation == Operation::Read || is_fenced)
    }

    fn refusal(&self, plan: &Plan) -> Option<String> {
        if !plan.wants(NAME) {
            return Some(NOT_WANTED.to_owned());
        }
        direct::sums_refusal(plan)
    }

    fn prepare(&self, plan: &Plan) -> Result<()> {
        direct::check_there(plan)?;
        let calls = self.driver.with(|state| -> Result<Vec<Arc<Call>>> {
            let mut calls = Vec::new();
            for target in &*plan.local {
                if let Target::Local(region) = target {
                    state.register(self.line, region)?;
                }
            }
            for target in &*plan.remote {
                if let Target::Remote(region) = target {
                    let call = Arc::<Call>::default();
                    if !state.want(self.line, region, Some(&call), None)? {
                        calls.push(call);
                    }
                }
            }
            Ok(calls)
        })?;
        let until = Instant::now() + self.patience;
        calls
            .iter()
            .try_for_each(|call| call.wait(until).map(|_| ()))
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        if self.shared.is_lost() {
            return Err(job.refuse(self.shared.loss()));
        }
        self.driver.post(self.line, job);
        Ok(())
    }

    fn reap(&self) {
        self.driver.reap();
    }

    fn progress(&self) -> Option<u64> {
        Some(self.shared.arrived.load(Ordering::Relaxed))
    }

    fn give_way(&self) {
        self.driver.reap();
        self.driver.with(|state| state.give_way(self.line));
    }

    fn assist(&self, until: Instant, _look: &Look<'_>, done: &dyn Fn() -> bool) {
        self.driver.assist(until, done);
    }
}

impl Channel for VerbsChannel {
    fn check(&self) -> Result<()> {
        if self.shared.is_lost() {
            return Err(self.shared.loss());
        }
        Ok(())
    }

    fn reaches(&self, _region: &RemoteRegion) -> Result<(), String> {
        Ok(())
    }

    fn detail(&self) -> String {
        self.shared.describe()
    }

    fn connections(&self) -> Vec<ConnectionReport> {
        self.shared.report()
    }

    fn close(&self) {
        self.end("the peer was forgotten");
    }
}

impl Drop for VerbsChannel {
    fn drop(&mut self) {
        self.end("nobody uses the path any more");
    }
}
