//! What every backend must do, as one suite: run it with a [`Fixture`] for the backend.
//!
//! A case that a backend breaks is an error naming the backend, the case and what was found; nothing here panics or
//! waits without a limit. Cases about deadlines and cancelling accept that a fast backend is done first; then what they
//! check is that nothing hangs, leaks or tears.

mod cases;
mod endings;
mod fixture;
mod inbox;

use std::time::Duration;

use bytes::Bytes;
use kvcache_core::{Error, ErrorKind, Result};

use crate::agent::{Agent, PeerHandle};
use crate::backend::Operation;
use crate::descriptor::{Descriptor, PreparedList, Side};
use crate::region::{Deregistration, MemoryKind, Region, RegionId, RegionOptions};
use crate::request::{Request, RequestOptions};
use crate::sys::memory::HostMemory;

pub use fixture::{FileFixture, ObjectFixture, PeerFixture};

/// The longest that the suite waits for any one thing: far beyond what a loaded machine needs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A place as its owner sees it, who may be another process; kept for as long as the place is used.
pub trait Owned {
    /// Its name in descriptors.
    fn id(&self) -> RegionId;

    /// What kind of place it is.
    fn kind(&self) -> MemoryKind;

    /// What it holds from `offset` on.
    ///
    /// # Errors
    /// As [`Region::read_at`], and whatever keeps the owner from telling.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()>;
}

impl Owned for Region {
    fn id(&self) -> RegionId {
        Region::id(self)
    }

    fn kind(&self) -> MemoryKind {
        Region::kind(self)
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        Region::read_at(self, offset, bytes)
    }
}

/// Memory on the side that makes the requests.
pub trait Memory: Owned {
    /// Changes what it holds from `offset` on.
    ///
    /// # Errors
    /// As [`Region::write_at`].
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// As [`Region::deregister`].
    fn deregister(&self) -> Deregistration;

    /// Sets `len` bytes from `offset` on to `value`.
    ///
    /// # Errors
    /// As [`Region::write_at`].
    fn fill_at(&self, offset: u64, len: u64, value: u8) -> Result<()> {
        self.write_at(offset, &vec![value; len as usize])
    }
}

impl Memory for Region {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        Region::write_at(self, offset, bytes)
    }

    fn deregister(&self) -> Deregistration {
        Region::deregister(self)
    }

    fn fill_at(&self, offset: u64, len: u64, value: u8) -> Result<()> {
        Region::fill_at(self, offset, len, value)
    }
}

/// Who gets notifications, and may be another process.
pub trait Receiver {
    /// Those that have come, as they were sent; waits at most `timeout` for the first.
    ///
    /// # Errors
    /// Whatever keeps the receiver from telling.
    fn take(&self, timeout: Duration) -> Result<Vec<Bytes>>;

    /// How many notifications had to wait for room so far, and how many were refused.
    ///
    /// # Errors
    /// As [`Receiver::take`].
    fn turned_away(&self) -> Result<(u64, u64)>;
}

impl Receiver for Agent {
    fn take(&self, timeout: Duration) -> Result<Vec<Bytes>> {
        let taken = self.wait_notifications(timeout).into_iter();
        Ok(taken.map(|notification| notification.bytes).collect())
    }

    fn turned_away(&self) -> Result<(u64, u64)> {
        let stats = self.stats();
        Ok((stats.notifications_held_back, stats.notifications_refused))
    }
}

/// A remote place of some bytes that a fixture made.
pub struct Place {
    /// The place as its owner sees it.
    pub owner: Box<dyn Owned>,
    /// Through whom it is reached; none when it is the agent's own.
    pub peer: Option<PeerHandle>,
}

/// Gives the suite a backend to work with.
pub trait Fixture {
    /// The name that completions and statistics must carry.
    fn backend(&self) -> &'static str;

    /// Who makes the requests.
    fn agent(&self) -> &Agent;

    /// Who gets notifications; none where the backend carries none.
    fn peer(&self) -> Option<&dyn Receiver>;

    /// A new remote place of `bytes`.
    ///
    /// # Errors
    /// Whatever keeps it from being made.
    fn place(&self, bytes: u64) -> Result<Place>;

    /// The ways that requests name, where the agent might take others; none if it has no others.
    fn ways(&self) -> Vec<String> {
        Vec::new()
    }

    /// New local memory of `bytes`: of the host, and shareable, so that no backend is left out, unless the fixture has another kind.
    ///
    /// # Errors
    /// Whatever keeps it from being made.
    fn memory(&self, bytes: u64) -> Result<Box<dyn Memory>> {
        let memory = HostMemory::shared(bytes)?;
        let region = self.agent().register(memory, RegionOptions::default())?;
        Ok(Box::new(region))
    }

    /// Whether a write replaces the whole place, so that its descriptors must cover it from 0 on.
    fn writes_whole(&self) -> bool {
        false
    }
}

/// What the suite did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Cases that held.
    pub passed: Vec<&'static str>,
    /// Cases that do not apply to the backend.
    pub skipped: Vec<&'static str>,
}

/// What a case found.
enum Verdict {
    Held,
    DoesNotApply,
}

type Case = fn(&Bench<'_>) -> Result<Verdict>;

const CASES: [(&str, Case); 14] = [
    ("sizes from 1 B to 4 MiB survive a round trip", cases::sizes),
    ("any alignment of memory and place works", cases::alignment),
    (
        "scattered ranges go where they belong and nowhere else",
        cases::scattered,
    ),
    (
        "thousands of descriptors make one request",
        cases::many_descriptors,
    ),
    (
        "empty, unpaired and out-of-range descriptors are refused",
        cases::refusals,
    ),
    ("requests run concurrently", cases::concurrent),
    ("a request can be posted again", cases::repost),
    ("a notification comes after the data", cases::notification),
    (
        "a full inbox holds back its senders, and nothing else",
        inbox::full,
    ),
    (
        "checksums are compared, or refused with the reason",
        cases::checksums,
    ),
    (
        "deregistering waits for requests and refuses new ones",
        endings::deregister,
    ),
    (
        "a deadline ends a request, and its memory drains",
        endings::deadline,
    ),
    (
        "cancelling ends a request, and its memory drains",
        endings::cancel,
    ),
    ("statistics count exactly what was moved", cases::stats),
];

/// Runs every case.
///
/// # Errors
/// The first case that does not hold, with the backend and what was found.
pub fn run(fixture: &dyn Fixture) -> Result<Report> {
    let mut report = Report::default();
    let bench = Bench { fixture };
    for (name, case) in CASES {
        let place = format!("backend {}: {name}", fixture.backend());
        match case(&bench).map_err(|error| error.at(place))? {
            Verdict::Held => report.passed.push(name),
            Verdict::DoesNotApply => report.skipped.push(name),
        }
    }
    Ok(report)
}

/// A broken promise.
fn broken(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Internal, text.into())
}

/// What the cases share.
struct Bench<'a> {
    fixture: &'a dyn Fixture,
}

impl Bench<'_> {
    fn agent(&self) -> &Agent {
        self.fixture.agent()
    }

    fn memory(&self, bytes: u64) -> Result<Box<dyn Memory>> {
        self.fixture.memory(bytes)
    }

    fn list(&self, place: &Place, ranges: &[(u64, u64)]) -> Result<PreparedList> {
        let side = place.peer.as_ref().map_or(Side::Local, Side::Peer);
        self.agent()
            .prepare(side, &descriptors(place.owner.id(), ranges))
    }

    fn request(
        &self,
        operation: Operation,
        local: (&dyn Memory, &[(u64, u64)]),
        remote: (&Place, &[(u64, u64)]),
        options: RequestOptions,
    ) -> Result<Request> {
        let locals = self
            .agent()
            .prepare(Side::Local, &descriptors(local.0.id(), local.1))?;
        let remotes = self.list(remote.0, remote.1)?;
        let options = RequestOptions {
            backends: self.fixture.ways(),
            ..options
        };
        self.agent().request(operation, &locals, &remotes, options)
    }

    /// Makes, posts and waits.
    fn transfer(
        &self,
        operation: Operation,
        local: (&dyn Memory, &[(u64, u64)]),
        remote: (&Place, &[(u64, u64)]),
    ) -> Result<()> {
        let request = self.request(operation, local, remote, RequestOptions::default())?;
        request.post()?;
        self.finish(&request)
    }

    /// Waits for success and checks what is told about it.
    fn finish(&self, request: &Request) -> Result<()> {
        let done = request.wait(PATIENCE)?;
        if done.backend != self.fixture.backend() {
            return Err(broken(format!("{} moved the bytes", done.backend)));
        }
        if done.bytes != request.bytes() {
            return Err(broken(format!(
                "{} of {} bytes are told",
                done.bytes,
                request.bytes()
            )));
        }
        if !request.wait_drained(PATIENCE) {
            return Err(broken("a request that is done does not drain"));
        }
        Ok(())
    }
}

fn descriptors(region: RegionId, ranges: &[(u64, u64)]) -> Vec<Descriptor> {
    let descriptor = |(offset, len): &(u64, u64)| Descriptor {
        region,
        offset: *offset,
        len: *len,
    };
    ranges.iter().map(descriptor).collect()
}

/// Bytes that tell their position and their seed.
fn pattern(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len as usize + 8);
    while bytes.len() < len as usize {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

/// Compares a range of a place with what it should hold.
fn expect(region: &dyn Owned, offset: u64, expected: &[u8]) -> Result<()> {
    let mut found = vec![0; expected.len()];
    region.read_at(offset, &mut found)?;
    match found
        .iter()
        .zip(expected)
        .position(|(found, expected)| found != expected)
    {
        None => Ok(()),
        Some(at) => {
            let (found, expected) = (found[at], expected[at]);
            let text = format!(
                "the byte at {} is {found:#04x}, not {expected:#04x}",
                offset + at as u64
            );
            Err(broken(text))
        }
    }
}
