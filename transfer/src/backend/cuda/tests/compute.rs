//! What a device computes: which memory it is asked to touch, and what is kept when it does not end.

use super::*;
use crate::backend::cuda::{CudaKernels, NumberGroups};
use crate::convert::{Grid, PageHeads, bf16s_of_e4m3, e4m3s_of_bf16};
use kvcache_core::shape::reshard::PageOrder;

fn kernels(bed: &Bed) -> CudaKernels {
    CudaKernels::on(&bed.cuda.gpu(0).unwrap()).unwrap()
}

fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// More ranges than go in one launch, empty ones among them; each as the tiers compute it.
#[test]
fn ranges_are_summed() {
    let bed = Bed::new();
    let (device, address) = bed.device(64 << 10);
    let content = pattern(3, 64 << 10);
    bed.fake.write(address, &content);
    let kernels = kernels(&bed);
    let ranges: Vec<(u64, u64)> = (0..3000_u64).map(|n| (n * 13, n * 7 % 2500)).collect();
    let sums = kernels.checksums(&device, &ranges, PATIENCE).unwrap();
    for ((offset, len), sum) in ranges.iter().zip(&sums) {
        let (from, to) = (*offset as usize, (offset + len) as usize);
        assert_eq!(*sum, crc32c(&content[from..to]), "{offset}+{len}");
    }
    // The table is made once; none of nothing.
    assert_eq!(bed.fake.count("cuLaunchKernel"), 1 + 3);
    kernels.checksums(&device, &[(5, 9)], PATIENCE).unwrap();
    assert_eq!(
        kernels.checksums(&device, &[(5, 0)], PATIENCE).unwrap(),
        [0]
    );
    assert_eq!(bed.fake.count("cuLaunchKernel"), 5);
    for (offset, len) in [(65_000, 1000), (u64::MAX, 2), (0, (64 << 10) + 1)] {
        let error = kernels.checksums(&device, &[(offset, len)], PATIENCE);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::Invalid);
    }
    drop((device, kernels));
    bed.fake.engine_frees(address);
    bed.end();
}

#[test]
fn pages_change_their_order_between_regions() {
    let bed = Bed::new();
    let ((hnd, from), (nhd, to)) = (bed.device(4096), bed.device(8192));
    bed.fake.write(from, &pattern(8, 4096));
    bed.fake.write(to, &[7; 8192]);
    let side = |order, held, first| PageHeads { order, held, first };
    // Four heads, which are the second half of the target's eight.
    let target = side(PageOrder::TokensFirst, 8, 4);
    let source = side(PageOrder::HeadsFirst, 4, 0);
    let grid = Grid::of_heads(2, 8, 64, 4, target, source).unwrap();
    let kernels = kernels(&bed);
    kernels.rearrange(&nhd, &hnd, &grid, PATIENCE).unwrap();
    let mut expected = vec![7; 8192];
    grid.apply(&mut expected, &pattern(8, 4096)).unwrap();
    assert!(bed.fake.read(to, 8192) == expected);
    // The other way round it does not fit, and is not tried.
    let launches = bed.fake.count("cuLaunchKernel");
    let error = kernels.rearrange(&hnd, &nhd, &grid, PATIENCE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let address = bed.fake.engine_memory(0, 16_384);
    let odd = bed.fake.lend(&bed.cuda, 0, address + 8, 8192).unwrap();
    let odd = bed.agent.register_device(odd).unwrap();
    let error = kernels.rearrange(&odd, &hnd, &grid, PATIENCE).unwrap_err();
    assert!(error.to_string().contains("multiple of 16"), "{error}");
    assert_eq!(bed.fake.count("cuLaunchKernel"), launches);
    bed.fake.check();
}

#[test]
fn numbers_go_to_8_bits_and_back() {
    const COUNT: usize = 1200;
    let bed = Bed::new();
    let (device, address) = bed.device(16 << 10);
    let values: Vec<u8> = pattern(2, COUNT * 2);
    bed.fake.write(address, &values);
    let groups = |values| NumberGroups {
        values: (&device, values),
        numbers: (&device, 4096),
        scales: (&device, 8192),
        groups: 12,
        length: 100,
    };
    let kernels = kernels(&bed);
    kernels.to_e4m3(&groups(0), PATIENCE).unwrap();
    let values: Vec<u16> = values
        .chunks(2)
        .map(|bits| u16::from_ne_bytes([bits[0], bits[1]]))
        .collect();
    let (mut numbers, mut scales) = ([0; COUNT], [0.0_f32; 12]);
    e4m3s_of_bf16(&mut numbers, &mut scales, &values, 100).unwrap();
    let scale_bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_ne_bytes()).collect();
    assert!(bed.fake.read(address + 4096, COUNT as u64) == numbers);
    assert!(bed.fake.read(address + 8192, 48) == scale_bytes);
    kernels.from_e4m3(&groups(12_000), PATIENCE).unwrap();
    let mut back = [0; COUNT];
    bf16s_of_e4m3(&mut back, &numbers, &scales, 100).unwrap();
    let back: Vec<u8> = back.iter().flat_map(|value| value.to_ne_bytes()).collect();
    assert!(bed.fake.read(address + 12_000, COUNT as u64 * 2) == back);
    for wrong in [
        groups(1),
        groups((16 << 10) - 2398),
        NumberGroups {
            length: 0,
            ..groups(0)
        },
        NumberGroups {
            scales: (&device, 2),
            ..groups(0)
        },
        NumberGroups {
            groups: u32::MAX,
            length: u32::MAX,
            ..groups(0)
        },
    ] {
        let error = kernels.to_e4m3(&wrong, PATIENCE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    }
    bed.fake.check();
}

#[test]
fn other_memory_is_refused() {
    let bed = Bed::new();
    let kernels = kernels(&bed);
    let host = bed.host(&[0; 4096]);
    let error = kernels.checksums(&host, &[(0, 9)], PATIENCE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let address = bed.fake.engine_memory(1, 4096);
    let memory = bed.fake.lend(&bed.cuda, 1, address, 4096).unwrap();
    let other = bed.agent.register_device(memory).unwrap();
    let error = kernels.checksums(&other, &[(0, 9)], PATIENCE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let (gone, address) = bed.device(4096);
    bed.fake.engine_frees(address);
    let error = kernels.checksums(&gone, &[(0, 9)], PATIENCE).unwrap_err();
    assert!(error.to_string().contains("freed"), "{error}");
    let (device, _) = bed.device(4096);
    device.deregister().wait(PATIENCE).unwrap();
    let error = kernels.checksums(&device, &[(0, 9)], PATIENCE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    bed.fake.check();
}

/// Its memory is never called free, and nothing else is asked of these kernels.
#[test]
fn what_does_not_end_keeps_its_memory() {
    let bed = Bed::new();
    let (device, _) = bed.device(4096);
    let stuck = kernels(&bed);
    stuck.checksums(&device, &[(0, 9)], PATIENCE).unwrap();
    bed.fake.set_running(false);
    let error = stuck.checksums(&device, &[(0, 9)], Duration::from_millis(1));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Timeout);
    let error = stuck.checksums(&device, &[(0, 9)], PATIENCE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Poisoned);
    let gone = device.deregister();
    drop(stuck);
    bed.fake.set_running(true);
    bed.fake.advance(9);
    assert_eq!(
        gone.wait(Duration::ZERO).unwrap_err().kind(),
        ErrorKind::Busy
    );
    bed.fake.check();
}

/// An error of a launch is told, and the next one goes well; one of an event ends it all.
#[test]
fn errors_are_told() {
    let bed = Bed::new();
    let (device, address) = bed.device(4096);
    let kernels = kernels(&bed);
    for call in ["cuLaunchKernel", "cuMemcpyAsync"] {
        bed.fake
            .fail(call, 0, crate::sys::cuda::fake::OUT_OF_MEMORY);
        let error = kernels.checksums(&device, &[(0, 9)], PATIENCE).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        let sums = kernels.checksums(&device, &[(0, 9)], PATIENCE).unwrap();
        assert_eq!(sums, [crc32c(&bed.fake.read(address, 9))]);
    }
    bed.fake
        .fail("cuEventQuery", 0, crate::sys::cuda::fake::ILLEGAL_ADDRESS);
    kernels.checksums(&device, &[(0, 9)], PATIENCE).unwrap_err();
    let error = kernels.checksums(&device, &[(0, 9)], PATIENCE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Poisoned);
    bed.fake.check();
}
