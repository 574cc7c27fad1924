//! What kernels do, by the references on the processor.

use std::ffi::c_void;

use super::super::kernels::RawGrid;
use super::State;
use super::work::Copy;
use crate::convert::{bf16s_of_e4m3, e4m3s_of_bf16};

/// What a kernel's table of remainders holds here.
const TABLE: [u8; 4096] = [0x7b; 4096];

/// A kernel with its arguments, in the order of `kernels.cu`.
pub(super) enum Launch {
    CopyPieces(u64, u32),
    Rearrange(RawGrid),
    ToE4m3(u64, u64, u64, u32, u32),
    OfE4m3(u64, u64, u64, u32, u32),
    CrcTable(u64),
    CrcRanges(u64, u64, u32, u64, u64),
}

impl Launch {
    /// # Safety
    /// The arguments are those of this kernel.
    pub(super) unsafe fn of(kernel: &str, arguments: &[*mut c_void]) -> Option<Self> {
        // SAFETY: an argument of this type is at each place that is asked for, by the caller's promise.
        let long = |at: usize| unsafe { arguments[at].cast::<u64>().read() };
        // SAFETY: as above.
        let short = |at: usize| unsafe { arguments[at].cast::<u32>().read() };
        Some(match kernel {
            "kvf_copy_pieces" => Self::CopyPieces(long(0), short(1)),
            // SAFETY: as above.
            "kvf_rearrange" => Self::Rearrange(unsafe { arguments[0].cast::<RawGrid>().read() }),
            "kvf_to_e4m3" => Self::ToE4m3(long(0), long(1), long(2), short(3), short(4)),
            "kvf_of_e4m3" => Self::OfE4m3(long(0), long(1), long(2), short(3), short(4)),
            "kvf_crc_table" => Self::CrcTable(long(0)),
            "kvf_crc_ranges" => Self::CrcRanges(long(0), long(1), short(2), long(3), long(4)),
            _ => return None,
        })
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap());
    bytes.chunks_exact(8).map(word).collect()
}

impl State {
    pub(super) fn run(&mut self, launch: Launch) {
        match launch {
            Launch::CopyPieces(list, count) => {
                for piece in words(&self.get(list, count as usize * 24)).chunks(3) {
                    self.kernel_copies(piece[0], piece[1], piece[2]);
                }
            }
            Launch::Rearrange(grid) => self.rearrange(&grid),
            Launch::ToE4m3(to, scales, from, groups, length) => {
                let count = groups as usize * length as usize;
                let values = self.get(from, count * 2);
                let values: Vec<u16> = values
                    .chunks(2)
                    .map(|bits| u16::from_ne_bytes([bits[0], bits[1]]))
                    .collect();
                let (mut numbers, mut made) = (vec![0; count], vec![0.0; groups as usize]);
                e4m3s_of_bf16(&mut numbers, &mut made, &values, length as usize).unwrap();
                self.put(to, &numbers);
                let made: Vec<u8> = made.iter().flat_map(|scale| scale.to_ne_bytes()).collect();
                self.put(scales, &made);
            }
            Launch::OfE4m3(to, from, scales, groups, length) => {
                let count = groups as usize * length as usize;
                let (numbers, scales) =
                    (self.get(from, count), self.get(scales, groups as usize * 4));
                let scales: Vec<f32> = scales
                    .chunks(4)
                    .map(|bits| f32::from_ne_bytes(bits.try_into().unwrap()))
                    .collect();
                let mut values = vec![0; count];
                bf16s_of_e4m3(&mut values, &numbers, &scales, length as usize).unwrap();
                let values: Vec<u8> = values
                    .iter()
                    .flat_map(|value| value.to_ne_bytes())
                    .collect();
                self.put(to, &values);
            }
            Launch::CrcTable(table) => self.put(table, &TABLE),
            Launch::CrcRanges(table, ranges, count, sums, segments) => {
                self.sum(table, (ranges, count), sums, segments);
            }
        }
    }

    fn rearrange(&mut self, grid: &RawGrid) {
        let place = |start: u64, steps: [u64; 3], run: [u32; 3]| {
            start
                + (0..3)
                    .map(|axis| steps[axis] * u64::from(run[axis]))
                    .sum::<u64>()
        };
        for a in 0..grid.counts[0] {
            for b in 0..grid.counts[1] {
                for c in 0..grid.counts[2] {
                    let to = place(grid.target, grid.target_steps, [a, b, c]);
                    let from = place(grid.source, grid.source_steps, [a, b, c]);
                    if (to | from | u64::from(grid.bytes)) % 16 != 0 {
                        self.wrong("a grid that is not aligned");
                    }
                    self.kernel_copies(to, from, u64::from(grid.bytes));
                }
            }
        }
    }

    fn sum(&mut self, table: u64, (ranges, count): (u64, u32), sums: u64, segments: u64) {
        if self.get(table, TABLE.len()) != TABLE {
            self.wrong("checksums without their table");
        }
        let ranges = words(&self.get(ranges, count as usize * 24));
        let mut first = 0;
        for (number, range) in ranges.chunks(3).enumerate() {
            let [start, bytes, own_first] = range.try_into().unwrap();
            if own_first != first || bytes == 0 {
                self.wrong("a range of a checksum begins at the wrong segment, or is empty");
            }
            first += bytes.div_ceil(1024);
            if self.spoils_sum_of == Some(number) {
                self.spoils_sum_of = None;
                let middle = start + bytes / 2;
                let byte = self.get(middle, 1)[0] ^ 0x10;
                self.put(middle, &[byte]);
            }
            let content = self.get(start, bytes as usize);
            let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &content) as u32;
            let at = sums + number as u64 * 4;
            let crc = crc ^ u32::from(self.is_spoilt);
            // It adds to what is there.
            let before = u32::from_ne_bytes(self.get(at, 4).try_into().unwrap());
            self.put(at, &(before ^ crc).to_ne_bytes());
        }
        if first != segments {
            self.wrong("a checksum of more segments than its ranges have, or of fewer");
        }
    }

    /// As a copy; host memory must be mapped for that.
    fn kernel_copies(&mut self, target: u64, source: u64, bytes: u64) {
        let is_device = |address| self.is_of_device(address);
        let is_reached = self.is_mapped || is_device(target) && is_device(source);
        if !is_reached {
            self.wrong("a kernel touches host memory that it does not reach");
            return;
        }
        let bytes = bytes as usize;
        self.copy_now(Copy {
            target,
            source,
            bytes,
        });
        if self.is_spoilt && bytes > 0 && self.is_of_device(target) {
            let first = self.get(target, 1)[0];
            self.put(target, &[first.wrapping_add(1)]);
        }
    }

    /// Bytes of device memory; zeros where there is none.
    fn get(&mut self, address: u64, bytes: usize) -> Vec<u8> {
        match self.device_range(address, bytes) {
            Some((start, at)) => self.memory[&start].backing.get(at, bytes),
            None => vec![0; bytes],
        }
    }

    fn put(&mut self, address: u64, content: &[u8]) {
        if let Some((start, at)) = self.device_range(address, content.len())
            && let Some(memory) = self.memory.get(&start)
        {
            memory.backing.put(at, content);
        }
    }

    fn device_range(&mut self, address: u64, bytes: usize) -> Option<(u64, usize)> {
        let found = self.memory.range(..=address).next_back();
        let found = found.map(|(start, memory)| (*start, memory.backing.len() as usize));
        match found {
            Some((start, len)) if address + bytes as u64 <= start + len as u64 => {
                Some((start, (address - start) as usize))
            }
            _ => {
                self.wrong(format!(
                    "a kernel touches {bytes} bytes at {address:#x}, no device memory"
                ));
                None
            }
        }
    }
}
