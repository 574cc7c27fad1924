//! Over files, stores in a folder, and a driver that has no device behind it.

use std::path::PathBuf;
use std::time::Duration;

use kvcache_core::{ErrorKind, Result};
use tempfile::TempDir;

use super::super::cuda::CudaOptions;
use crate::agent::Agent;
use crate::backend::Operation::{self, Read, Write};
use crate::backend::file::{FileEngineMode, FileOptions};
use crate::backend::object::ObjectOptions;
use crate::backend::trials::{PATIENCE, pattern, until, whole};
use crate::descriptor::{Descriptor, Side};
use crate::region::{Region, RegionOptions};
use crate::request::{Priority, Request, RequestOptions};
use crate::sys::cuda::Cuda;
use crate::sys::cuda::fake::Fake;
use crate::sys::memory::HostMemory;

mod ending;
mod objects;
mod peers;
mod property;

type Pairs = Vec<(Descriptor, Descriptor)>;

/// A driver, an agent that uses it, and a folder for files and a store.
struct Bed {
    fake: Fake,
    cuda: Cuda,
    agent: Agent,
    folder: TempDir,
}

impl Bed {
    fn new() -> Self {
        Self::with(FileEngineMode::Auto, CudaOptions::default())
    }

    fn small() -> CudaOptions {
        CudaOptions {
            window_bytes: 2 << 20,
            ..CudaOptions::default()
        }
    }

    fn with(mode: FileEngineMode, options: CudaOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = format!("file://{}", folder.path().join("store").display());
        let object = ObjectOptions {
            part_bytes: 5 << 20,
            ..ObjectOptions::default()
        };
        let agent = Agent::builder("staged").object_store("store", &store, object);
        let agent = agent.build().unwrap();
        agent.start_file_engine(mode).unwrap();
        let fake = Fake::new(2);
        let cuda = fake.start();
        agent.start_cuda(options, &cuda).unwrap();
        Self {
            cuda,
            fake,
            agent,
            folder,
        }
    }

    /// Memory that an engine lends, and where it is.
    fn device(&self, ordinal: u32, content: &[u8]) -> (Region, u64) {
        let bytes = content.len() as u64;
        let address = self.fake.engine_memory(ordinal as i32, bytes);
        self.fake.write(address, content);
        let memory = self.fake.lend(&self.cuda, ordinal, address, bytes);
        (
            self.agent.register_device(memory.unwrap()).unwrap(),
            address,
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, content: &[u8]) -> Region {
        std::fs::write(self.path(name), content).unwrap();
        let file = self
            .agent
            .open_file(self.path(name), &FileOptions::default());
        file.unwrap()
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

    fn moved(&self, operation: Operation, pairs: &[(Descriptor, Descriptor)]) {
        let request = self.posted(operation, pairs);
        let done = request.wait(PATIENCE).unwrap();
        assert_eq!(done.backend, "staged");
        assert!(request.wait_drained(PATIENCE));
    }

    /// Chunks of a device's window that nobody has.
    fn free(&self, ordinal: u32) -> u64 {
        let staged = self.agent.staged_backend().unwrap();
        staged.stage.window(ordinal).unwrap().free()
    }

    /// Everybody lets go, and nothing is left.
    fn end(self) {
        let fake = self.fake.clone();
        drop(self);
        until(|| fake.is_empty());
        fake.check_empty();
    }
}

/// Far more than the window, by io_uring and by threads, with memory that is pinned and memory that is not.
#[test]
fn bytes_go_to_a_file_and_back_through_a_window() {
    const BYTES: usize = (21 << 20) + 777;
    for (mode, pin_fails) in [
        (FileEngineMode::Auto, false),
        (FileEngineMode::Blocking, false),
        (FileEngineMode::Auto, true),
    ] {
        let bed = Bed::with(mode, Bed::small());
        if pin_fails {
            bed.fake.fail(
                "cuMemHostRegister",
                0,
                crate::sys::cuda::fake::OUT_OF_MEMORY,
            );
        }
        let (from, address) = bed.device(0, &pattern(1, BYTES));
        let (to, target) = bed.device(1, &vec![0; BYTES]);
        let file = bed.file("blocks", &vec![0; BYTES]);
        let request = bed.posted(Write, &[(whole(&from), whole(&file))]);
        let estimate = request.estimate().unwrap();
        assert_eq!(estimate.backend, "staged");
        let said = match pin_fails {
            false => "file over 2 MiB of pinned memory",
            true => "file over 2 MiB of memory that could not be pinned, and buffers that are",
        };
        assert_eq!(estimate.detail, said);
        assert_eq!(request.wait(PATIENCE).unwrap().backend, "staged");
        assert!(
            std::fs::read(bed.path("blocks")).unwrap() == pattern(1, BYTES),
            "{mode:?}"
        );
        bed.moved(Read, &[(whole(&to), whole(&file))]);
        assert!(
            bed.fake.read(target, BYTES as u64) == pattern(1, BYTES),
            "{mode:?}"
        );
        assert_eq!((bed.free(0), bed.free(1)), (2, 2));
        // Nothing of the caller's is pinned for it, and no more than the windows and, for the one that could not be, buffers.
        assert_eq!(bed.fake.pinned(), 2);
        for (region, address) in [(from, address), (to, target)] {
            bed.fake.engine_frees(address);
            region.deregister().wait(PATIENCE).unwrap();
        }
        drop(request);
        bed.end();
    }
}

/// While the device does nothing, further pieces are read from the file, as many as there are chunks; and while nothing comes from the
/// device, nothing is written.
#[test]
fn the_next_piece_is_read_while_the_device_copies() {
    const BYTES: usize = 8 << 20;
    let bed = Bed::with(
        FileEngineMode::Auto,
        CudaOptions {
            window_bytes: 3 << 20,
            ..CudaOptions::default()
        },
    );
    bed.fake.set_running(false);
    let (device, address) = bed.device(0, &vec![0; BYTES]);
    let file = bed.file("blocks", &pattern(2, BYTES));
    let request = bed.posted(Read, &[(whole(&device), whole(&file))]);
    // A copy and an event of each chunk.
    until(|| bed.fake.queued() == 6);
    assert_eq!(bed.free(0), 0);
    assert!(matches!(request.poll(), crate::Status::InFlight));
    bed.fake.set_running(true);
    request.wait(PATIENCE).unwrap();
    assert!(bed.fake.read(address, BYTES as u64) == pattern(2, BYTES));
    assert_eq!(bed.free(0), 3);
    bed.fake.check();
}

/// It leaves half of the window to the others.
#[test]
fn what_is_in_the_background_leaves_room() {
    const BYTES: usize = 8 << 20;
    let bed = Bed::with(
        FileEngineMode::Auto,
        CudaOptions {
            window_bytes: 4 << 20,
            ..CudaOptions::default()
        },
    );
    bed.fake.set_running(false);
    let (device, address) = bed.device(0, &vec![0; BYTES + 4096]);
    let file = bed.file("blocks", &pattern(3, BYTES + 4096));
    let options = RequestOptions {
        priority: Priority::Background,
        ..RequestOptions::default()
    };
    let range = |region: &Region, at: u64, len: u64| region.descriptor(at, len);
    let large = (
        range(&device, 0, BYTES as u64),
        range(&file, 0, BYTES as u64),
    );
    let background = bed.request(Read, &[large], options).unwrap();
    background.post().unwrap();
    until(|| bed.fake.queued() == 4);
    assert_eq!(bed.free(0), 2);
    let small = (
        range(&device, BYTES as u64, 4096),
        range(&file, BYTES as u64, 4096),
    );
    let normal = bed.posted(Read, &[small]);
    until(|| bed.fake.queued() == 6);
    bed.fake.advance(6);
    normal.wait(PATIENCE).unwrap();
    assert!(matches!(background.poll(), crate::Status::InFlight));
    bed.fake.set_running(true);
    background.wait(PATIENCE).unwrap();
    assert!(bed.fake.read(address, BYTES as u64 + 4096) == pattern(3, BYTES + 4096));
    assert_eq!(bed.free(0), 4);
}

/// Ranges of two devices in one request, and callers of several threads.
#[test]
fn requests_share_the_windows() {
    const SLOT: usize = 300_000;
    let bed = Bed::with(FileEngineMode::Auto, Bed::small());
    std::thread::scope(|scope| {
        for caller in 0..6_u8 {
            let bed = &bed;
            scope.spawn(move || {
                for round in 0..8_u8 {
                    let seed = caller * 16 + round;
                    let (one, _) = bed.device(0, &pattern(seed, SLOT));
                    let (other, _) = bed.device(1, &pattern(seed + 1, SLOT));
                    let (back, found) = bed.device(u32::from(caller % 2), &vec![0; 2 * SLOT]);
                    let file = bed.file(&format!("{caller}"), &vec![0; 2 * SLOT]);
                    let len = SLOT as u64;
                    let half = |number: u64| file.descriptor(number * len, len);
                    bed.moved(Write, &[(whole(&one), half(1)), (whole(&other), half(0))]);
                    bed.moved(Read, &[(whole(&back), whole(&file))]);
                    let moved = bed.fake.read(found, 2 * len);
                    assert!(moved[..SLOT] == pattern(seed + 1, SLOT), "{caller} {round}");
                    assert!(moved[SLOT..] == pattern(seed, SLOT), "{caller} {round}");
                    for region in [one, other, back] {
                        region.deregister().wait(PATIENCE).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!((bed.free(0), bed.free(1)), (2, 2));
    bed.fake.check();
}

/// Each says what it is about.
#[test]
fn what_cannot_be_staged_is_refused_by_name() {
    let bed = Bed::new();
    let (device, address) = bed.device(0, &[1; 4096]);
    let file = bed.file("blocks", &[0; 8192]);
    let memory = HostMemory::anonymous(4096).unwrap();
    let host = bed
        .agent
        .register(memory, RegionOptions::default())
        .unwrap();
    let pair = |from: &Region, at: u64| (from.descriptor(0, 4096), file.descriptor(at, 4096));
    let refused = |pairs: &Pairs, options: RequestOptions, words: &str| {
        let error = bed.request(Write, pairs, options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    let plain = RequestOptions::default;
    refused(
        &vec![pair(&device, 0), pair(&host, 4096)],
        plain(),
        "is host memory: ask for it by another",
    );
    let checked = RequestOptions {
        checksum: true,
        ..plain()
    };
    refused(
        &vec![pair(&device, 0)],
        checked,
        "staged: computes no checksums",
    );
    let only_file = RequestOptions {
        backends: vec!["file".to_owned()],
        ..plain()
    };
    refused(
        &vec![pair(&device, 0)],
        only_file,
        "staged: the request wants other backends",
    );
    let only_staged = RequestOptions {
        backends: vec!["staged".to_owned()],
        ..plain()
    };
    let request = bed
        .request(Write, &[pair(&device, 0)], only_staged)
        .unwrap();
    request.post().unwrap();
    request.wait(PATIENCE).unwrap();
    let both = vec![
        pair(&device, 0),
        (device.descriptor(0, 4096), host.descriptor(0, 4096)),
    ];
    refused(&both, plain(), "one request cannot use both");
    bed.fake.engine_frees(address);
    let error = bed
        .request(Write, &[pair(&device, 0)], plain())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    for bytes in [1 << 20, (2 << 20) + 1, 2 << 30] {
        let options = CudaOptions {
            window_bytes: bytes,
            ..CudaOptions::default()
        };
        let agent = Agent::builder("refused").build().unwrap();
        let cuda = Fake::new(1).start();
        let error = agent.start_cuda(options, &cuda).unwrap_err();
        assert!(error.to_string().contains("cuda window bytes"), "{error}");
    }
}
