//! Which transports an endpoint uses: UCX 1.13 tells only as text, on a stream.

use std::ffi::c_void;

use kvcache_core::{Error, Result};

use super::generated::ucp as ffi;
use super::library::Library;

/// Such as `tcp/lo, cma/memory`.
pub(super) fn of(library: &Library, endpoint: ffi::ucp_ep_h) -> Result<String> {
    let mut text = std::ptr::null_mut();
    let mut len = 0;
    // SAFETY: both results are writable, and stay where they are until the stream is closed, below.
    let stream = unsafe { libc::open_memstream(&raw mut text, &raw mut len) };
    if stream.is_null() {
        let error = std::io::Error::last_os_error();
        return Err(Error::io("open a stream in memory", error));
    }
    // SAFETY: the endpoint and the stream are open.
    unsafe { library.calls.ucp_ep_print_info(endpoint, stream) };
    // SAFETY: opened above and not used after this; the text and its length are valid from here on.
    let status = unsafe { libc::fclose(stream) };
    if status != 0 || text.is_null() {
        let error = std::io::Error::last_os_error();
        return Err(Error::io("close a stream in memory", error));
    }
    // SAFETY: the stream wrote as many bytes there.
    let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), len) };
    let told = parse(&String::from_utf8_lossy(bytes));
    // SAFETY: the text was allocated for the caller, who frees it once.
    unsafe { libc::free(text.cast::<c_void>()) };
    Ok(told)
}

/// The transports and devices of all lanes, each once: `#  lane[0]:  4:tcp/lo.0 md[1] -> …`.
fn parse(told: &str) -> String {
    let mut found: Vec<&str> = Vec::new();
    for line in told.lines() {
        let Some((_, lane)) = line.split_once("lane[") else {
            continue;
        };
        let resource = lane.split_whitespace().find(|word| word.contains('/'));
        let name = resource.map(|word| word.split_once(':').map_or(word, |(_, name)| name));
        let name = name.map(|name| name.trim_end_matches(|c: char| c == '.' || c.is_ascii_digit()));
        if let Some(name) = name
            && !found.contains(&name)
        {
            found.push(name);
        }
    }
    found.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As UCX 1.13.1 prints it.
    #[test]
    fn lanes_are_told_by_transport_and_device() {
        let told = "#\n# UCP endpoint \n#               peer: <unknown>\n\
            #                 lane[0]:  4:tcp/lo.0 md[1]             -> md[1]/tcp/sysdev[255] am am_bw#0 wireup\n\
            #                 lane[1]:  7:cma/memory.0 md[4]         -> md[4]/cma/sysdev[255] rma_bw#0\n\
            #                 lane[2]:  4:tcp/lo.0 md[1]             -> md[1]/tcp/sysdev[255] rma_bw#1\n";
        assert_eq!(parse(told), "tcp/lo, cma/memory");
    }
}
