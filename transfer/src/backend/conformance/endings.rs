//! The cases about requests that end otherwise than by being done.

use std::time::Duration;

use kvcache_core::{ErrorKind, Result};

use super::{Bench, PATIENCE, Verdict, broken, expect, pattern};
use crate::backend::Operation::{Read, Write};
use crate::outcome::{MemoryFate, Status, TransferError};
use crate::request::{Request, RequestOptions};

/// Large enough to be caught in flight by a backend that is not done at once.
const LARGE_BYTES: u64 = 32 << 20;

pub(super) fn deregister(bench: &Bench<'_>) -> Result<Verdict> {
    let memory = bench.memory(LARGE_BYTES)?;
    let place = bench.fixture.place(LARGE_BYTES)?;
    let range: &[(u64, u64)] = &[(0, LARGE_BYTES)];
    let options = RequestOptions::default();
    let request = bench.request(Write, (&*memory, range), (&place, range), options)?;
    request.post()?;
    memory.deregister().wait(PATIENCE)?;
    // The memory is free now, and the request learns of it as well.
    request.wait(PATIENCE)?;
    if !request.wait_drained(PATIENCE) {
        return Err(broken(
            "the region is free and a request over it does not drain",
        ));
    }
    match request.post() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Verdict::Held),
        Err(error) => Err(error.at("a post over a deregistered region fails otherwise")),
        Ok(()) => Err(broken("a request over a deregistered region is accepted")),
    }
}

pub(super) fn deadline(bench: &Bench<'_>) -> Result<Verdict> {
    let options = RequestOptions {
        deadline: Some(Duration::from_nanos(1)),
        ..Default::default()
    };
    given_up(bench, &options, ErrorKind::Timeout, |_| ())
}

pub(super) fn cancel(bench: &Bench<'_>) -> Result<Verdict> {
    given_up(
        bench,
        &RequestOptions::default(),
        ErrorKind::Cancelled,
        Request::cancel,
    )
}

/// Posts large requests that are given up; then their memory must drain, and a fresh request must work.
fn given_up(
    bench: &Bench<'_>,
    options: &RequestOptions,
    kind: ErrorKind,
    give_up: fn(&Request),
) -> Result<Verdict> {
    let memory = bench.memory(LARGE_BYTES)?;
    let place = bench.fixture.place(LARGE_BYTES)?;
    let range: &[(u64, u64)] = &[(0, LARGE_BYTES)];
    let bytes = pattern(17, LARGE_BYTES);
    memory.write_at(0, &bytes)?;
    for operation in [Write, Read] {
        let request = bench.request(
            operation,
            (&*memory, range),
            (&place, range),
            options.clone(),
        )?;
        request.post()?;
        give_up(&request);
        match request.wait(PATIENCE) {
            Ok(_) => {}
            Err(failed) if failed.kind() == kind => check_fate(&request, &failed)?,
            // The write before may have left no object to read.
            Err(failed) if failed.kind() == ErrorKind::NotFound && operation == Read => {}
            Err(failed) => return Err(failed.into()),
        }
        if !request.wait_drained(PATIENCE) {
            return Err(broken(
                "the memory of a request that was given up does not drain",
            ));
        }
        if let Status::Failed(failed) = request.poll()
            && failed.fate() != MemoryFate::Settled
        {
            return Err(broken("memory has drained and is still called in flight"));
        }
        // What drained stays drained: a late byte of the read would differ from this.
        memory.fill_at(0, LARGE_BYTES, 0x55)?;
        round_trip(bench)?;
        expect(&*memory, 0, &vec![0x55; LARGE_BYTES as usize])
            .map_err(|error| error.at("after draining"))?;
    }
    memory.write_at(0, &bytes)?;
    bench.transfer(Write, (&*memory, range), (&place, range))?;
    memory.fill_at(0, LARGE_BYTES, 0)?;
    bench.transfer(Read, (&*memory, range), (&place, range))?;
    expect(&*memory, 0, &bytes)?;
    Ok(Verdict::Held)
}

fn round_trip(bench: &Bench<'_>) -> Result<()> {
    let memory = bench.memory(4096)?;
    let place = bench.fixture.place(4096)?;
    let range: &[(u64, u64)] = &[(0, 4096)];
    bench.transfer(Write, (&*memory, range), (&place, range))?;
    bench.transfer(Read, (&*memory, range), (&place, range))
}

fn check_fate(request: &Request, failed: &TransferError) -> Result<()> {
    if failed.fate() == MemoryFate::Settled && !request.wait_drained(Duration::ZERO) {
        return Err(broken("memory is called settled and has not drained"));
    }
    Ok(())
}
