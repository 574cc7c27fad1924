//! Memory of GPUs between processes, and between GPUs: skipped where there is no GPU, or only one, in one line that says why.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a test fails by panicking, says what it skips, and the other process speaks by printing"
)]

mod support;

use std::process::Command;

use kvfabric_transfer::{
    Agent, CudaOptions, Descriptor, DeviceMemory, HostMemory, Operation, PeerHandle, Region,
    RegionId, RegionOptions, RequestOptions, Side, cuda_probe,
};

use support::child::{Again, ROLE, hex, unhex};
use support::{OPEN, WAIT, contents, pattern};

const BYTES: u64 = 8 << 20;
const SEED: u64 = 7;

/// How many GPUs there are; says why too few, once for each test.
fn has_gpus(wanted: usize) -> bool {
    match cuda_probe() {
        Ok(report) if report.devices.len() >= wanted => true,
        Ok(report) => {
            let count = report.devices.len();
            eprintln!("SKIPPED, and so not tested: CUDA between {wanted} GPUs (there are {count})");
            false
        }
        Err(error) => {
            eprintln!("SKIPPED, and so not tested: CUDA between processes on a GPU ({error})");
            false
        }
    }
}

/// An agent with memory of a GPU, and as much of the host.
struct Node {
    agent: Agent,
    device: Region,
    host: Region,
}

impl Node {
    fn new(gpu: u32) -> Self {
        let cuda = Some(CudaOptions::default());
        let agent = Agent::builder(&format!("gpu-{}", std::process::id()));
        let agent = agent.cuda(cuda).build().unwrap();
        let memory = DeviceMemory::allocate(gpu, BYTES).unwrap();
        let host = HostMemory::anonymous(BYTES).unwrap();
        Self {
            device: agent.register_device_with(memory, OPEN).unwrap(),
            host: agent.register(host, RegionOptions::default()).unwrap(),
            agent,
        }
    }

    fn go(&self, operation: Operation, pair: (Descriptor, Descriptor), side: Side<'_>) {
        let options = RequestOptions::default();
        let request = self.agent.transfer(operation, &[pair], side, options);
        let done = request.unwrap().wait(WAIT).unwrap();
        assert_eq!(done.backend, "cuda");
    }

    fn all(&self) -> (Descriptor, Descriptor) {
        (
            self.host.descriptor(0, BYTES),
            self.device.descriptor(0, BYTES),
        )
    }

    fn put(&self, seed: u64) {
        self.host
            .write_at(0, &pattern(BYTES as usize, seed))
            .unwrap();
        self.go(Operation::Write, self.all(), Side::Local);
    }

    fn get(&self) -> Vec<u8> {
        self.go(Operation::Read, self.all(), Side::Local);
        contents(&self.host)
    }
}

/// The body of the other process; in the process that runs all tests there is nothing to do.
#[test]
fn the_other_process() {
    if std::env::var(ROLE).is_err() {
        return;
    }
    let node = Node::new(0);
    node.put(SEED);
    println!("REGION {}", node.device.id().0);
    println!("METADATA {}", hex(&node.agent.metadata()));
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "look" => assert!(node.get() == pattern(BYTES as usize, SEED + 1)),
            "deregister" => node.device.deregister().wait(WAIT).unwrap(),
            other => panic!("{other}"),
        }
        println!("DONE");
    }
}

fn far(region: RegionId) -> Descriptor {
    Descriptor {
        region,
        offset: 0,
        len: BYTES,
    }
}

/// The other process's memory is read into the host's, written from this one's of the GPU, found there, and given back.
#[test]
fn another_process_shares_its_memory_of_a_gpu() {
    if !has_gpus(1) {
        return;
    }
    let program = Command::new(std::env::current_exe().unwrap());
    let mut other = Again::run(program, "the_other_process", "owner", &[]);
    let region = RegionId(other.expect("REGION ").parse().unwrap());
    let node = Node::new(0);
    let metadata = unhex(&other.expect("METADATA "));
    let peer: PeerHandle = node.agent.load_peer(&metadata).unwrap();
    let pair = (node.host.descriptor(0, BYTES), far(region));
    node.go(Operation::Read, pair, Side::Peer(&peer));
    assert!(contents(&node.host) == pattern(BYTES as usize, SEED));
    node.put(SEED + 1);
    let pair = (node.device.descriptor(0, BYTES), far(region));
    node.go(Operation::Write, pair, Side::Peer(&peer));
    other.ask("look", "DONE");
    other.ask("deregister", "DONE");
}

/// With peer access or without, which is said.
#[test]
fn bytes_go_from_gpu_to_gpu() {
    if !has_gpus(2) {
        return;
    }
    let node = Node::new(0);
    let memory = DeviceMemory::allocate(1, BYTES).unwrap();
    let second = node.agent.register_device(memory).unwrap();
    node.put(SEED);
    let there = (
        node.device.descriptor(0, BYTES),
        second.descriptor(0, BYTES),
    );
    node.go(Operation::Write, there, Side::Local);
    node.put(SEED + 1);
    node.go(Operation::Read, there, Side::Local);
    assert!(node.get() == pattern(BYTES as usize, SEED));
    let paths = node.agent.device_paths();
    eprintln!("between GPUs: {paths:?}");
    assert_eq!(paths.len(), 2);
}
