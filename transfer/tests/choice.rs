//! Which way a request takes when it, or its agent, is told; and what it is expected to take.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod support;

use std::time::Duration;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, AgentBuilder, HostMemory, Operation, PathCost, Priority, Request, RequestOptions, Side,
};

use support::{OPEN, Pair, WAIT, Way, loopback};

/// Agents that have shared memory and TCP.
fn both(name: &str) -> AgentBuilder {
    Agent::builder(name)
        .memcpy(false)
        .cma(false)
        .tcp(Some(loopback()))
}

fn pair(initiator: AgentBuilder) -> Pair {
    let target = both("target").build().unwrap();
    Pair::of(initiator.build().unwrap(), target, 1 << 20, OPEN)
}

fn over(backends: &[&str]) -> RequestOptions {
    RequestOptions {
        backends: backends.iter().map(|&name| name.to_owned()).collect(),
        ..RequestOptions::default()
    }
}

fn request(pair: &Pair, bytes: u64, options: RequestOptions) -> kvcache_core::Result<Request> {
    let agent = &pair.initiator;
    let local = agent.prepare(Side::Local, &[pair.local.descriptor(0, bytes)])?;
    let remote = agent.prepare(Side::Peer(&pair.peer), &[pair.remote.descriptor(0, bytes)])?;
    agent.request(Operation::Read, &local, &remote, options)
}

fn moved_over(pair: &Pair, options: RequestOptions) -> &'static str {
    let request = request(pair, 4096, options).unwrap();
    request.post().unwrap();
    request.wait(WAIT).unwrap().backend
}

/// The agent's order decides, whatever is connected already; a request's wish restricts it.
#[test]
fn an_agent_takes_the_way_that_it_prefers() {
    let usual = pair(both("initiator"));
    assert_eq!(moved_over(&usual, RequestOptions::default()), "shm");
    assert_eq!(moved_over(&usual, over(&["tcp"])), "tcp");
    assert_eq!(moved_over(&usual, over(&["tcp", "shm"])), "shm");
    assert_eq!(moved_over(&usual, RequestOptions::default()), "shm");
    let other = pair(both("initiator").prefer(["tcp"]));
    assert_eq!(moved_over(&other, RequestOptions::default()), "tcp");
    assert_eq!(moved_over(&other, over(&["shm"])), "shm");
    assert_eq!(other.initiator.path_to(&other.peer).backend, Some("tcp"));
}

/// A name that is no way of the agent's, and a way that does not reach the region.
#[test]
fn a_wish_that_cannot_be_met_is_refused_with_the_reason() {
    let unknown = both("initiator").prefer(["ucx"]).build().unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::Invalid);
    assert!(unknown.to_string().contains("shm, tcp"), "{unknown}");

    let pair = pair(both("initiator"));
    let unknown = request(&pair, 64, over(&["ucx"])).unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::Invalid);
    assert!(unknown.to_string().contains("\"ucx\""), "{unknown}");

    let own = HostMemory::anonymous(4096).unwrap();
    let own = pair.target.register(own, OPEN).unwrap();
    let peer = pair.initiator.load_peer(&pair.target.metadata()).unwrap();
    let ask = |options| {
        let pairs = [(pair.local.descriptor(0, 64), own.descriptor(0, 64))];
        let agent = &pair.initiator;
        agent.transfer(Operation::Read, &pairs, Side::Peer(&peer), options)
    };
    let refused = ask(over(&["shm"])).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    let text = refused.to_string();
    assert!(text.contains("is not in shared memory"), "{text}");
    assert!(
        text.contains("tcp: the request wants other backends"),
        "{text}"
    );
    // What one request did not get is no reason for others.
    let done = ask(RequestOptions::default()).unwrap().wait(WAIT).unwrap();
    assert_eq!(done.backend, "tcp");

    let pairs = [(pair.local.descriptor(0, 64), pair.local.descriptor(64, 64))];
    let copy = |options| {
        let agent = &pair.initiator;
        agent.transfer(Operation::Read, &pairs, Side::Local, options)
    };
    let refused = copy(over(&["tcp"])).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    copy(over(&["memcpy"])).unwrap().wait(WAIT).unwrap();
}

/// Before anything was moved it is what was assumed; afterwards it is not, for this size and for others.
#[test]
fn an_estimate_is_what_was_assumed_until_something_was_measured() {
    let slow = PathCost {
        latency: Duration::from_secs(1_000),
        bytes_per_s: 1 << 10,
    };
    let pair = pair(both("initiator").assume_cost("shm", slow));
    let small = request(&pair, 1 << 10, RequestOptions::default()).unwrap();
    let large = request(&pair, 1 << 20, RequestOptions::default()).unwrap();
    let expected = small.estimate().unwrap();
    assert_eq!((expected.backend, expected.measured), ("shm", false));
    assert_eq!(expected.expected.as_secs(), 1_001);
    assert_eq!(large.estimate().unwrap().expected.as_secs(), 2_024);
    for _ in 0..20 {
        small.post().unwrap();
        small.wait(WAIT).unwrap();
    }
    let expected = small.estimate().unwrap();
    assert!(expected.measured);
    assert!(expected.expected < Duration::from_secs(500), "{expected:?}");
    let (small, large) = (expected.expected, large.estimate().unwrap());
    assert!(!large.measured);
    assert!(
        large.expected > small && large.expected < small * 3,
        "{large:?} {small:?}"
    );
}

/// The way, why a better one is not taken, and the rate that holds the request back.
#[test]
fn an_estimate_tells_the_way_and_what_holds_it_back() {
    let pair = pair(both("initiator"));
    let other = request(&pair, 1 << 20, over(&["tcp"])).unwrap();
    let expected = other.estimate().unwrap();
    assert_eq!(expected.backend, "tcp");
    let reason = "the request wants other backends".to_owned();
    assert_eq!(expected.refused, [("shm", reason)]);
    pair.initiator
        .set_rate(Priority::Normal, Some(1 << 10))
        .unwrap();
    assert_eq!(other.estimate().unwrap().expected.as_secs(), 1 << 10);

    let refused = pair_without_bandwidth();
    assert_eq!(refused, ErrorKind::Invalid);
}

fn pair_without_bandwidth() -> ErrorKind {
    let none = PathCost {
        latency: Duration::ZERO,
        bytes_per_s: 0,
    };
    let builder = Way::Shm.builder("initiator").assume_cost("shm", none);
    builder.build().unwrap_err().kind()
}
