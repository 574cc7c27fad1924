//! The NVMe tier: where a block lies in which file, and what is found there after a restart.

mod files;
mod scan;
mod segment;

pub(crate) use files::SegmentFiles;
pub use scan::{FoundBlock, ScanFault, ScanReport, Scanner, Verdict};
pub use segment::{
    BLOCK_BYTES_MAX, PAGE_BYTES, SegmentHeader, SegmentLayout, file_name, segment_of_file_name,
};
