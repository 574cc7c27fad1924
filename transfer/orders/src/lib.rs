//! The fabric's own files in which several threads meet, built with loom's locks and atomics in place of `crate::sync` there:
//! each scenario is run in every order that loom finds, up to a number of interruptions.
//!
//! That is a request, from its post to its end, whatever its backends, its deadline and its caller do meanwhile, with the
//! thread that posts later; the gate that tells when a region's memory is nobody's any more; and the queue of copies that the
//! copying thread shares with those who wait. Backends, peers and the timer are stand-ins ([`neighbours`]): what they do, and when,
//! is the scenario's.
//!
//! This crate does not say anything of time: loom's waits have no limit, so a wake-up that gets lost shows as a deadlock.
// The files bring their own unit tests, which are made where they belong.
#![cfg(not(test))]
#![forbid(unsafe_code)]
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "the rest of the crate that these files are of uses what is unused here"
)]
#![allow(
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "the scenarios are tests: what is wrong there shall panic"
)]

pub mod copies;
#[path = "../../src/estimate.rs"]
mod estimate;
#[path = "../../src/backend/job.rs"]
mod job;
mod neighbours;
#[path = "../../src/outcome.rs"]
mod outcome;
#[path = "../../src/backend/copy/queue.rs"]
mod queue;
pub mod region;
pub mod request;
#[path = "../../src/signal.rs"]
mod signal;
#[path = "../../src/stats.rs"]
mod stats;
mod sync;

use neighbours::{agent, backend, plan, reactor};

/// Runs a scenario in every order with at most so many interruptions.
fn explore(interruptions: usize, scenario: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(interruptions);
    model.check(scenario);
}
