//! What a restart finds in a segment file, decided on bytes alone.
//!
//! Only headers are read: a block's bytes are verified against the header's checksum when they are
//! first fetched, so a restart costs one page per block, not the whole disk.

use std::fmt;

use kvcache_core::{BlockInfo, Checksum};

use super::segment::{PAGE_BYTES, SegmentHeader, SegmentLayout, file_name};
use crate::record::{Expected, RecordFault, RecordHeader};

/// A block that may be served from the place it was found at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundBlock {
    /// What the record says the block is.
    pub info: BlockInfo,
    /// The segment it lies in.
    pub segment: u32,
    /// Its place among the segment's records.
    pub position: u32,
    /// What its bytes must sum to.
    pub checksum: Checksum,
}

/// A place in a segment file that is not served, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanFault {
    /// The segment.
    pub segment: u32,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Why.
    pub fault: RecordFault,
}

impl fmt::Display for ScanFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}:{}: {}",
            file_name(self.segment),
            self.offset,
            self.fault
        )
    }
}

/// What one segment file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScanReport {
    /// Blocks that may be served, in the order of their positions.
    pub blocks: Vec<FoundBlock>,
    /// Places that may not, each named once.
    pub faults: Vec<ScanFault>,
}

/// What the first page says about the rest of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Look at so many records.
    Scan {
        /// Records whose header page lies wholly within the file.
        records: u32,
    },
    /// Nothing in this file is for us; the fault is in the report.
    Skip,
}

/// Goes through one segment file: the first page, then each record's header page in order.
#[derive(Debug)]
pub struct Scanner {
    layout: SegmentLayout,
    expected: Expected,
    segment: u32,
    file_bytes: u64,
    report: ScanReport,
}

impl Scanner {
    /// A scan of the file of `segment`, which is `file_bytes` long.
    #[must_use]
    pub fn new(
        layout: SegmentLayout,
        model_identity: [u8; 32],
        segment: u32,
        file_bytes: u64,
    ) -> Self {
        let expected = Expected {
            model_identity,
            block_bytes: layout.block_bytes(),
        };
        Self {
            layout,
            expected,
            segment,
            file_bytes,
            report: ScanReport::default(),
        }
    }

    /// Looks at the first page: `page` has what the file has of it.
    ///
    /// A file of another version, model or block size is skipped as a whole. One whose header is
    /// only damaged is still gone through, because every record says by itself what it is.
    pub fn start(&mut self, page: &[u8]) -> Verdict {
        let header = SegmentHeader::decode(page)
            .and_then(|header| header.check(&self.expected).map(|()| header));
        match header {
            Ok(_) => {}
            Err(fault @ (RecordFault::Magic | RecordFault::HeaderChecksum)) => {
                self.fault(0, fault);
            }
            // The file was made and the process ended before its header was written: no record is
            // ever written before that.
            Err(RecordFault::Vacant) => return Verdict::Skip,
            Err(fault) => {
                self.fault(0, fault);
                return Verdict::Skip;
            }
        }
        let whole = (0..self.layout.slots())
            .take_while(|position| {
                self.layout.record_offset(*position) + PAGE_BYTES <= self.file_bytes
            })
            .count() as u32;
        if self.file_bytes < self.layout.file_bytes() {
            let (found, needed) = (self.file_bytes, self.layout.file_bytes());
            self.fault(self.file_bytes, RecordFault::Truncated { found, needed });
        }
        Verdict::Scan { records: whole }
    }

    /// Looks at the header page of the record at `position`.
    pub fn record(&mut self, position: u32, page: &[u8]) {
        let offset = self.layout.record_offset(position);
        let header = RecordHeader::decode(page)
            .and_then(|header| header.check(&self.expected).map(|()| header));
        let header = match header {
            Ok(header) => header,
            Err(RecordFault::Vacant) => return,
            Err(fault) => return self.fault(offset, fault),
        };
        let needed = self.layout.payload_offset(position) + header.payload_bytes;
        if needed > self.file_bytes {
            let found = self.file_bytes - offset;
            let needed = needed - offset;
            return self.fault(offset, RecordFault::Truncated { found, needed });
        }
        self.report.blocks.push(FoundBlock {
            info: header.info,
            segment: self.segment,
            position,
            checksum: header.checksum,
        });
    }

    /// What was found.
    #[must_use]
    pub fn finish(self) -> ScanReport {
        self.report
    }

    fn fault(&mut self, offset: u64, fault: RecordFault) {
        self.report.faults.push(ScanFault {
            segment: self.segment,
            offset,
            fault,
        });
    }
}

#[cfg(test)]
mod tests;
