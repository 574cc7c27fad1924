//! Several devices of one process.

use super::*;
use crate::backend::cuda::DevicePath;

/// Memory of this device that an engine lends, and where it is.
fn device_of(bed: &Bed, ordinal: u32, bytes: u64) -> (Region, u64) {
    let address = bed.fake.engine_memory(ordinal as i32, bytes);
    let memory = bed.fake.lend(&bed.cuda, ordinal, address, bytes).unwrap();
    (bed.agent.register_device(memory).unwrap(), address)
}

/// By the devices themselves where they reach each other's memory, and by the driver otherwise; the report tells which.
#[test]
fn bytes_go_from_device_to_device() {
    for is_linked in [true, false] {
        let bed = Bed::new();
        bed.fake.set_linked(is_linked);
        let ((one, from), (other, to)) =
            (device_of(&bed, 0, 64 << 10), device_of(&bed, 1, 64 << 10));
        assert_eq!(bed.agent.device_paths(), []);
        for (operation, seed) in [(Write, 1), (Read, 2)] {
            let content = pattern(seed, 64 << 10);
            let (source, target) = match operation {
                Write => (from, to),
                Read => (to, from),
            };
            bed.fake.write(source, &content);
            bed.moved(
                operation,
                &[
                    (one.descriptor(0, 1000), other.descriptor(5, 1000)),
                    (one.descriptor(4096, 50_000), other.descriptor(8192, 50_000)),
                ],
            );
            let at = |base: u64| match operation {
                Write => base,
                Read => 0,
            };
            let found = bed.fake.read(target + at(5), 1000);
            let sent = match operation {
                Write => &content[..1000],
                Read => &content[5..1005],
            };
            assert!(found == sent, "{operation:?}");
        }
        // The device whose memory is read copies.
        let path = |by, other| DevicePath {
            by,
            other,
            is_peer_access: is_linked,
        };
        assert_eq!(bed.agent.device_paths(), [path(0, 1), path(1, 0)]);
        assert_eq!(bed.fake.count("cuMemcpyPeerAsync"), 4);
        assert_eq!(
            bed.fake.count("cuCtxEnablePeerAccess"),
            2 * u64::from(is_linked)
        );
        bed.fake.engine_frees(from);
        bed.fake.engine_frees(to);
        drop((one, other));
        bed.end();
    }
}

/// Host memory and two devices in one request; small ranges go by a kernel, which touches the memory of its own device alone.
#[test]
fn a_request_may_name_several_devices_and_host_memory() {
    let options = CudaOptions {
        fragments: crate::Fragments::Kernel { up_to_bytes: 4096 },
        ..CudaOptions::default()
    };
    let bed = Bed::with(options);
    let ((one, first), (other, second)) = (device_of(&bed, 0, 8192), device_of(&bed, 1, 64 << 10));
    let host = bed.host(&pattern(9, 64 << 10));
    bed.fake.write(first, &pattern(7, 8192));
    let pairs: Vec<_> = (0..40)
        .map(|n| match n % 4 {
            0 => (one.descriptor(n * 100, 100), other.descriptor(n * 512, 100)),
            _ => (
                host.descriptor(n * 100, 100),
                other.descriptor(n * 512, 100),
            ),
        })
        .collect();
    bed.moved(Write, &pairs);
    for n in 0..40_u64 {
        let seed = if n % 4 == 0 { 7 } else { 9 };
        let (at, found) = (n as usize * 100, bed.fake.read(second + n * 512, 100));
        assert!(found == pattern(seed, 8192)[at..at + 100], "{n}");
    }
    assert_eq!(bed.fake.count("cuMemcpyPeerAsync"), 10);
    for address in [first, second] {
        bed.fake.engine_frees(address);
    }
    drop((one, other, host));
    bed.end();
}

/// An engine has told the devices before; and a driver that refuses is one without peer access.
#[test]
fn what_the_driver_says_of_peer_access_is_no_error() {
    for (code, is_peer_access) in [(704, true), (711, false)] {
        let bed = Bed::new();
        let code = crate::sys::cuda::fake::code(code);
        bed.fake.fail("cuCtxEnablePeerAccess", 0, code);
        let ((one, from), (other, to)) = (device_of(&bed, 0, 4096), device_of(&bed, 1, 4096));
        bed.fake.write(from, &pattern(3, 4096));
        bed.moved(
            Write,
            &[(one.descriptor(0, 4096), other.descriptor(0, 4096))],
        );
        assert!(bed.fake.read(to, 4096) == pattern(3, 4096));
        assert_eq!(bed.agent.device_paths()[0].is_peer_access, is_peer_access);
        bed.fake.check();
    }
}
