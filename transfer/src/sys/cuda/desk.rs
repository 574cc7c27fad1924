//! Kernels beside copies, one at a time: over memory that is checked to be there, and kept until they have run.

use std::ffi::c_void;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::calls::Handle;
use super::gather::UsedList;
use super::gpu::Gpu;
use super::kernels::{Kernel, Kernels, Lists, RawGrid, Upload, argument};
use super::stream::{At, Flight, Place, Stream, Unsent};
use crate::convert::{GRID_ALIGNMENT, Grid};

/// Bytes that a thread sums: `CRC_SEGMENT` of `kernels.cu`.
const CRC_SEGMENT: u64 = 1024;

/// Bytes of the table of remainders.
const TABLE_BYTES: u64 = 4 * 256 * 4;

/// The most ranges that are summed in one launch.
pub(crate) const SUMS_MAX: usize = 1024;

/// Of a range: start, length, first segment; and half a word for its checksum.
const RANGE_WORDS: usize = 3;
const SLOT_BYTES: u64 = (SUMS_MAX * (RANGE_WORDS + 1) * 8) as u64;

/// Which slot of the lists is what.
const TABLE: u64 = 0;
const LIST: u64 = 1;

/// Groups of numbers on a device: where they are, or go.
#[derive(Clone, Copy)]
pub(crate) struct Groups {
    /// 8-bit numbers.
    pub(crate) numbers: At,
    /// 32-bit scales, one for each group.
    pub(crate) scales: At,
    /// bfloat16s.
    pub(crate) values: At,
    pub(crate) groups: u32,
    /// Numbers of a group.
    pub(crate) length: u32,
}

/// A device's kernels with a stream of their own.
pub(crate) struct Desk {
    kernels: Arc<Kernels>,
    stream: Stream,
    lists: Arc<Lists>,
}

impl Desk {
    /// # Errors
    /// What the driver says.
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        const { assert!(SLOT_BYTES >= TABLE_BYTES) };
        let kernels = Kernels::load(gpu)?;
        Ok(Self {
            stream: Stream::new(gpu)?,
            lists: Lists::new(&kernels, 2, SLOT_BYTES)?,
            kernels,
        })
    }

    /// The address of a place's bytes, which begin at a multiple of `unit`.
    fn address(&self, places: &[Place], at: At, len: u64, unit: u64) -> Result<u64> {
        let place = places
            .get(at.0)
            .ok_or_else(|| Error::new(ErrorKind::Internal, format!("no place {}", at.0)))?;
        let address = place.at(at.1, len)?;
        if !place.is_on(self.kernels.gpu()) {
            let text = "memory of another device than the kernels";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        if !address.is_multiple_of(unit) {
            let text = format!("memory at {address:#x} of a device: not at a multiple of {unit}");
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        Ok(address)
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// The arguments are the kernel's, and it touches with them the memory of `places` and of the lists alone.
    unsafe fn launch(
        &mut self,
        places: &Arc<[Place]>,
        kernel: Kernel,
        threads: u64,
        arguments: &mut [*mut c_void],
        list: Option<&Upload>,
    ) -> Result<(Flight, Option<Error>), Unsent> {
        let used = UsedList {
            lists: self.lists.clone(),
            slot: LIST,
        };
        let kernels = self.kernels.clone();
        let queue = |used: &UsedList, stream: Handle| {
            if let Some(upload) = list {
                // SAFETY: one flight at a time uses the list, which it keeps; the stream is given by its owner.
                unsafe { upload.queue(&used.lists, stream) }?;
            }
            // SAFETY: as the caller promises; the flight keeps the places, and the kernels with the list.
            unsafe { kernels.launch(kernel, threads, arguments, stream) }?;
            match list {
                // SAFETY: as for the way there.
                Some(upload) => unsafe { upload.queue_back(&used.lists, stream) },
                None => Ok(()),
            }
        };
        let what = format!("run {kernel:?}");
        // SAFETY: as the caller promises, and the list, which is given along.
        unsafe { self.stream.submit_work(places.clone(), used, &what, queue) }
    }

    /// Whether a flight is over.
    ///
    /// # Errors
    /// As [`Stream::is_over`].
    pub(crate) fn is_over(&mut self, flight: &mut Flight) -> Result<bool> {
        self.stream.is_over(flight)
    }

    /// Moves a grid's runs from one place, where offsets begin at a byte, to another.
    pub(crate) fn rearrange(
        &mut self,
        places: &Arc<[Place]>,
        target: (At, u64),
        source: (At, u64),
        grid: &Grid,
    ) -> Result<(Flight, Option<Error>), Unsent> {
        let side = |(at, len): (At, u64)| self.address(places, at, len, GRID_ALIGNMENT);
        let checked = grid.check(target.1, source.1);
        let (target, source) = checked
            .and_then(|()| Ok((side(target)?, side(source)?)))
            .map_err(Unsent::Refused)?;
        let mut raw = RawGrid::of(grid, target, source);
        let (threads, mut arguments) = (grid.moved_bytes() / GRID_ALIGNMENT, [argument(&mut raw)]);
        // SAFETY: the kernel takes a grid; `check` has it within both ranges, and `address` those within their places.
        unsafe { self.launch(places, Kernel::Rearrange, threads, &mut arguments, None) }
    }

    /// Turns bfloat16s into 8-bit numbers, or back.
    pub(crate) fn convert(
        &mut self,
        places: &Arc<[Place]>,
        of: &Groups,
        is_back: bool,
    ) -> Result<(Flight, Option<Error>), Unsent> {
        let count = u64::from(of.groups) * u64::from(of.length);
        let addresses = || {
            if count == 0 {
                return Err(Error::invalid("numbers to convert", count, 1..=u64::MAX));
            }
            Ok((
                self.address(places, of.numbers, count, 1)?,
                self.address(places, of.scales, u64::from(of.groups) * 4, 4)?,
                self.address(places, of.values, count.saturating_mul(2), 2)?,
            ))
        };
        let (mut numbers, mut scales, mut values) = addresses().map_err(Unsent::Refused)?;
        let (mut groups, mut length) = (of.groups, of.length);
        let (numbers, scales, values) = (
            argument(&mut numbers),
            argument(&mut scales),
            argument(&mut values),
        );
        let (groups, length) = (argument(&mut groups), argument(&mut length));
        let (kernel, mut arguments) = match is_back {
            false => (Kernel::ToE4m3, [numbers, scales, values, groups, length]),
            true => (Kernel::OfE4m3, [values, numbers, scales, groups, length]),
        };
        // SAFETY: the kernels take these addresses in this order, groups and their length, and touch so many numbers, values and scales,
        // all of which `address` has found within their places.
        unsafe { self.launch(places, kernel, count, &mut arguments, None) }
    }

    /// Makes the table that checksums need. Once, before the first.
    pub(crate) fn make_table(&mut self) -> Result<(Flight, Option<Error>), Unsent> {
        let table = self.lists.write(TABLE, &[0]).map_err(Unsent::Refused)?;
        let (mut start, none) = (table.target, Arc::from([]));
        // SAFETY: the kernel fills a table, for which the slot has room; nothing else uses it yet.
        unsafe {
            self.launch(
                &none,
                Kernel::CrcTable,
                256,
                &mut [argument(&mut start)],
                None,
            )
        }
    }

    /// Computes the CRC-32C of ranges, none of them empty, at most [`SUMS_MAX`]; read by [`Desk::sums`] when it is over.
    pub(crate) fn sum(
        &mut self,
        places: &Arc<[Place]>,
        ranges: &[(At, u64)],
    ) -> Result<(Flight, Option<Error>), Unsent> {
        let (mut words, mut segments) = (Vec::with_capacity(ranges.len() * 4), 0);
        if ranges.len() > SUMS_MAX {
            let error = Error::invalid("ranges to sum", ranges.len(), 0..=SUMS_MAX);
            return Err(Unsent::Refused(error));
        }
        for &(at, len) in ranges {
            if len == 0 {
                let error = Error::invalid("bytes to sum", len, 1..=u64::MAX);
                return Err(Unsent::Refused(error));
            }
            let start = self.address(places, at, len, 1).map_err(Unsent::Refused)?;
            words.extend([start, len, segments]);
            segments += len.div_ceil(CRC_SEGMENT);
        }
        let sums_at = words.len() as u64 * 8;
        words.resize(words.len() + ranges.len().div_ceil(2), 0);
        let list = self.lists.write(LIST, &words).map_err(Unsent::Refused)?;
        let table = self.lists.write(TABLE, &[0]).map_err(Unsent::Refused)?;
        let (mut table, mut start, mut count) = (table.target, list.target, ranges.len() as u32);
        let mut sums = list.target + sums_at;
        let mut arguments = [
            argument(&mut table),
            argument(&mut start),
            argument(&mut count),
            argument(&mut sums),
            argument(&mut segments),
        ];
        let threads = segments;
        // SAFETY: the kernel takes the table, a list of ranges and how many, as many checksums, which are zero, behind it, and how many
        // segments the ranges have; `address` has found all ranges within their places.
        unsafe {
            self.launch(
                places,
                Kernel::CrcRanges,
                threads,
                &mut arguments,
                Some(&list),
            )
        }
    }

    /// The checksums of the last [`Desk::sum`], of so many ranges, when that is over.
    pub(crate) fn sums(&self, count: usize) -> Result<Vec<u32>> {
        let mut words = vec![0; count * RANGE_WORDS + count.div_ceil(2)];
        self.lists.read(LIST, &mut words)?;
        let sums = words.split_off(count * RANGE_WORDS);
        let halves = sums.iter().flat_map(|word| {
            let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
            [
                u32::from_ne_bytes([a, b, c, d]),
                u32::from_ne_bytes([e, f, g, h]),
            ]
        });
        Ok(halves.take(count).collect())
    }
}
