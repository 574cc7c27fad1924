//! What an agent costs while there is nothing to do. Alone in its process, so that no other test's threads count.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::thread;
use std::time::Duration;

use kvfabric_transfer::{
    Agent, AgentBuilder, HostMemory, Operation, Region, Request, RequestOptions, Side, UcxOptions,
};

use support::{OPEN, WAIT, loopback};

/// How often the threads of agents have gone to sleep or were sent to sleep so far.
fn switches() -> u64 {
    let mut switches = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        // A thread may end while the folder is read.
        let Ok(status) = std::fs::read_to_string(task.unwrap().path().join("status")) else {
            continue;
        };
        let value = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap().trim().to_owned()
        };
        if value("Name:").starts_with("kvf-") {
            switches += value("voluntary_ctxt_switches:").parse::<u64>().unwrap();
            switches += value("nonvoluntary_ctxt_switches:").parse::<u64>().unwrap();
        }
    }
    switches
}

/// A pair of agents, connected and used, with everything that was made for it.
struct Used {
    agents: [Agent; 2],
    regions: Vec<Region>,
    requests: Vec<Request>,
}

/// Reads a shared and a private region, with requests that wait for a deadline far away.
fn use_both_kinds(name: &str, build: impl Fn(AgentBuilder) -> AgentBuilder) -> Used {
    let [initiator, target] = ["initiator", "target"].map(|role| {
        let builder = Agent::builder(&format!("{name}-{role}")).memcpy(false);
        build(builder).build().unwrap()
    });
    let own = initiator
        .register(HostMemory::anonymous(1 << 20).unwrap(), OPEN)
        .unwrap();
    let shared = target
        .register(HostMemory::shared(1 << 20).unwrap(), OPEN)
        .unwrap();
    let private = target
        .register(HostMemory::anonymous(1 << 20).unwrap(), OPEN)
        .unwrap();
    let peer = initiator.load_peer(&target.metadata()).unwrap();
    let mut requests = Vec::new();
    for region in [&shared, &private] {
        let pairs = [(own.descriptor(0, 1 << 20), region.descriptor(0, 1 << 20))];
        let options = RequestOptions {
            deadline: Some(Duration::from_secs(3600)),
            ..RequestOptions::default()
        };
        let request = initiator
            .transfer(Operation::Read, &pairs, Side::Peer(&peer), options)
            .unwrap();
        request.event_fd().unwrap();
        request.wait(WAIT).unwrap();
        requests.push(request);
    }
    target.notification_fd().unwrap();
    Used {
        agents: [initiator, target],
        regions: vec![own, shared, private],
        requests,
    }
}

/// Two agents with every way between them, and two with UCX alone, connected, used, with their descriptors made. In some
/// stretch of time none of their threads runs even once; one that polled would run in each.
#[test]
fn the_threads_of_idle_agents_do_not_wake_up() {
    let all = use_both_kinds("all", |builder| builder.tcp(Some(loopback())).cma(true));
    let ucx = use_both_kinds("ucx", |builder| {
        builder.shm(false).ucx(Some(UcxOptions::default()))
    });
    let used = switches();
    assert!(used > 0, "no thread of an agent was found");
    let quiet = (0..20).any(|_| {
        let before = switches();
        thread::sleep(Duration::from_millis(500));
        switches() == before
    });
    assert!(quiet, "{used} switches before, {} now", switches());
    for pair in [all, ucx] {
        assert_eq!(
            (pair.agents.len(), pair.regions.len(), pair.requests.len()),
            (2, 3, 2)
        );
    }
}
