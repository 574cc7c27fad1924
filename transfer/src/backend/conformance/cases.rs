//! The cases, in the order in which they are run.

use bytes::Bytes;
use kvcache_core::{ErrorKind, Result};

use super::{Bench, PATIENCE, Verdict, broken, expect, pattern};
use crate::backend::Operation::{Read, Write};
use crate::outcome::Status;
use crate::region::MemoryKind;
use crate::request::RequestOptions;

/// Lengths around everything that matters: words, sectors, pages, chunks, and the largest usual block.
const SIZES: [u64; 14] = [
    1,
    7,
    8,
    63,
    511,
    512,
    513,
    4095,
    4096,
    4097,
    65_536,
    1 << 20,
    (1 << 20) + 3,
    4 << 20,
];
/// Offsets from the start of a page.
const OFFSETS: [u64; 6] = [0, 1, 8, 63, 511, 4096];
pub(super) fn sizes(bench: &Bench<'_>) -> Result<Verdict> {
    let memory = bench.memory(4 << 20)?;
    for (seed, len) in (0..).zip(SIZES) {
        let place = bench.fixture.place(len)?;
        let bytes = pattern(seed, len);
        memory.write_at(0, &bytes)?;
        bench.transfer(Write, (&*memory, &[(0, len)]), (&place, &[(0, len)]))?;
        memory.fill_at(0, len, 0)?;
        bench.transfer(Read, (&*memory, &[(0, len)]), (&place, &[(0, len)]))?;
        expect(&*memory, 0, &bytes).map_err(|error| error.at(format!("{len} bytes")))?;
    }
    Ok(Verdict::Held)
}

pub(super) fn alignment(bench: &Bench<'_>) -> Result<Verdict> {
    let len = 5000;
    let room = 16 << 10;
    let memory = bench.memory(room)?;
    let mut seed = 100;
    for local in OFFSETS {
        for remote in OFFSETS {
            seed += 1;
            let place = bench.fixture.place(room)?;
            let bytes = pattern(seed, len);
            memory.fill_at(0, room, 0xee)?;
            memory.write_at(local, &bytes)?;
            // A whole object is written as one range before and one at the offset.
            let before = [(8192, remote), (local, len)];
            let target = [(0, remote), (remote, len)];
            let skip = usize::from(!bench.fixture.writes_whole() || remote == 0);
            let sources = &before[skip..];
            bench.transfer(Write, (&*memory, sources), (&place, &target[skip..]))?;
            memory.fill_at(0, room, 0)?;
            bench.transfer(
                Read,
                (&*memory, &[(local, len)]),
                (&place, &[(remote, len)]),
            )?;
            let at = format!("memory at {local}, place at {remote}");
            expect(&*memory, local, &bytes).map_err(|error| error.at(&at))?;
            expect(&*memory, 0, &vec![0; local as usize]).map_err(|error| error.at(&at))?;
            expect(&*memory, local + len, &[0; 64]).map_err(|error| error.at(&at))?;
        }
    }
    Ok(Verdict::Held)
}

pub(super) fn scattered(bench: &Bench<'_>) -> Result<Verdict> {
    let (count, len, gap) = (64_u64, 3000_u64, 72_u64);
    let step = len + gap;
    let memory = bench.memory(count * step)?;
    let place = bench.fixture.place(count * len)?;
    let bytes = pattern(7, count * len);
    memory.fill_at(0, count * step, 0xee)?;
    // Each range of the place comes from another slot of memory: 29 and 64 have no common divisor.
    let slot = |position: u64| position * 29 % count;
    let locals: Vec<_> = (0..count)
        .map(|position| (slot(position) * step, len))
        .collect();
    let remotes: Vec<_> = (0..count).map(|position| (position * len, len)).collect();
    for position in 0..count {
        let part = &bytes[(position * len) as usize..((position + 1) * len) as usize];
        memory.write_at(slot(position) * step, part)?;
    }
    bench.transfer(Write, (&*memory, &locals), (&place, &remotes))?;
    memory.fill_at(0, count * step, 0xee)?;
    bench.transfer(Read, (&*memory, &locals), (&place, &remotes))?;
    for position in 0..count {
        let part = &bytes[(position * len) as usize..((position + 1) * len) as usize];
        let start = slot(position) * step;
        expect(&*memory, start, part).map_err(|error| error.at(format!("range {position}")))?;
        expect(&*memory, start + len, &vec![0xee; gap as usize])
            .map_err(|error| error.at(format!("the gap after range {position}")))?;
    }
    // Backwards, so that nothing can be merged.
    let reversed: Vec<_> = remotes.iter().rev().copied().collect();
    let forward: Vec<_> = (0..count).map(|position| (position * len, len)).collect();
    bench.transfer(Read, (&*memory, &forward), (&place, &reversed))?;
    for position in 0..count {
        let from = ((count - 1 - position) * len) as usize;
        expect(&*memory, position * len, &bytes[from..from + len as usize])
            .map_err(|error| error.at(format!("reversed range {position}")))?;
    }
    Ok(Verdict::Held)
}

pub(super) fn many_descriptors(bench: &Bench<'_>) -> Result<Verdict> {
    let (count, len) = (4096_u64, 48_u64);
    let memory = bench.memory(count * 64)?;
    let place = bench.fixture.place(count * len)?;
    let bytes = pattern(11, count * len);
    let locals: Vec<_> = (0..count).map(|position| (position * 64, len)).collect();
    let remotes: Vec<_> = (0..count).map(|position| (position * len, len)).collect();
    let parts = || (0..count).zip(bytes.chunks(len as usize));
    for (position, part) in parts() {
        memory.write_at(position * 64, part)?;
    }
    bench.transfer(Write, (&*memory, &locals), (&place, &remotes))?;
    memory.fill_at(0, count * 64, 0)?;
    bench.transfer(Read, (&*memory, &locals), (&place, &remotes))?;
    for (position, part) in parts() {
        expect(&*memory, position * 64, part)
            .map_err(|error| error.at(format!("descriptor {position}")))?;
    }
    Ok(Verdict::Held)
}

pub(super) fn refusals(bench: &Bench<'_>) -> Result<Verdict> {
    let memory = bench.memory(4096)?;
    let place = bench.fixture.place(4096)?;
    let options = RequestOptions::default;
    let whole: &[(u64, u64)] = &[(0, 4096)];
    bench.transfer(Write, (&*memory, whole), (&place, whole))?;
    let mut attempts = vec![
        ("an empty local range", (0, 0), (0, 4096)),
        ("an empty remote range", (0, 4096), (0, 0)),
        ("a local range past the end", (1, 4096), (0, 4096)),
        ("a local range that overflows", (u64::MAX - 4, 8), (0, 8)),
        ("a remote range that overflows", (0, 8), (u64::MAX - 4, 8)),
        ("lengths that differ", (0, 4096), (0, 4095)),
    ];
    if place.owner.kind() != MemoryKind::Object {
        attempts.push(("a remote range past the end", (0, 4096), (1, 4096)));
    }
    for (what, local, remote) in attempts {
        match bench.request(Read, (&*memory, &[local]), (&place, &[remote]), options()) {
            Err(error) if error.kind() == ErrorKind::Invalid => {}
            Err(error) => return Err(error.at(format!("{what} is refused for another reason"))),
            Ok(_) => return Err(broken(format!("{what} is accepted"))),
        }
    }
    let two: &[(u64, u64)] = &[(0, 8), (8, 8)];
    match bench.request(Read, (&*memory, two), (&place, &[(0, 16)]), options()) {
        Err(error) if error.kind() == ErrorKind::Invalid => {}
        _ => return Err(broken("two local ranges are paired with one")),
    }
    // Only the store knows how long an object is.
    if place.owner.kind() == MemoryKind::Object {
        let request = bench.request(Read, (&*memory, whole), (&place, &[(1, 4096)]), options())?;
        request.post()?;
        match request.wait(PATIENCE) {
            Err(failed) if failed.kind() == ErrorKind::Corrupt => {}
            other => return Err(broken(format!("reading past an object's end: {other:?}"))),
        }
    }
    Ok(Verdict::Held)
}

pub(super) fn concurrent(bench: &Bench<'_>) -> Result<Verdict> {
    let (count, len) = (16_u64, 300_000_u64);
    let memory = bench.memory(count * len)?;
    let bytes = pattern(13, count * len);
    memory.write_at(0, &bytes)?;
    let mut places = Vec::new();
    for _ in 0..count {
        places.push(bench.fixture.place(len)?);
    }
    for operation in [Write, Read] {
        let mut requests = Vec::new();
        for (position, place) in (0..).zip(&places) {
            let range: &[(u64, u64)] = &[(position * len, len)];
            let options = RequestOptions::default();
            let request =
                bench.request(operation, (&*memory, range), (place, &[(0, len)]), options)?;
            request.post()?;
            requests.push(request);
        }
        for request in &requests {
            bench.finish(request)?;
        }
        if operation == Write {
            memory.fill_at(0, count * len, 0)?;
        }
    }
    expect(&*memory, 0, &bytes)?;
    Ok(Verdict::Held)
}

pub(super) fn repost(bench: &Bench<'_>) -> Result<Verdict> {
    let len = 100_000;
    let memory = bench.memory(2 * len)?;
    let place = bench.fixture.place(len)?;
    let range: &[(u64, u64)] = &[(0, len)];
    let options = RequestOptions::default;
    let write = bench.request(Write, (&*memory, range), (&place, range), options())?;
    let read = bench.request(Read, (&*memory, &[(len, len)]), (&place, range), options())?;
    if !matches!(write.poll(), Status::Idle) {
        return Err(broken("a request that was not posted is not idle"));
    }
    for seed in 0..5 {
        let bytes = pattern(1000 + seed, len);
        memory.write_at(0, &bytes)?;
        for request in [&write, &read] {
            request.post()?;
            bench.finish(request)?;
        }
        expect(&*memory, len, &bytes).map_err(|error| error.at(format!("post {seed}")))?;
    }
    Ok(Verdict::Held)
}

pub(super) fn notification(bench: &Bench<'_>) -> Result<Verdict> {
    let Some(peer) = bench.fixture.peer() else {
        return Ok(Verdict::DoesNotApply);
    };
    let len = 700_000;
    let memory = bench.memory(len)?;
    let place = bench.fixture.place(len)?;
    let range: &[(u64, u64)] = &[(0, len)];
    for seed in 0..20_u64 {
        let bytes = pattern(2000 + seed, len);
        memory.write_at(0, &bytes)?;
        let text = Bytes::from(format!("write {seed}"));
        let options = RequestOptions {
            notification: Some(text.clone()),
            ..Default::default()
        };
        let request = bench.request(Write, (&*memory, range), (&place, range), options)?;
        request.post()?;
        let told = peer.take(PATIENCE)?;
        if told.is_empty() {
            return Err(broken(format!("notification {seed} did not come")));
        }
        // The data must be complete the moment the notification can be seen, whatever the initiator knows.
        expect(&*place.owner, 0, &bytes).map_err(|error| error.at(format!("write {seed}")))?;
        bench.finish(&request)?;
        if told != [text] {
            return Err(broken(format!(
                "{} notifications instead of write {seed}",
                told.len()
            )));
        }
    }
    Ok(Verdict::Held)
}

pub(super) fn stats(bench: &Bench<'_>) -> Result<Verdict> {
    let len = 10_000;
    let counters = || {
        let mut stats = bench.agent().stats();
        stats
            .backends
            .remove(bench.fixture.backend())
            .unwrap_or_default()
    };
    let memory = bench.memory(len)?;
    let place = bench.fixture.place(len)?;
    let range: &[(u64, u64)] = &[(0, len)];
    let before = counters();
    for _ in 0..3 {
        bench.transfer(Write, (&*memory, range), (&place, range))?;
    }
    bench.transfer(Read, (&*memory, range), (&place, range))?;
    let after = counters();
    let moved = [
        after.bytes_written - before.bytes_written,
        after.bytes_read - before.bytes_read,
        after.requests - before.requests,
        after.failures - before.failures,
    ];
    if moved != [3 * len, len, 4, 0] {
        let text = format!("bytes written and read, requests, failures are {moved:?}");
        return Err(broken(text));
    }
    Ok(Verdict::Held)
}

/// What is whole passes; of two descriptors that bring different bytes to one place one differs, and is named.
pub(super) fn checksums(bench: &Bench<'_>) -> Result<Verdict> {
    const LEN: u64 = 300_000;
    let memory = bench.memory(4 * LEN)?;
    let place = bench.fixture.place(4 * LEN)?;
    memory.write_at(0, &pattern(23, 4 * LEN))?;
    let checked = || RequestOptions {
        checksum: true,
        ..RequestOptions::default()
    };
    let apart = [(0, LEN), (LEN, LEN)];
    let request = match bench.request(Write, (&*memory, &apart), (&place, &apart), checked()) {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            return match error.to_string().contains("checksums") {
                true => Ok(Verdict::DoesNotApply),
                false => Err(error.at("the refusal does not say that it is of checksums")),
            };
        }
        request => request?,
    };
    request.post()?;
    bench.finish(&request)?;
    let together = [(2 * LEN, LEN), (2 * LEN, LEN)];
    for operation in [Write, Read] {
        let (own, other) = match operation {
            Write => (&apart, &together),
            Read => (&together, &apart),
        };
        let request = bench.request(operation, (&*memory, own), (&place, other), checked())?;
        request.post()?;
        match request.wait(PATIENCE) {
            Err(failed) if failed.kind() == ErrorKind::Corrupt => {
                if !failed.to_string().contains("descriptor ") {
                    return Err(broken(format!("it names no descriptor: {failed}")));
                }
            }
            Err(failed) => return Err(failed.into()),
            Ok(_) => return Err(broken("what differs passes")),
        }
        if !request.wait_drained(PATIENCE) {
            return Err(broken("a request whose bytes differ does not drain"));
        }
    }
    Ok(Verdict::Held)
}
