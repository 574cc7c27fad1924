//! The committed binding of libibverbs beside the headers of this machine: every size, offset and constant, by the C compiler.
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
