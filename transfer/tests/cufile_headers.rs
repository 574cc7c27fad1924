//! The committed binding of cuFile beside NVIDIA's header, where that is: every size, offset, constant and call, by the C compiler.
//!
//! The header is in the package `nvidia-cufile-cu12` of PyPI, which `scripts/test-cufile` puts into the cache folder and names by
//! `KVFABRIC_CUFILE`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and says what it skips"
)]

use std::fs;
use std::path::{Path, PathBuf};

#[path = "support/headers.rs"]
mod headers;

use headers::Headers;

/// What the header wants of CUDA's own, which is no part of the package.
const CUDA: &str = "typedef int CUresult;\ntypedef struct CUstream_st *CUstream;\n";

/// Each call as it is bound, in C.
const CALLS: &[&str] = &[
    "CUfileError_t cuFileDriverOpen(void)",
    "CUfileError_t cuFileDriverGetProperties(CUfileDrvProps_t *)",
    "CUfileError_t cuFileHandleRegister(CUfileHandle_t *, CUfileDescr_t *)",
    "void cuFileHandleDeregister(CUfileHandle_t)",
    "CUfileError_t cuFileBufRegister(const void *, size_t, int)",
    "CUfileError_t cuFileBufDeregister(const void *)",
    "ssize_t cuFileRead(CUfileHandle_t, void *, size_t, off_t, off_t)",
    "ssize_t cuFileWrite(CUfileHandle_t, const void *, size_t, off_t, off_t)",
    "CUfileError_t cuFileGetVersion(int *)",
    "CUfileError_t cuFileGetParameterBool(CUFileBoolConfigParameter_t, bool *)",
];

/// A binding that were off by one field would be noticed.
#[test]
fn the_binding_is_what_the_header_says() {
    let Some(package) = std::env::var_os("KVFABRIC_CUFILE").map(PathBuf::from) else {
        eprintln!(
            "SKIPPED, and so not tested: the binding of cuFile beside NVIDIA's header (scripts/test-cufile has it)"
        );
        return;
    };
    let cuda = tempfile::tempdir().unwrap();
    fs::write(cuda.path().join("cuda.h"), CUDA).unwrap();
    let binding =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/sys/cufile/binding.rs"))
            .unwrap();
    let mut more = String::new();
    for call in CALLS {
        let name = call
            .split(['(', ' '])
            .find(|word| word.starts_with("cuFile"))
            .unwrap();
        assert!(
            binding.contains(&format!("{name}(")) || name.contains("Get"),
            "{name} is not bound"
        );
        // A declaration that differs from the header's is an error.
        more.push_str(&format!("{call};\n"));
    }
    let headers = Headers {
        binding: "src/sys/cufile/binding.rs",
        header: "cufile.h",
        constants: &["CU_FILE_", "CUFILE"],
        unions: &[],
        package: "nvidia-cufile-cu12",
        folders: vec![package.join("include"), cuda.path().to_owned()],
        more,
        least: 65,
    };
    headers.agree(
        "offset_of!(CUfileDescr_t, fs_ops) - 16usize",
        "offset_of!(CUfileDescr_t, fs_ops) - 12usize",
    );
    headers.agree(
        "CU_FILE_IO_NOT_SUPPORTED: i32 = 5008",
        "CU_FILE_IO_NOT_SUPPORTED: i32 = 5007",
    );
    let wrong = Headers {
        more: "ssize_t cuFileRead(CUfileHandle_t, void *, size_t, off_t);\n".to_owned(),
        ..headers
    };
    assert!(wrong.differs());
}
