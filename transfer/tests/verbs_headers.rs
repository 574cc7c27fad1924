//! The committed bindings of libibverbs and librdmacm beside the headers of this machine: every size, offset and constant, by the C compiler.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/headers.rs"]
mod headers;

use headers::Headers;

/// A binding that were off by one field would be noticed.
#[test]
fn the_binding_is_what_the_headers_say() {
    let headers = Headers {
        binding: "src/sys/verbs/generated/ibverbs.rs",
        header: "infiniband/verbs.h",
        constants: &["IBV_"],
        unions: &["ibv_gid"],
        package: "libibverbs-dev",
        folders: Vec::new(),
        more: String::new(),
        least: 150,
    };
    headers.agree(
        "offset_of!(ibv_send_wr, opcode) - 28usize",
        "offset_of!(ibv_send_wr, opcode) - 24usize",
    );
}

/// The same of librdmacm's.
#[test]
fn the_binding_of_rdma_cm_is_what_the_header_says() {
    let headers = Headers {
        binding: "src/sys/verbs/cm/ffi.rs",
        header: "rdma/rdma_cma.h",
        constants: &["RDMA_"],
        unions: &[],
        package: "librdmacm-dev",
        folders: Vec::new(),
        more: String::new(),
        least: 70,
    };
    headers.agree(
        "offset_of!(rdma_conn_param, qp_num) - 16usize",
        "offset_of!(rdma_conn_param, qp_num) - 12usize",
    );
}
