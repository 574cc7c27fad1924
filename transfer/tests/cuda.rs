//! CUDA, over a real GPU: skipped where there is none, in one line that says why.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says what it skips"
)]

use std::time::Duration;

use kvcache_core::shape::reshard::PageOrder;
use kvcache_core::{ErrorKind, Result};
use kvfabric_transfer::backend::conformance::{Fixture, Place, Receiver, run};
use kvfabric_transfer::convert::{Grid, PageHeads, bf16s_of_e4m3, e4m3s_of_bf16};
use kvfabric_transfer::{
    Agent, CudaKernels, CudaOptions, DeviceMemory, FileOptions, Fragments, HostMemory, MemoryKind,
    NumberGroups, Operation, Region, RegionOptions, RequestOptions, Side, cuda_probe,
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

    fn peer(&self) -> Option<&dyn Receiver> {
        None
    }

    fn place(&self, bytes: u64) -> Result<Place> {
        Ok(Place {
            owner: Box::new(self.0.register_device(DeviceMemory::allocate(0, bytes)?)?),
            peer: None,
        })
    }
}

/// With pinned memory, and through buffers; with the driver's copies, with the kernel for small ranges, and with whoever is faster.
#[test]
fn a_gpu_conforms() {
    if !has_gpu() {
        return;
    }
    let kernel = Fragments::Kernel {
        up_to_bytes: 64 << 10,
    };
    for (pin, fragments) in [
        (true, Fragments::Copies),
        (false, Fragments::Copies),
        (true, kernel),
        (false, kernel),
        (true, Fragments::Measured),
    ] {
        let options = CudaOptions {
            pin,
            fragments,
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

/// From host memory to the device, within it, and back: each byte is where it belongs, whoever copies.
#[test]
fn scattered_ranges_go_through_a_gpu_unchanged() {
    if !has_gpu() {
        return;
    }
    for fragments in [
        Fragments::Copies,
        Fragments::Kernel { up_to_bytes: 4096 },
        Fragments::Measured,
    ] {
        scatter(fragments);
    }
}

fn scatter(fragments: Fragments) {
    const COUNT: u64 = 3000;
    const LEN: u64 = 2056;
    let agent = agent(CudaOptions {
        fragments,
        ..CudaOptions::default()
    });
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

/// Memory of the device and of the host, of one size, and copies between them.
struct Pair {
    agent: Agent,
    device: Region,
    host: Region,
}

impl Pair {
    fn new(bytes: u64) -> Self {
        let agent = agent(CudaOptions::default());
        let device = DeviceMemory::allocate(0, bytes).unwrap();
        let host = HostMemory::anonymous(bytes).unwrap();
        Self {
            device: agent.register_device(device).unwrap(),
            host: agent.register(host, RegionOptions::default()).unwrap(),
            agent,
        }
    }

    fn go(&self, operation: Operation) {
        let all = self.host.bytes();
        let pair = (self.host.descriptor(0, all), self.device.descriptor(0, all));
        let request = self
            .agent
            .transfer(operation, &[pair], Side::Local, RequestOptions::default())
            .unwrap();
        request.wait(WAIT).unwrap();
    }

    /// Has the device hold these bytes from its start on, and zeros behind them.
    fn put(&self, bytes: &[u8]) {
        self.host.fill_at(0, self.host.bytes(), 0).unwrap();
        self.host.write_at(0, bytes).unwrap();
        self.go(Operation::Write);
    }

    fn get(&self) -> Vec<u8> {
        self.go(Operation::Read);
        let mut bytes = vec![0; self.host.bytes() as usize];
        self.host.read_at(0, &mut bytes).unwrap();
        bytes
    }
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 29) as u8
    };
    (0..bytes).map(next).collect()
}

/// Ranges of all alignments and of many lengths, up to a block of 4 MiB.
#[test]
fn a_gpu_sums_as_the_tiers_do() {
    if !has_gpu() {
        return;
    }
    let pair = Pair::new(5 << 20);
    pair.put(&noise(5 << 20));
    let mut ranges: Vec<(u64, u64)> = (0..3000).map(|n| (n * 17, n * n % 70_001)).collect();
    ranges.extend([(0, 4 << 20), (3, (4 << 20) + 9), (9, 0), (7, 1)]);
    let kernels = CudaKernels::load(0).unwrap();
    let sums = kernels.checksums(&pair.device, &ranges, WAIT).unwrap();
    for ((offset, len), sum) in ranges.into_iter().zip(sums) {
        assert_eq!(
            sum,
            pair.host.checksum(offset, len).unwrap(),
            "{offset}+{len}"
        );
    }
}

/// All bit patterns of a bfloat16, in groups of several lengths, and all 8-bit numbers by scales of many sizes.
#[test]
fn a_gpu_rounds_as_the_reference_does() {
    const COUNT: usize = 1 << 16;
    if !has_gpu() {
        return;
    }
    let pair = Pair::new(1 << 20);
    let kernels = CudaKernels::load(0).unwrap();
    let mixed = noise(COUNT * 2);
    let mixed = mixed.chunks(2).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    let all = 0..=u16::MAX;
    for (values, length) in [
        (all.clone().collect::<Vec<u16>>(), 128),
        (all.collect(), 1),
        (mixed.clone().collect(), 64),
        (mixed.map(|bits| bits & 0xbfff).collect(), 4096),
    ] {
        let bytes: Vec<u8> = values
            .iter()
            .flat_map(|value| value.to_ne_bytes())
            .collect();
        pair.put(&bytes);
        let (numbers_at, scales_at, back_at) = (COUNT * 2, COUNT * 3, COUNT * 8);
        let groups = COUNT / length;
        let mut of = NumberGroups {
            values: (&pair.device, 0),
            numbers: (&pair.device, numbers_at as u64),
            scales: (&pair.device, scales_at as u64),
            groups: groups as u32,
            length: length as u32,
        };
        kernels.to_e4m3(&of, WAIT).unwrap();
        of.values.1 = back_at as u64;
        kernels.from_e4m3(&of, WAIT).unwrap();
        let found = pair.get();
        let (mut numbers, mut scales) = (vec![0; COUNT], vec![0.0; groups]);
        e4m3s_of_bf16(&mut numbers, &mut scales, &values, length).unwrap();
        let mut back = vec![0; COUNT];
        bf16s_of_e4m3(&mut back, &numbers, &scales, length).unwrap();
        let scales: Vec<u8> = scales
            .iter()
            .flat_map(|scale| scale.to_ne_bytes())
            .collect();
        let back: Vec<u8> = back.iter().flat_map(|value| value.to_ne_bytes()).collect();
        assert!(
            found[numbers_at..scales_at] == numbers,
            "numbers of groups of {length}"
        );
        assert!(
            found[scales_at..scales_at + scales.len()] == scales,
            "scales of groups of {length}"
        );
        assert!(
            found[back_at..back_at + COUNT * 2] == back,
            "values of groups of {length}"
        );
    }
}

/// HND to NHD and back, and to half of another rank's pages.
#[test]
fn a_gpu_rearranges_as_the_reference_does() {
    const BYTES: usize = 2 << 20;
    if !has_gpu() {
        return;
    }
    let (from, to) = (Pair::new(BYTES as u64), Pair::new(BYTES as u64));
    let content = noise(BYTES);
    from.put(&content);
    let kernels = CudaKernels::load(0).unwrap();
    let side = |order, held, first| PageHeads { order, held, first };
    let (hnd, nhd) = (PageOrder::HeadsFirst, PageOrder::TokensFirst);
    for (heads, target, source) in [
        (8, side(nhd, 8, 0), side(hnd, 8, 0)),
        (8, side(hnd, 8, 0), side(nhd, 8, 0)),
        (4, side(nhd, 16, 8), side(hnd, 8, 4)),
        (4, side(hnd, 4, 0), side(hnd, 8, 2)),
    ] {
        let grid = Grid::of_heads(16, 16, 256, heads, target, source).unwrap();
        to.put(&[]);
        kernels
            .rearrange(&to.device, &from.device, &grid, WAIT)
            .unwrap();
        let mut expected = vec![0; BYTES];
        grid.apply(&mut expected, &content).unwrap();
        assert!(to.get() == expected, "{grid:?}");
    }
}

/// More than the window, in scattered ranges, to a file and from it into other memory of the device.
#[test]
fn a_gpu_reads_and_writes_files_through_pinned_memory() {
    const COUNT: u64 = 3000;
    const LEN: u64 = 2056;
    if !has_gpu() {
        return;
    }
    let bytes = COUNT * LEN;
    let agent = agent(CudaOptions {
        window_bytes: 2 << 20,
        ..CudaOptions::default()
    });
    let region = || {
        let memory = DeviceMemory::allocate(0, bytes).unwrap();
        agent.register_device(memory).unwrap()
    };
    let (from, to) = (region(), region());
    let memory = HostMemory::anonymous(bytes).unwrap();
    let host = agent.register(memory, RegionOptions::default()).unwrap();
    let sent = noise(bytes as usize);
    host.write_at(0, &sent).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blocks");
    std::fs::write(&path, vec![0; bytes as usize]).unwrap();
    let file = agent.open_file(&path, &FileOptions::default()).unwrap();
    let all = |region: &Region| region.descriptor(0, bytes);
    let scattered = |n: u64| n * 1571 % COUNT * LEN;
    let pairs = |region: &Region| -> Vec<_> {
        (0..COUNT)
            .map(|n| {
                (
                    region.descriptor(n * LEN, LEN),
                    file.descriptor(scattered(n), LEN),
                )
            })
            .collect()
    };
    for (operation, pairs, backend) in [
        (Operation::Write, vec![(all(&host), all(&from))], "cuda"),
        (Operation::Write, pairs(&from), "staged"),
        (Operation::Read, pairs(&to), "staged"),
        (Operation::Read, vec![(all(&host), all(&to))], "cuda"),
    ] {
        if backend == "cuda" && operation == Operation::Read {
            host.fill_at(0, bytes, 0).unwrap();
        }
        let options = RequestOptions::default();
        let request = agent
            .transfer(operation, &pairs, Side::Local, options)
            .unwrap();
        assert_eq!(request.wait(WAIT).unwrap().backend, backend);
    }
    let mut found = vec![0; bytes as usize];
    host.read_at(0, &mut found).unwrap();
    assert!(found == sent);
    let written = std::fs::read(&path).unwrap();
    let (first, at) = (&sent[..LEN as usize], scattered(1) as usize);
    assert!(&written[..LEN as usize] == first);
    assert!(written[at..at + LEN as usize] == sent[LEN as usize..2 * LEN as usize]);
}

/// From a device to a peer's host memory and to a peer's device, and back, over TCP.
#[test]
fn a_gpu_reaches_peers_through_pinned_memory() {
    const BYTES: u64 = (9 << 20) + 5;
    if !has_gpu() {
        return;
    }
    let loopback = || Some("127.0.0.1:0".parse().unwrap());
    let start = |name: &str| {
        let builder = Agent::builder(name).tcp(loopback());
        builder.cuda(Some(CudaOptions::default())).build().unwrap()
    };
    let (user, owner) = (start("user"), start("owner"));
    let exported = RegionOptions {
        remote_read: true,
        remote_write: true,
    };
    let host = |agent: &Agent| {
        let memory = HostMemory::anonymous(BYTES).unwrap();
        agent.register(memory, exported).unwrap()
    };
    let device = |agent: &Agent| {
        let memory = DeviceMemory::allocate(0, BYTES).unwrap();
        agent.register_device_with(memory, exported).unwrap()
    };
    let (here, near, far_host, far) = (host(&user), device(&user), host(&owner), device(&owner));
    let peer = user.load_peer(&owner.metadata()).unwrap();
    let sent = noise(BYTES as usize);
    here.write_at(0, &sent).unwrap();
    let all = |region: &Region| region.descriptor(0, BYTES);
    let go = |operation, local: &Region, remote: &Region, side: Side<'_>| {
        let pair = (all(local), all(remote));
        let options = RequestOptions::default();
        let request = user.transfer(operation, &[pair], side, options).unwrap();
        request.wait(WAIT).unwrap().backend
    };
    let far_side = || Side::Peer(&peer);
    assert_eq!(go(Operation::Write, &here, &far, far_side()), "tcp");
    assert_eq!(go(Operation::Read, &near, &far, far_side()), "staged");
    assert_eq!(go(Operation::Write, &near, &far_host, far_side()), "staged");
    let mut found = vec![0; BYTES as usize];
    far_host.read_at(0, &mut found).unwrap();
    assert!(found == sent);
    here.fill_at(0, BYTES, 0).unwrap();
    assert_eq!(go(Operation::Read, &here, &near, Side::Local), "cuda");
    here.read_at(0, &mut found).unwrap();
    assert!(found == sent);
}
