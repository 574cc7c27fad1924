//! What the system's cuFile is, asked as anybody would: without a driver it is not opened.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says what it skips"
)]

use kvcache_core::ErrorKind;
use kvfabric_transfer::{Agent, CudaOptions, Storage, cuda_probe, storage_probe};

/// No library, or no driver: each is said as it is. Nothing of cuFile's own is printed or written then.
#[test]
fn what_there_is_of_cufile_is_said() {
    let folder = tempfile::tempdir().unwrap();
    std::env::set_current_dir(folder.path()).unwrap();
    let options = CudaOptions {
        storage: Storage::Direct,
        ..CudaOptions::default()
    };
    let built = Agent::builder("gds").cuda(Some(options)).build();
    match (storage_probe(), cuda_probe()) {
        (Ok(report), _) => eprintln!("{report}, {:?}", report.bounce),
        (Err(error), Err(of_cuda)) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            let is_of_library = error.context().starts_with("no cuFile in this system: ");
            match std::env::var_os("KVFABRIC_CUFILE") {
                // Whoever names it has it found, too.
                Some(_) => assert_eq!(error.context(), of_cuda.context()),
                None => assert!(
                    is_of_library || error.context() == of_cuda.context(),
                    "{error}"
                ),
            }
            assert!(!folder.path().join("cufile.log").exists());
            // An agent says first that there is no CUDA.
            assert_eq!(built.unwrap_err().to_string(), of_cuda.to_string());
        }
        (Err(error), Ok(_)) => assert_eq!(error.kind(), ErrorKind::Unsupported),
    }
}
