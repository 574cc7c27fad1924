use std::fs;
use std::time::Duration;

use super::super::{FileBackend, FileEngineMode, FileOptions};
use super::CHUNK_BYTES;
use crate::sys::memory::HostMemory;
use crate::{Agent, Descriptor, Operation, Region, RegionOptions, RequestOptions, Side};

/// Far beyond what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(60);
/// A chunk, and a part of another one.
const BYTES: u64 = CHUNK_BYTES + (4 << 20);
const BLOCK: u64 = 1 << 20;

/// Memory at one place, whose pages can be exchanged for others.
struct Place(*mut u8);

impl Place {
    fn new() -> Self {
        Self(Self::map(std::ptr::null_mut(), 0))
    }

    fn map(at: *mut u8, flags: i32) -> *mut u8 {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
        );
        // SAFETY: either anywhere, or exactly where this very mapping is, which no region names any more.
        let mapped = unsafe { libc::mmap(at.cast(), BYTES as usize, protection, flags, -1, 0) };
        assert_ne!(mapped, libc::MAP_FAILED);
        mapped.cast()
    }

    /// New pages, all zero.
    fn renew(&self) {
        assert_eq!(Self::map(self.0, libc::MAP_FIXED), self.0);
    }

    fn region(&self, agent: &Agent) -> Region {
        // SAFETY: the memory is there until the end of the test, and exchanged only between regions.
        let memory = unsafe { HostMemory::from_raw(self.0, BYTES) }.expect("memory");
        agent
            .register(memory, RegionOptions::default())
            .expect("region")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // SAFETY: nothing names the memory any more.
        let outcome = unsafe { libc::munmap(self.0.cast(), BYTES as usize) };
        assert_eq!(outcome, 0);
    }
}

/// Moves everything, a request for each block.
fn transfer(agent: &Agent, operation: Operation, memory: &Region, file: &Region) {
    for block in 0..BYTES / BLOCK {
        let (offset, len) = (block * BLOCK, BLOCK);
        let pair = (memory.descriptor(offset, len), file.descriptor(offset, len));
        let pairs: &[(Descriptor, Descriptor)] = &[pair];
        let request = agent
            .transfer(operation, pairs, Side::Local, RequestOptions::default())
            .expect("accepted");
        request.wait(PATIENCE).expect("moved");
    }
}

/// Kilobytes that the kernel holds for this process.
fn held_kb() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number
        .and_then(|number| number.parse().ok())
        .expect("VmPin")
}

/// Memory that is used again and again is held by the kernel until its region is deregistered; what comes to the same place
/// later is another region's, and its own pages are used.
#[test]
fn memory_is_held_until_its_region_goes_and_never_used_for_another() {
    let agent = Agent::builder("pinned").build().expect("agent");
    if agent.start_file_engine(FileEngineMode::Uring).is_err() {
        eprintln!("SKIPPED: no io_uring here");
        return;
    }
    let backend = agent
        .core()
        .extension::<FileBackend>(|| panic!("it runs"))
        .expect("runs");
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("blocks");
    let options = FileOptions {
        create: true,
        len_bytes: Some(BYTES),
        ..FileOptions::default()
    };
    let file = agent.open_file(&path, &options).expect("opens");
    if !file.direct_report().expect("a file").starts_with("direct") {
        eprintln!("SKIPPED: no direct I/O in {}", folder.path().display());
        return;
    }
    let content: Vec<u8> = (0..BYTES).map(|at| (at * 7 + at / 251) as u8).collect();
    let place = Place::new();
    let before = held_kb();
    let memory = place.region(&agent);
    memory.write_at(0, &content).expect("inside");
    transfer(&agent, Operation::Write, &memory, &file);
    assert_eq!(fs::read(&path).expect("there"), content);
    assert!(backend.inbox.is_pinned(memory.id()), "used often enough");
    assert!(held_kb() >= before + CHUNK_BYTES / 1024);
    memory
        .write_at(0, &vec![0; BYTES as usize])
        .expect("inside");
    transfer(&agent, Operation::Read, &memory, &file);
    let mut found = vec![0; BYTES as usize];
    memory.read_at(0, &mut found).expect("inside");
    assert!(found == content, "what is read into memory that is held");

    let first = memory.id();
    // At once, as there is nothing in flight.
    memory.deregister().wait(Duration::ZERO).expect("let go of");
    assert!(!backend.inbox.is_pinned(first));
    assert_eq!(held_kb(), before);
    place.renew();
    let memory = place.region(&agent);
    transfer(&agent, Operation::Read, &memory, &file);
    memory.read_at(0, &mut found).expect("inside");
    assert!(found == content, "what is read into other memory there");
    memory.deregister().wait(PATIENCE).expect("let go of");
}
