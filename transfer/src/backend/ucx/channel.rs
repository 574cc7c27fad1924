//! The path to one peer.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvcache_core::Result;

use super::NAME;
use super::driver::Driver;
use super::frame::Session;
use super::using::Shared;
use crate::agent::RemoteRegion;
use crate::backend::direct::{self, HOST_AND_DEVICES};
use crate::backend::unix::Call;
use crate::backend::{Backend, Capabilities, Channel, Job, NOT_WANTED, Operation, Refusal};
use crate::descriptor::Target;
use crate::look::Look;
use crate::plan::Plan;

pub(super) struct UcxChannel {
    driver: Arc<Driver>,
    session: Session,
    shared: Arc<Shared>,
    detail: String,
    capabilities: Capabilities,
    /// How long the peer may take to hand out a region.
    patience: Duration,
}

impl UcxChannel {
    pub(super) fn new(
        driver: &Arc<Driver>,
        session: Session,
        shared: Arc<Shared>,
        patience: Duration,
    ) -> Self {
        Self {
            driver: driver.clone(),
            session,
            shared,
            detail: String::new(),
            capabilities: Capabilities {
                local: HOST_AND_DEVICES,
                remote: HOST_AND_DEVICES,
                notifications: true,
                checksums: true,
            },
            patience,
        }
    }

    /// With what UCX tells of the path, now that the peer has answered.
    pub(super) fn described(mut self, version: &str) -> Result<Self> {
        let transports = self.driver.with(|state| state.transports(self.session))?;
        self.detail = format!("ucx {version} over {transports}");
        Ok(self)
    }

    fn end(&self, reason: &str) {
        self.driver.with(|state| state.lose(self.session, reason));
    }
}

impl Backend for UcxChannel {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// A write that is settled by an error of its endpoint may still be on its way.
    fn fences(&self, operation: Operation) -> bool {
        operation == Operation::Read
    }

    fn refusal(&self, plan: &Plan) -> Option<String> {
        if !plan.wants(NAME) {
            return Some(NOT_WANTED.to_owned());
        }
        direct::sums_refusal(plan).or_else(|| {
            let mut memories = direct::local_devices(plan);
            memories.find_map(|memory| self.driver.with(|state| state.worker.kind_of(memory).err()))
        })
    }

    fn prepare(&self, plan: &Plan) -> Result<()> {
        direct::check_there(plan)?;
        let calls = self.driver.with(|state| -> Result<Vec<Arc<Call>>> {
            let mut calls = Vec::new();
            for target in &*plan.local {
                if let Target::Local(region) = target {
                    state.worker.register(region)?;
                }
            }
            for target in &*plan.remote {
                if let Target::Remote(region) = target {
                    let call = Arc::<Call>::default();
                    if !state.want(self.session, region, Some(&call), None)? {
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
        self.driver.post(self.session, job);
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
        self.driver.with(|state| state.give_way(self.session));
    }

    fn assist(&self, until: Instant, _look: &Look<'_>, done: &dyn Fn() -> bool) {
        self.driver.assist(until, done);
    }
}

impl Channel for UcxChannel {
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
        self.detail.clone()
    }

    fn close(&self) {
        self.end("the peer was forgotten");
    }
}

impl Drop for UcxChannel {
    fn drop(&mut self) {
        self.end("nobody uses the path any more");
    }
}
