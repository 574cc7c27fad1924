//! The kernels' source, compiled for the processor by the system's C compiler: see `host.h`.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::os::unix::Library;

type Launch = unsafe extern "C" fn(*const c_char, c_uint, c_uint, *mut *mut c_void) -> c_int;

/// Nothing is contracted or reordered; what C leaves undefined ends the process.
const OPTIONS: [&str; 10] = [
    "-std=gnu11",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fsanitize=undefined",
    "-fsanitize-undefined-trap-on-error",
    "-pthread",
];

fn load() -> Launch {
    let folder = tempfile::tempdir().unwrap();
    let (source, made) = (
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src/sys/cuda/kernels/host.c"),
        folder.path().join("kernels.so"),
    );
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let compiled = Command::new(compiler)
        .args(OPTIONS)
        .args(["-fPIC", "-shared", "-o"])
        .args([&made, &source])
        .output()
        .expect("the system's C compiler");
    let said = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "{said}");
    // SAFETY: the library was just made of a source without initialisers.
    let library = unsafe { Library::new(&made) }.unwrap();
    // SAFETY: `host.c` has it, with this type.
    let launch: Launch = *unsafe { library.get(b"kvf_host_launch\0") }.unwrap();
    // It stays loaded.
    let _ = library.into_raw();
    launch
}

/// Runs a kernel: blocks one after the other, a thread of the system for each of theirs. `threads` is a multiple of 32 up to 256.
///
/// # Safety
/// The arguments are what the kernel takes, in its order; all addresses in them are good for what it does with them.
pub(super) unsafe fn launch(name: &str, blocks: u32, threads: u32, arguments: &mut [*mut c_void]) {
    static LAUNCH: OnceLock<Launch> = OnceLock::new();
    static TURN: Mutex<()> = Mutex::new(());
    let launch = LAUNCH.get_or_init(load);
    let name = CString::new(name).unwrap();
    // One at a time: `host.h` has one set of threads.
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: a terminated name; the arguments are good by the caller's promise, and the kernel has ended when this returns.
    let answer = unsafe { launch(name.as_ptr(), blocks, threads, arguments.as_mut_ptr()) };
    assert_eq!(answer, 0, "{name:?}");
}
