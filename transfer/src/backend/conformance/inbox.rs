//! The case about a peer that does not take its notifications.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::{ErrorKind, Result};

use super::{Bench, Memory, PATIENCE, Place, Receiver, Verdict, broken, expect, pattern};
use crate::agent::{Agent, INBOX_BYTES_MAX, PeerHandle};
use crate::backend::Operation::{Read, Write};
use crate::outcome::Status;
use crate::request::{NOTIFICATION_BYTES_MAX, Request, RequestOptions};

/// More notifications than a path has unanswered, in number and in bytes.
const SMALL: u64 = 2000;
const LARGE: u64 = 10;

/// Writes that bring a notification: together more bytes than a path has under way.
const WRITES: u64 = 20;
const WRITE_BYTES: u64 = 1 << 20;

/// The inbox is full, and far more is sent. Data goes on both ways, those that are given up or late end, and the others are
/// taken as soon as there is room, each once.
pub(super) fn full(bench: &Bench<'_>) -> Result<Verdict> {
    let Some(peer) = bench.fixture.peer() else {
        return Ok(Verdict::DoesNotApply);
    };
    let memory = bench.memory(WRITE_BYTES)?;
    let place = bench.fixture.place(WRITE_BYTES)?;
    let Some(handle) = place.peer.clone() else {
        return Err(broken("a peer without a handle"));
    };
    let (held_back, refused) = peer.turned_away()?;
    fill(bench.agent(), &handle)?;
    let mut waiting = Vec::new();
    for number in 0..SMALL + LARGE {
        let len = if number < SMALL {
            8
        } else {
            NOTIFICATION_BYTES_MAX
        };
        waiting.push(bench.agent().notify(&handle, numbered(number, len))?);
    }
    for number in SMALL + LARGE..SMALL + LARGE + WRITES {
        waiting.push(notifying_write(
            bench,
            &*memory,
            &place,
            (number, PATIENCE),
        )?);
    }
    let last = waiting.len() as u64;
    let late = (last, Duration::from_millis(20));
    let late = notifying_write(bench, &*memory, &place, late)?;
    data_goes_on(bench)?;
    expect_failure(&late, ErrorKind::Timeout)?;
    // Every other one is given up, of each kind.
    let (mut kept, mut numbers) = (Vec::new(), BTreeSet::new());
    for (number, request) in (0..).zip(waiting) {
        if !matches!(request.poll(), Status::InFlight) {
            let text = format!("the inbox is full, and yet number {number} is {request:?}");
            return Err(broken(text));
        }
        if number % 2 == 0 {
            request.cancel();
            expect_failure(&request, ErrorKind::Cancelled)?;
        } else {
            kept.push(request);
            numbers.insert(number);
        }
    }
    data_goes_on(bench)?;
    let taken = peer.take(Duration::ZERO)?;
    if taken.iter().map(Bytes::len).sum::<usize>() != INBOX_BYTES_MAX {
        return Err(broken(
            "the inbox held something else than it was filled with",
        ));
    }
    take_all(peer, last, numbers)?;
    for request in &kept {
        bench.finish(request)?;
    }
    let marker = bench.agent().notify(&handle, numbered(last + 1, 8))?;
    take_all(peer, last, [last + 1].into())?;
    bench.finish(&marker)?;
    let after = peer.turned_away()?;
    if after.0 == held_back {
        return Err(broken("nothing that waited for room is counted"));
    }
    if after.1 != refused {
        return Err(broken("notifications were refused"));
    }
    Ok(Verdict::Held)
}

fn numbered(number: u64, len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes.into()
}

fn fill(agent: &Agent, peer: &PeerHandle) -> Result<()> {
    let bytes = Bytes::from(vec![0; NOTIFICATION_BYTES_MAX]);
    for _ in 0..INBOX_BYTES_MAX / NOTIFICATION_BYTES_MAX {
        agent.notify(peer, bytes.clone())?.wait(PATIENCE)?;
    }
    Ok(())
}

fn notifying_write(
    bench: &Bench<'_>,
    memory: &dyn Memory,
    place: &Place,
    (number, deadline): (u64, Duration),
) -> Result<Request> {
    let options = RequestOptions {
        notification: Some(numbered(number, 8)),
        deadline: Some(deadline),
        ..RequestOptions::default()
    };
    let range: &[(u64, u64)] = &[(0, WRITE_BYTES)];
    let request = bench.request(Write, (memory, range), (place, range), options)?;
    request.post()?;
    Ok(request)
}

fn data_goes_on(bench: &Bench<'_>) -> Result<()> {
    let memory = bench.memory(WRITE_BYTES)?;
    let place = bench.fixture.place(WRITE_BYTES)?;
    let range: &[(u64, u64)] = &[(0, WRITE_BYTES)];
    let bytes = pattern(31, WRITE_BYTES);
    memory.write_at(0, &bytes)?;
    bench.transfer(Write, (&*memory, range), (&place, range))?;
    memory.fill_at(0, WRITE_BYTES, 0)?;
    bench.transfer(Read, (&*memory, range), (&place, range))?;
    expect(&*memory, 0, &bytes).map_err(|error| error.at("while the inbox is full"))
}

fn expect_failure(request: &Request, kind: ErrorKind) -> Result<()> {
    match request.wait(PATIENCE) {
        Err(failed) if failed.kind() == kind => {}
        Err(failed) => return Err(failed.into()),
        Ok(_) => return Err(broken("a notification without room is done")),
    }
    match request.wait_drained(PATIENCE) {
        true => Ok(()),
        false => Err(broken("who waits for room and is given up does not drain")),
    }
}

/// Takes notifications until these have come, each once; those before `last` that were given up may come too.
fn take_all(peer: &dyn Receiver, last: u64, mut numbers: BTreeSet<u64>) -> Result<()> {
    let mut seen = BTreeSet::new();
    while !numbers.is_empty() {
        let taken = peer.take(PATIENCE)?;
        if taken.is_empty() {
            return Err(broken(format!(
                "{} notifications do not come",
                numbers.len()
            )));
        }
        for one in taken {
            let number = one.first_chunk::<8>().copied().map(u64::from_le_bytes);
            let number = number.filter(|number| seen.insert(*number));
            match number {
                Some(number) if numbers.remove(&number) || number <= last => {}
                _ => return Err(broken("a notification came twice, or from nowhere")),
            }
        }
    }
    Ok(())
}
