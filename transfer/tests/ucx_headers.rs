//! The committed binding of UCX beside the headers of this machine: every size, offset and constant, by the C compiler.
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
        binding: "src/sys/ucx/generated/ucp.rs",
        header: "ucp/api/ucp.h",
        constants: &["UCP_", "UCS_"],
        unions: &[],
        package: "libucx-dev",
        folders: Vec::new(),
        more: String::new(),
        least: 150,
    };
    headers.agree(
        "offset_of!(ucp_params, features) - 8usize",
        "offset_of!(ucp_params, features) - 16usize",
    );
}
