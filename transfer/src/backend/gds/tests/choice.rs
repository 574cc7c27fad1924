//! When cuFile is used, and what is said where it is not.

use super::*;

const BYTES: usize = 1 << 20;

/// What a request for the whole of both goes by, and why not by cuFile.
fn why(bed: &Bed, device: &Region, file: &Region) -> String {
    let pair = (whole(device), whole(file));
    let estimate = bed.estimate(Read, pair);
    let [(backend, reason)] = &estimate.refused[..] else {
        panic!("{estimate:?}");
    };
    assert_eq!((estimate.backend, *backend), ("staged", "gds"));
    // Asked for by its name it is refused, and says the same.
    let options = RequestOptions {
        backends: vec!["gds".to_owned()],
        ..RequestOptions::default()
    };
    let said = bed.request(Read, &[pair], options).unwrap_err();
    assert_eq!(said.kind(), ErrorKind::Unsupported);
    assert!(said.to_string().contains(&**reason), "{said}");
    reason.clone()
}

/// In place and length of the file, and in memory: each goes through host memory, whole, and arrives.
#[test]
fn what_is_not_aligned_is_staged() {
    let bed = Bed::new();
    let (device, address) = bed.device(0, &vec![0; BYTES]);
    let file = bed.file("blocks", &pattern(1, BYTES));
    for (here, there, len) in [(0, 0, 4097), (0, 512, 4096), (256, 0, 4096)] {
        let aligned = (device.descriptor(8192, 8192), file.descriptor(8192, 8192));
        let odd = (device.descriptor(here, len), file.descriptor(there, len));
        let pairs = match here + len > 8192 || there + len > 8192 {
            true => vec![odd],
            false => vec![aligned, odd],
        };
        let request = bed
            .request(Read, &pairs, RequestOptions::default())
            .unwrap();
        let estimate = request.estimate().unwrap();
        assert_eq!(estimate.backend, "staged");
        let (backend, reason) = &estimate.refused[0];
        assert_eq!(*backend, "gds");
        assert!(
            reason.contains("have to be multiples of 4096 bytes"),
            "{reason}"
        );
        assert!(
            reason.contains(&format!("{len} bytes at {there} of the file")),
            "{reason}"
        );
        bed.moved_by("staged", Read, &pairs);
        let moved = bed.fake.read(address + here, len);
        let at = there as usize;
        assert!(
            moved == pattern(1, BYTES)[at..at + len as usize],
            "{here} {there} {len}"
        );
    }
    assert_eq!(bed.cufile.calls(), 0);
    let options = RequestOptions {
        backends: vec!["staged".to_owned()],
        ..RequestOptions::default()
    };
    let request = bed
        .request(Read, &[(whole(&device), whole(&file))], options)
        .unwrap();
    assert_eq!(request.estimate().unwrap().backend, "staged");
    bed.moved_by("gds", Read, &[(whole(&device), whole(&file))]);
}

/// Compatibility mode bounces through host memory without telling: where it is allowed our own window is taken, unless cuFile is asked for
/// as it is; and then what it does is said.
#[test]
fn compatibility_mode_is_not_taken_for_the_direct_way() {
    for (reached, forced, refused, said) in [
        (
            1 << 4,
            false,
            "CUFILE_ALLOW_COMPAT_MODE=false",
            "direct, or through host memory without telling: ",
        ),
        (
            0,
            false,
            "takes all bytes through host memory",
            "through host memory: ",
        ),
        (
            1 << 4,
            true,
            "takes all bytes through host memory",
            "through host memory: ",
        ),
    ] {
        for storage in [Storage::Direct, Storage::Cufile] {
            let fake = Fake::new(1);
            let cufile = FakeCufile::new(&fake);
            cufile.describe((2, 22), reached, true);
            cufile.set_forced(Some(forced));
            let bed = Bed::over(fake, cufile, storage, 2);
            let (device, _) = bed.device(0, &vec![0; BYTES]);
            let file = bed.file("blocks", &pattern(1, BYTES));
            let pair = (whole(&device), whole(&file));
            match storage {
                Storage::Direct => {
                    let reason = why(&bed, &device, &file);
                    assert!(reason.contains(refused), "{reason}");
                    bed.moved_by("staged", Read, &[pair]);
                    assert_eq!(bed.cufile.registered(), (0, 0));
                }
                _ => {
                    let detail = bed.estimate(Read, pair).detail;
                    assert!(detail.starts_with(said), "{detail}");
                    bed.moved_by("gds", Read, &[pair]);
                }
            }
        }
    }
}

/// A file system that it does not reach, and files that are opened for the page cache.
#[test]
fn files_that_are_not_reached_are_staged() {
    let bed = Bed::new();
    let (device, _) = bed.device(0, &vec![0; BYTES]);
    bed.cufile.refuse(Some(5008), None);
    let file = bed.file("blocks", &pattern(1, BYTES));
    let reason = why(&bed, &device, &file);
    assert!(
        reason.contains("blocks: not for this file")
            && reason.contains("(CU_FILE_IO_NOT_SUPPORTED, 5008)"),
        "{reason}"
    );
    bed.moved_by("staged", Read, &[(whole(&device), whole(&file))]);
    bed.cufile.refuse(None, None);
    let options = FileOptions {
        direct: DirectMode::Off,
        ..FileOptions::default()
    };
    let cached = bed.opened("blocks", &options);
    let reason = why(&bed, &device, &cached);
    assert!(
        reason.contains("through the page cache: direct I/O switched off"),
        "{reason}"
    );
    // What it said of the first file is not asked again.
    assert!(why(&bed, &device, &file).contains("5008"));
    let again = bed.opened("blocks", &FileOptions::default());
    bed.moved_by("gds", Read, &[(whole(&device), whole(&again))]);
}

/// It moves the bytes all the same, and that is said.
#[test]
fn memory_that_cannot_be_pinned_is_copied_once_more_within_the_gpu() {
    let bed = Bed::new();
    bed.cufile.refuse(None, Some(5036));
    let (device, _) = bed.device(0, &vec![0; BYTES]);
    let file = bed.file("blocks", &pattern(1, BYTES));
    let pair = (whole(&device), whole(&file));
    let detail = bed.estimate(Read, pair).detail;
    assert!(
        detail.starts_with("direct, copied once more within the GPU (memory of the GPU that cannot be pinned (CU_FILE_GPU_MEMORY_PINNING_FAILED"),
        "{detail}"
    );
    bed.moved_by("gds", Read, &[pair]);
    assert_eq!(bed.cufile.registered(), (1, 0));
    drop((device, file));
    bed.end();
}

/// An agent without it says so to whoever names it; nothing else of it changes.
#[test]
fn an_agent_without_it_says_so() {
    let fake = Fake::new(1);
    let cufile = FakeCufile::new(&fake);
    let bed = Bed {
        agent: Agent::builder("plain").build().unwrap(),
        cuda: fake.start(),
        folder: tempfile::tempdir().unwrap(),
        cufile,
        fake,
    };
    bed.agent
        .start_cuda(CudaOptions::default(), &bed.cuda)
        .unwrap();
    let (device, _) = bed.device(0, &vec![0; BYTES]);
    let file = bed.file("blocks", &pattern(1, BYTES));
    let pair = (whole(&device), whole(&file));
    assert!(bed.estimate(Read, pair).refused.is_empty());
    let options = RequestOptions {
        backends: vec!["gds".to_owned()],
        ..RequestOptions::default()
    };
    let said = bed.request(Read, &[pair], options).unwrap_err();
    assert_eq!(said.kind(), ErrorKind::Unsupported);
    assert!(said.to_string().contains("CudaOptions::storage"), "{said}");
    bed.moved_by("staged", Read, &[pair]);
    assert_eq!(bed.cufile.opened(), 0);
}

/// Sums are computed by nobody on this way, nor on the one through host memory: both are named, and nothing is moved.
#[test]
fn checked_requests_are_refused_by_name() {
    let bed = Bed::new();
    let (device, _) = bed.device(0, &vec![0; BYTES]);
    let file = bed.file("blocks", &pattern(1, BYTES));
    for backends in [Vec::new(), vec!["gds".to_owned()]] {
        let options = RequestOptions {
            checksum: true,
            backends,
            ..RequestOptions::default()
        };
        let said = bed.request(Read, &[(whole(&device), whole(&file))], options);
        let said = said.unwrap_err();
        assert_eq!(said.kind(), ErrorKind::Unsupported);
        assert!(
            said.to_string()
                .contains("computes no checksums of device memory"),
            "{said}"
        );
    }
    assert_eq!(bed.cufile.calls(), 0);
}

/// As everywhere: numbers of threads that are none, and a library that is not there.
#[test]
fn wrong_options_and_a_missing_library_are_said_when_the_agent_is_built() {
    let fake = Fake::new(1);
    let agent = Agent::builder("gds").build().unwrap();
    for storage_threads in [0, 257] {
        let options = CudaOptions {
            storage: Storage::Direct,
            storage_threads,
            ..CudaOptions::default()
        };
        let said = agent.start_cuda(options, &fake.start()).unwrap_err();
        assert_eq!(said.kind(), ErrorKind::Invalid);
        assert!(said.to_string().contains("cuda storage threads"), "{said}");
    }
    let options = CudaOptions {
        storage: Storage::Direct,
        ..CudaOptions::default()
    };
    let built = agent.start_cuda(options, &fake.start());
    match crate::sys::cufile::Cufile::library() {
        Ok(_) => built.unwrap(),
        Err(reason) => {
            let said = built.unwrap_err();
            assert_eq!(said.to_string(), reason.to_string());
            assert!(
                said.to_string()
                    .contains("no cuFile in this system: libcufile.so.0"),
                "{said}"
            );
        }
    }
}
