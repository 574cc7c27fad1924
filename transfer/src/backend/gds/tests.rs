//! Over real files, a stand-in for cuFile, and a driver that has no device behind it.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use kvcache_core::{ErrorKind, Result};
use tempfile::TempDir;

use super::super::cuda::{CudaOptions, Storage};
use crate::agent::Agent;
use crate::backend::Operation::{self, Read, Write};
use crate::backend::file::{DirectMode, FileOptions};
use crate::backend::trials::{PATIENCE, pattern, until, whole};
use crate::descriptor::{Descriptor, Side};
use crate::estimate::Estimate;
use crate::region::Region;
use crate::request::{Priority, Request, RequestOptions};
use crate::sys::cuda::Cuda;
use crate::sys::cuda::fake::Fake;
use crate::sys::cufile::fake::{Ending, FakeCufile};

mod choice;
mod ending;

const DIRECT: &str = "direct: cuFile 1.14, nvidia-fs 2.22, NVMe";

type Pairs = Vec<(Descriptor, Descriptor)>;

/// A driver, a cuFile, an agent that uses both, and a folder for files.
struct Bed {
    fake: Fake,
    cuda: Cuda,
    cufile: FakeCufile,
    agent: Agent,
    folder: TempDir,
}

impl Bed {
    fn new() -> Self {
        Self::with(Storage::Direct, 4)
    }

    fn with(storage: Storage, threads: u32) -> Self {
        let fake = Fake::new(2);
        let cufile = FakeCufile::new(&fake);
        Self::over(fake, cufile, storage, threads)
    }

    fn over(fake: Fake, cufile: FakeCufile, storage: Storage, threads: u32) -> Self {
        let agent = Agent::builder("gds").build().unwrap();
        let cuda = fake.start();
        let opened = cufile.open().unwrap();
        let threads = NonZeroU32::new(threads).unwrap();
        agent.start_gds(storage, threads, Some(opened)).unwrap();
        agent.start_cuda(CudaOptions::default(), &cuda).unwrap();
        Self {
            fake,
            cuda,
            cufile,
            agent,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// Memory that an engine lends, and where it is.
    fn device(&self, ordinal: u32, content: &[u8]) -> (Region, u64) {
        let bytes = content.len() as u64;
        let address = self.fake.engine_memory(ordinal as i32, bytes);
        self.fake.write(address, content);
        (self.lent(ordinal, address, bytes), address)
    }

    fn lent(&self, ordinal: u32, address: u64, bytes: u64) -> Region {
        let memory = self.fake.lend(&self.cuda, ordinal, address, bytes);
        self.agent.register_device(memory.unwrap()).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, content: &[u8]) -> Region {
        std::fs::write(self.path(name), content).unwrap();
        self.opened(name, &FileOptions::default())
    }

    fn opened(&self, name: &str, options: &FileOptions) -> Region {
        self.agent.open_file(self.path(name), options).unwrap()
    }

    fn request(
        &self,
        operation: Operation,
        pairs: &[(Descriptor, Descriptor)],
        options: RequestOptions,
    ) -> Result<Request> {
        let (locals, remotes): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
        let local = self.agent.prepare(Side::Local, &locals)?;
        let remote = self.agent.prepare(Side::Local, &remotes)?;
        self.agent.request(operation, &local, &remote, options)
    }

    fn posted(&self, operation: Operation, pairs: &[(Descriptor, Descriptor)]) -> Request {
        let request = self.request(operation, pairs, RequestOptions::default());
        let request = request.unwrap();
        request.post().unwrap();
        request
    }

    fn moved_by(&self, backend: &str, operation: Operation, pairs: &[(Descriptor, Descriptor)]) {
        let request = self.posted(operation, pairs);
        let done = request.wait(PATIENCE).unwrap();
        assert_eq!(done.backend, backend);
        assert!(request.wait_drained(PATIENCE));
        self.cufile.check();
        self.fake.check();
    }

    fn estimate(&self, operation: Operation, pair: (Descriptor, Descriptor)) -> Estimate {
        let request = self.request(operation, &[pair], RequestOptions::default());
        request.unwrap().estimate().unwrap()
    }

    /// Everybody lets go, and nothing is left.
    fn end(self) {
        let (fake, cufile) = (self.fake.clone(), self.cufile.clone());
        drop(self);
        until(|| fake.is_empty() && cufile.registered() == (0, 0));
        cufile.check();
        fake.check();
    }
}

/// Many calls, also where each moves less than it is asked for, and ends within a page.
#[test]
fn bytes_go_to_a_file_and_back_without_host_memory() {
    const BYTES: usize = 21 << 20;
    for most in [u64::MAX, 100_000] {
        let bed = Bed::new();
        bed.cufile.set_most(most);
        let (from, address) = bed.device(0, &pattern(1, BYTES));
        let (to, target) = bed.device(1, &vec![0; BYTES]);
        let file = bed.file("blocks", &vec![0; BYTES]);
        let pair = (whole(&from), whole(&file));
        let estimate = bed.estimate(Write, pair);
        assert_eq!((estimate.backend, &*estimate.detail), ("gds", DIRECT));
        assert!(estimate.refused.is_empty());
        bed.moved_by("gds", Write, &[pair]);
        assert!(std::fs::read(bed.path("blocks")).unwrap() == pattern(1, BYTES));
        bed.moved_by("gds", Read, &[(whole(&to), whole(&file))]);
        assert!(bed.fake.read(target, BYTES as u64) == pattern(1, BYTES));
        // No window was made, and no copy by a device.
        assert_eq!(bed.fake.pinned(), 0);
        for call in ["cuMemcpyAsync", "cuMemcpyBatchAsync"] {
            assert_eq!(bed.fake.count(call), 0);
        }
        assert_eq!(bed.cufile.registered(), (1, 2));
        assert!(bed.cufile.calls() >= 12);
        for (region, address) in [(from, address), (to, target)] {
            region.deregister().wait(PATIENCE).unwrap();
            bed.fake.engine_frees(address);
        }
        // Before the memory was called free.
        assert_eq!(bed.cufile.registered(), (1, 0));
        drop(file);
        bed.end();
    }
}

/// Ranges of random places and lengths, in random order, both ways, against a model.
#[test]
fn random_ranges_arrive_where_they_belong() {
    const PAGES: usize = 256;
    const PAGE: usize = 4096;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % below
    };
    let bed = Bed::new();
    bed.cufile.set_most(3 * PAGE as u64 + 17);
    let mut memory = pattern(3, PAGES * PAGE);
    let mut content = pattern(4, PAGES * PAGE);
    let (device, address) = bed.device(0, &memory);
    let file = bed.file("blocks", &content);
    for round in 0..60 {
        let operation = if random(2) == 0 { Read } else { Write };
        let mut pairs: Pairs = Vec::new();
        // Of each side a page is in one range at most.
        let (mut here, mut there) = (0, 0);
        loop {
            here += random(9);
            there += random(9);
            let count = 1 + random(8);
            if here + count > PAGES || there + count > PAGES {
                break;
            }
            let [a, b, len] = [here, there, count].map(|pages| pages * PAGE);
            match operation {
                Read => memory[a..a + len].copy_from_slice(&content[b..b + len]),
                Write => content[b..b + len].copy_from_slice(&memory[a..a + len]),
            }
            pairs.push((
                device.descriptor(a as u64, len as u64),
                file.descriptor(b as u64, len as u64),
            ));
            (here, there) = (here + count, there + count);
        }
        let turn = random(pairs.len().max(1));
        pairs.rotate_left(turn);
        if pairs.is_empty() {
            continue;
        }
        bed.moved_by("gds", operation, &pairs);
        assert!(
            bed.fake.read(address, (PAGES * PAGE) as u64) == memory,
            "round {round}"
        );
        assert!(
            std::fs::read(bed.path("blocks")).unwrap() == content,
            "round {round}"
        );
    }
}

/// No more calls at once than there are threads, half of them for what gives way; callers do not wait for each other.
#[test]
fn as_many_calls_are_under_way_as_there_are_threads() {
    const BYTES: usize = 64 << 20;
    let bed = Bed::with(Storage::Direct, 4);
    let (device, _) = bed.device(0, &pattern(5, BYTES));
    let file = bed.file("blocks", &vec![0; BYTES]);
    bed.cufile.hold();
    let pair = [(whole(&device), whole(&file))];
    let options = RequestOptions {
        priority: Priority::Background,
        ..RequestOptions::default()
    };
    // Each on its own posts no more than a part of its bytes.
    let background = [(); 4].map(|()| {
        let request = bed.request(Write, &pair, options.clone()).unwrap();
        request.post().unwrap();
        request
    });
    bed.cufile.await_calls(2);
    let small = bed.file("small", &pattern(6, 4096));
    let first = bed.posted(Read, &[(device.descriptor(0, 4096), whole(&small))]);
    // Not one more of the background's, so that this one is begun.
    until(|| bed.cufile.files_in_use() == 2);
    let others = [bed.posted(Write, &pair), bed.posted(Read, &pair)];
    bed.cufile.await_calls(4);
    bed.cufile.release();
    for request in others.iter().chain([&first]).chain(&background) {
        request.wait(PATIENCE).unwrap();
    }
    assert_eq!(bed.cufile.under_way_max(), 4);
    bed.cufile.check();
}

/// Agents of a process register the same memory once, until the last of them lets go of it.
#[test]
fn memory_is_registered_once() {
    const BYTES: usize = 1 << 20;
    let bed = Bed::new();
    let (first, address) = bed.device(0, &pattern(7, BYTES));
    let second = bed.lent(0, address, BYTES as u64);
    // It begins there, too, and is shorter.
    let third = bed.lent(0, address, BYTES as u64 / 2);
    let file = bed.file("blocks", &vec![0; BYTES]);
    for region in [&first, &second, &third] {
        let to = file.descriptor(0, region.bytes());
        bed.moved_by("gds", Write, &[(whole(region), to)]);
    }
    assert_eq!(bed.cufile.registered().1, 1);
    for (region, left) in [(first, 1), (second, 1), (third, 0)] {
        region.deregister().wait(PATIENCE).unwrap();
        assert_eq!(bed.cufile.registered().1, left);
    }
}
