//! CUDA, over a real GPU: skipped where there is none, in one line that says why.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says what it skips"
)]

use std::time::Duration;

use kvcache_core::{ErrorKind, Result};
use kvfabric_transfer::backend::conformance::{Fixture, Place, run};
use kvfabric_transfer::{
    Agent, CudaOptions, DeviceMemory, HostMemory, MemoryKind, Operation, RegionOptions,
    RequestOptions, Side, cuda_probe,
};

const WAIT: Duration = Duration::from_secs(60);

/// Whether there is a GPU; says why not, once for each test.
fn has_gpu() -> bool {
    match cuda_probe() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("SKIPPED, and so not tested: CUDA on a GPU ({error})");
            false
        }
    }
}

fn agent(options: CudaOptions) -> Agent {
    Agent::builder("cuda").cuda(Some(options)).build().unwrap()
}

/// What the probe says is what an agent says; and one that does not ask for CUDA is made all the same.
#[test]
fn an_agent_says_why_there_is_no_cuda() {
    let built = Agent::builder("cuda")
        .cuda(Some(CudaOptions::default()))
        .build();
    match cuda_probe() {
        Ok(report) => {
            assert!(!report.devices.is_empty());
            built.unwrap();
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            let said = built.unwrap_err();
            assert_eq!(said.kind(), ErrorKind::Unsupported);
            assert_eq!(said.to_string(), error.to_string());
            let said = DeviceMemory::allocate(0, 4096).unwrap_err();
            assert_eq!(said.to_string(), error.to_string());
        }
    }
    Agent::builder("plain").build().unwrap();
}

struct OnDevice(Agent);

impl Fixture for OnDevice {
    fn backend(&self) -> &'static str {
        "cuda"
    }

    fn agent(&self) -> &Agent {
        &self.0
    }

    fn peer(&self) -> Option<&Agent> {
        None
    }

    fn place(&self, bytes: u64) -> Result<Place> {
        Ok(Place {
            owner: self.0.register_device(DeviceMemory::allocate(0, bytes)?)?,
            peer: None,
        })
    }
}

/// With pinned memory, and through buffers.
#[test]
fn a_gpu_conforms() {
    if !has_gpu() {
        return;
    }
    for pin in [true, false] {
        let options = CudaOptions {
            pin,
            ..CudaOptions::default()
        };
        let report = run(&OnDevice(agent(options))).unwrap_or_else(|error| panic!("{error}"));
        // What needs a peer, and what devices do not compute.
        let missing = ["notification", "inbox", "checksums"];
        for case in &report.skipped {
            assert!(missing.iter().any(|word| case.contains(word)), "{case}");
        }
    }
}

/// From host memory to the device, within it, and back: each byte is where it belongs.
#[test]
fn scattered_ranges_go_through_a_gpu_unchanged() {
    const COUNT: u64 = 3000;
    const LEN: u64 = 2056;
    if !has_gpu() {
        return;
    }
    let agent = agent(CudaOptions::default());
    let device = || {
        let memory = DeviceMemory::allocate(0, COUNT * LEN).unwrap();
        agent.register_device(memory).unwrap()
    };
    let (first, second) = (device(), device());
    assert_eq!(first.kind(), MemoryKind::Device { ordinal: 0 });
    let host = || {
        let memory = HostMemory::anonymous(COUNT * LEN).unwrap();
        agent.register(memory, RegionOptions::default()).unwrap()
    };
    let (from, back) = (host(), host());
    let sent: Vec<u8> = (0..COUNT * LEN)
        .map(|at| (at % 251) as u8 ^ (at / LEN) as u8)
        .collect();
    from.write_at(0, &sent).unwrap();
    // 1571 and 3000 have no common divisor.
    let scattered = |n: u64| n * 1571 % COUNT * LEN;
    for (operation, local, remote) in [
        (Operation::Write, &from, &first),
        (Operation::Write, &first, &second),
        (Operation::Read, &back, &second),
    ] {
        let pairs: Vec<_> = (0..COUNT)
            .map(|n| match operation {
                Operation::Write => (
                    local.descriptor(n * LEN, LEN),
                    remote.descriptor(scattered(n), LEN),
                ),
                Operation::Read => (
                    local.descriptor(n * LEN, LEN),
                    remote.descriptor(scattered(scattered(n) / LEN), LEN),
                ),
            })
            .collect();
        let options = RequestOptions::default();
        let request = agent
            .transfer(operation, &pairs, Side::Local, options)
            .unwrap();
        assert_eq!(request.wait(WAIT).unwrap().backend, "cuda");
    }
    let mut found = vec![0; sent.len()];
    back.read_at(0, &mut found).unwrap();
    assert!(found == sent);
    for region in [from, back, first, second] {
        region.deregister().wait(WAIT).unwrap();
    }
}
