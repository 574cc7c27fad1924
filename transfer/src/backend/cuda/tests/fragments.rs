//! Small ranges, by a kernel: which stands for itself by what it should do.

use super::*;
use crate::backend::cuda::Fragments;
use crate::outcome::MemoryFate;
use crate::sys::cuda::fake::UNSUPPORTED_PTX;

fn up_to(up_to_bytes: u32) -> CudaOptions {
    CudaOptions {
        fragments: Fragments::Kernel { up_to_bytes },
        ..CudaOptions::default()
    }
}

/// Pairs of ranges of these lengths, one after the other on the host, and apart on the device.
fn pairs(host: &Region, device: &Region, lens: &[u64]) -> Vec<(Descriptor, Descriptor)> {
    let (mut pairs, mut at) = (Vec::new(), 0);
    for (number, &len) in lens.iter().enumerate() {
        let gap = number as u64 * 11;
        pairs.push((host.descriptor(at, len), device.descriptor(at + gap, len)));
        at += len;
    }
    pairs
}

#[test]
fn the_suite_of_all_backends_holds_with_a_kernel() {
    for (version, pin, limit) in [
        (12_080, true, 64 << 10),
        (12_000, true, 64 << 10),
        (13_000, false, 4096),
    ] {
        let fake = Fake::new(1);
        fake.set_version(version);
        let options = CudaOptions {
            pin,
            ..up_to(limit)
        };
        let bed = Bed::over(fake, options);
        let report = conformance::run(&bed).unwrap_or_else(|error| panic!("{version}: {error}"));
        assert_eq!(report.passed.len(), 11);
        assert!(bed.fake.count("cuLaunchKernel") > 0, "{version}");
        bed.end();
    }
}

/// Of one request: the small ones in one launch, the others by the driver; each byte is where it belongs, both ways.
#[test]
fn small_ranges_go_by_the_kernel_and_others_do_not() {
    let lens: Vec<u64> = (0..40)
        .map(|n| if n % 4 == 0 { 5000 } else { 100 + n })
        .collect();
    let all: u64 = lens.iter().sum();
    let bed = Bed::with(up_to(1000));
    let (device, address) = bed.device(all + 1000);
    let host = bed.host(&pattern(4, all as usize));
    bed.moved(Write, &pairs(&host, &device, &lens));
    assert_eq!(bed.fake.count("cuLaunchKernel"), 1);
    assert_eq!(bed.fake.count("cuMemcpyBatchAsync"), 1);
    let (sent, mut at) = (pattern(4, all as usize), 0);
    for (number, &len) in lens.iter().enumerate() {
        let found = bed.fake.read(address + at + number as u64 * 11, len);
        assert!(found == sent[at as usize..(at + len) as usize], "{number}");
        at += len;
    }
    let back = bed.host(&vec![0; all as usize]);
    bed.moved(Read, &pairs(&back, &device, &lens));
    assert!(content(&back) == sent);
    assert_eq!(bed.fake.count("cuLaunchKernel"), 2);
    // Few are left to the driver.
    bed.moved(Write, &pairs(&host, &device, &lens[1..4]));
    assert_eq!(bed.fake.count("cuLaunchKernel"), 2);
    drop((device, host, back));
    bed.fake.engine_frees(address);
    bed.end();
}

/// Host memory that kernels do not reach, or that an engine has pinned in a way that nobody knows, is left to the driver.
#[test]
fn host_memory_out_of_reach_is_left_to_the_driver() {
    let lens = [64; 20];
    let bed = Bed::with(up_to(1000));
    bed.fake.set_mapped(false);
    let (device, first) = bed.device(4096);
    let host = bed.host(&pattern(9, 2048));
    bed.moved(Write, &pairs(&host, &device, &lens));
    assert_eq!(bed.fake.count("cuLaunchKernel"), 0);
    // Within the device it reaches all.
    let (other, address) = bed.device(4096);
    bed.moved(Write, &pairs(&device, &other, &lens));
    assert_eq!(bed.fake.count("cuLaunchKernel"), 1);
    // The third of the second copy is the third of the first, gaps apart.
    let third = pattern(9, 2048)[128..192].to_vec();
    assert!(bed.fake.read(first + 128 + 22, 64) == third);
    let moved = bed.fake.read(first + 128, 64);
    assert!(bed.fake.read(address + 128 + 22, 64) == moved);
    bed.fake.set_mapped(true);
    let host = bed.host(&pattern(9, 4096));
    let start = host.core().mapping().unwrap().address();
    bed.fake.engine_pins(start, 4096);
    bed.moved(Write, &pairs(&host, &device, &lens));
    assert_eq!(bed.fake.count("cuLaunchKernel"), 1);
    bed.fake.check();
}

#[test]
fn a_driver_that_cannot_read_the_kernels_is_named() {
    let bed = Bed::with(up_to(1000));
    bed.fake.fail("cuModuleLoadData", 0, UNSUPPORTED_PTX);
    let address = bed.fake.engine_memory(0, 4096);
    let memory = bed.fake.lend(&bed.cuda, 0, address, 4096).unwrap();
    let error = bed.agent.register_device(memory).unwrap_err();
    assert!(error.to_string().contains("load kernels"), "{error}");
    // Who only wants what is faster does without.
    let measured = CudaOptions {
        fragments: Fragments::Measured,
        ..CudaOptions::default()
    };
    let bed = Bed::with(measured);
    bed.fake.fail("cuModuleLoadData", 0, UNSUPPORTED_PTX);
    let (device, address) = bed.device(4096);
    let host = bed.host(&pattern(9, 2048));
    bed.moved(Write, &pairs(&host, &device, &[64; 20]));
    assert!(bed.fake.read(address, 64) == pattern(9, 64));
    assert_eq!(bed.fake.count("cuLaunchKernel"), 0);
    bed.fake.check();
}

/// Both are timed, all that was taken for it is given back, and what is moved then is right, whoever won.
#[test]
fn the_faster_one_is_measured_once() {
    let measured = CudaOptions {
        fragments: Fragments::Measured,
        ..CudaOptions::default()
    };
    let bed = Bed::with(measured.clone());
    let (device, address) = bed.device(4096);
    let launches = bed.fake.count("cuLaunchKernel");
    assert!(launches >= 3 * 8 * 3, "{launches}");
    let (_other, _) = bed.device(4096);
    assert_eq!(bed.fake.count("cuLaunchKernel"), launches, "once");
    let host = bed.host(&pattern(9, 2048));
    bed.moved(Write, &pairs(&host, &device, &[64; 20]));
    assert!(bed.fake.read(address, 64) == pattern(9, 64));
    bed.fake.check();
    // One that copies wrongly is not used.
    let bed = Bed::with(measured);
    bed.fake.spoil_kernels();
    let (device, address) = bed.device(4096);
    let launches = bed.fake.count("cuLaunchKernel");
    assert_eq!(launches, 3, "no more after that");
    let host = bed.host(&pattern(9, 2048));
    bed.moved(Write, &pairs(&host, &device, &[64; 20]));
    assert!(bed.fake.read(address, 64) == pattern(9, 64));
    assert_eq!(bed.fake.count("cuLaunchKernel"), launches);
    bed.fake.check();
}

/// The request says so, when what was queued of it is over; the next one goes well.
#[test]
fn a_launch_that_fails_fails_its_request() {
    for call in ["cuLaunchKernel", "cuMemcpyAsync"] {
        let bed = Bed::with(up_to(1000));
        let (device, address) = bed.device(4096);
        let host = bed.host(&pattern(9, 2048));
        let made = bed.fake.count(call);
        assert_eq!(made, 0);
        bed.fake
            .fail(call, 0, crate::sys::cuda::fake::OUT_OF_MEMORY);
        let request = bed.posted(Write, &pairs(&host, &device, &[64; 20]));
        let failed = request.wait(PATIENCE).unwrap_err();
        assert_eq!(
            (failed.kind(), failed.fate()),
            (ErrorKind::Busy, MemoryFate::Settled)
        );
        // More often than there are lists.
        for _ in 0..10 {
            bed.moved(Write, &pairs(&host, &device, &[64; 20]));
        }
        assert!(bed.fake.read(address, 64) == pattern(9, 64));
        let launches = bed.fake.count("cuLaunchKernel");
        assert!(launches >= 10, "{launches}");
        drop((device, host, request));
        bed.fake.engine_frees(address);
        bed.end();
    }
}
