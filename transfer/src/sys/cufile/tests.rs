//! What the library says of itself, in words; and the real one, in a process of its own.

use std::process::Command;

use kvcache_core::ErrorKind;

use super::binding as ffi;
use super::calls::{Code, CufileCalls, Failure, moved};
use super::fake::{FakeCufile, set_errno};
use super::library::Libcufile;
use super::report::StorageBounce;
use crate::sys::cuda::fake::Fake;

/// Whether bytes go through host memory is what decides about its use: only what cannot be otherwise is called direct.
#[test]
fn what_may_go_through_host_memory_is_never_called_direct() {
    let (none, nvme, p2p) = (
        0,
        1 << ffi::CU_FILE_NVME_SUPPORTED,
        1 << ffi::CU_FILE_NVME_P2P_SUPPORTED,
    );
    for (module, reached, may_bounce, forced, bounce, said) in [
        (
            (2, 22),
            nvme,
            false,
            Some(false),
            StorageBounce::Never,
            "cuFile 1.14, nvidia-fs 2.22, NVMe",
        ),
        (
            (0, 0),
            p2p,
            false,
            None,
            StorageBounce::Never,
            "cuFile 1.14, no nvidia-fs, NVMe by P2PDMA",
        ),
        (
            (2, 22),
            nvme | p2p,
            true,
            Some(false),
            StorageBounce::Allowed,
            "NVMe, NVMe by P2PDMA",
        ),
        ((2, 22), nvme, true, None, StorageBounce::Allowed, "NVMe"),
        (
            (2, 22),
            nvme,
            false,
            Some(true),
            StorageBounce::Always,
            "NVMe",
        ),
        (
            (0, 0),
            none,
            true,
            Some(false),
            StorageBounce::Always,
            "no drive that it reaches",
        ),
        (
            (0, 0),
            none,
            false,
            Some(false),
            StorageBounce::Never,
            "no drive that it reaches",
        ),
    ] {
        let fake = FakeCufile::new(&Fake::new(1));
        fake.describe(module, reached, may_bounce);
        fake.set_forced(forced);
        let report = fake.open().unwrap().report().clone();
        assert_eq!(report.bounce, bounce, "{report}");
        assert!(report.to_string().ends_with(said), "{report}");
        assert_eq!(report.version, Some((1, 14)));
    }
}

/// One that is open already is used; one that does not open says why, and is no error of another kind.
#[test]
fn why_it_does_not_open_is_said() {
    let fake = FakeCufile::new(&Fake::new(1));
    fake.fail_opening(ffi::CU_FILE_DRIVER_ALREADY_OPEN);
    fake.open().unwrap();
    for (error, words) in [
        (
            ffi::CU_FILE_DRIVER_NOT_INITIALIZED,
            "nvidia-fs is not loaded",
        ),
        (
            ffi::CU_FILE_NVFS_SETUP_ERROR,
            "(CU_FILE_NVFS_SETUP_ERROR, 5033)",
        ),
        (ffi::CU_FILE_PERMISSION_DENIED, "/dev/nvidia-fs*"),
        (5999, "error 5999 of cuFile"),
    ] {
        fake.fail_opening(error);
        let said = fake.open().unwrap_err();
        assert_eq!(said.kind(), ErrorKind::Unsupported);
        let text = said.to_string();
        assert!(
            text.contains("cuFile: open: ") && text.contains(words),
            "{text}"
        );
    }
    let of_cuda = Code {
        error: ffi::CU_FILE_CUDA_DRIVER_ERROR,
        cuda: 700,
    };
    assert!(of_cuda.words().contains("700"), "{}", of_cuda.words());
}

/// Answers of calls: bytes, errors of the system by `errno` or as they are, and the library's own.
#[test]
fn answers_are_told_apart() {
    assert_eq!(moved(0).unwrap(), 0);
    assert_eq!(moved(4096).unwrap(), 4096);
    set_errno(libc::ENOSPC);
    let system = |answer| match moved(answer) {
        Err(Failure::System(error)) => error.raw_os_error(),
        other => panic!("{other:?}"),
    };
    assert_eq!(system(-1), Some(libc::ENOSPC));
    assert_eq!(system(-(libc::EIO as isize)), Some(libc::EIO));
    match moved(-5008) {
        Err(Failure::Cufile(code)) => assert_eq!(code, Code::new(5008)),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        Failure::Cufile(Code::new(ffi::CU_FILE_IO_NOT_SUPPORTED))
            .fault("read it".to_owned())
            .kind(),
        ErrorKind::Unsupported
    );
}

const CHILD: &str = "KVFABRIC_CUFILE_CHILD";

/// Where NVIDIA's package lies, if it does: `scripts/test-cufile` puts it there.
fn folder() -> Option<std::path::PathBuf> {
    std::env::var_os("KVFABRIC_CUFILE").map(std::path::PathBuf::from)
}

/// The real library is loaded and opened in a process of its own, because it prints, writes a file into the working folder, and might
/// end the process. Without a driver it answers with a status that is told in words.
#[test]
fn the_real_library_says_why_it_does_not_open() {
    if std::env::var_os(CHILD).is_some() {
        let library = Libcufile::load().unwrap();
        let (major, minor) = library
            .version()
            .map(|v| (v / 1000, v % 1000 / 10))
            .unwrap();
        assert!((major, minor) >= (1, 7), "{major}.{minor}");
        match library.open() {
            Ok(()) => println!("OPEN {:?}", library.properties().unwrap()),
            Err(code) => {
                println!("STATUS {}: {}", code.error, code.words());
                // Asked all the same, it answers with a status.
                assert!(library.properties().is_err());
                let fd = std::fs::File::open("/proc/self/exe").unwrap();
                // SAFETY: the descriptor is open until the end of this; nothing is registered.
                let file = unsafe { library.register_file(std::os::fd::AsRawFd::as_raw_fd(&fd)) };
                println!("FILE {}", file.unwrap_err().words());
            }
        }
        return;
    }
    let Some(folder) = folder() else {
        println!("SKIPPED, and so not tested: the real cuFile (scripts/test-cufile has it)");
        return;
    };
    let working = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            "sys::cufile::tests::the_real_library_says_why_it_does_not_open",
        ])
        .env(CHILD, "1")
        .env("LD_LIBRARY_PATH", folder.join("lib"))
        .current_dir(working.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let printed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{printed}");
    println!("{said}\n{printed}");
    if crate::cuda_probe().is_err() {
        assert!(
            said.contains(
                "STATUS 5033: it does not start: the CUDA driver or nvidia-fs is missing"
            ),
            "{said}"
        );
        // What it does beside answering, which is why it is not asked where there is no driver.
        assert!(said.contains("dlopen error libcuda.so.1"), "{said}");
        assert!(working.path().join("cufile.log").exists());
    }
}
