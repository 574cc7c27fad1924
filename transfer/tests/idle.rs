//! What an agent costs while there is nothing to do. Alone in its process, so that no other test's threads count.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::thread;
use std::time::Duration;

use kvfabric_transfer::{Agent, HostMemory, Operation, RequestOptions, Side};

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

/// Two agents with every way between them, connected, used, with their descriptors made, and a request that waits for a
/// deadline far away. In some stretch of time none of their threads runs even once; one that polled would run in each.
#[test]
fn the_threads_of_idle_agents_do_not_wake_up() {
    let build = |name| {
        let builder = Agent::builder(name).memcpy(false).tcp(Some(loopback()));
        builder.cma(true).build().unwrap()
    };
    let (initiator, target) = (build("initiator"), build("target"));
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
    let used = switches();
    assert!(used > 0, "no thread of an agent was found");
    let quiet = (0..20).any(|_| {
        let before = switches();
        thread::sleep(Duration::from_millis(500));
        switches() == before
    });
    assert!(quiet, "{used} switches before, {} now", switches());
}
