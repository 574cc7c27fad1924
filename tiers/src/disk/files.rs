//! The open segment files of the disk tier.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::manager::RecoveredBlock;
use kvcache_core::place::{DiskSlot, SegmentId};
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{Agent, Descriptor, FileOptions, Operation, Region, RequestOptions, Side};
use tokio::sync::OnceCell;

use super::scan::{ScanFault, ScanReport, Scanner, Verdict};
use super::segment::{PAGE_BYTES, SegmentHeader, SegmentLayout, file_name, segment_of_file_name};
use crate::config::DiskConfig;
use crate::scratch::Scratch;

/// The file whose lock keeps a second process out of the directory.
const LOCK_FILE: &str = "kvfabric.lock";

/// Header pages read by one request while scanning.
const SCAN_BATCH: usize = 64;

/// The longest that one request for header pages may take.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(30);

/// The segment files of one directory, opened when they are first needed.
#[derive(Debug)]
pub(crate) struct SegmentFiles {
    agent: Agent,
    config: DiskConfig,
    layout: SegmentLayout,
    model_identity: [u8; 32],
    pages: Arc<Scratch>,
    open: Mutex<BTreeMap<SegmentId, Arc<OnceCell<Region>>>>,
    /// Locked for as long as this value lives.
    _lock: fs::File,
}

/// How a segment file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    /// To be looked through, and left alone.
    AsItIs,
    /// To be read and written, in its full length.
    Whole,
    /// As a new file, with its space reserved; one that is there is deleted.
    Anew,
}

/// What a start found in the directory.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    pub(crate) blocks: Vec<RecoveredBlock>,
    pub(crate) faults: Vec<ScanFault>,
    /// Files that could not be read at all.
    pub(crate) unreadable: u64,
}

impl SegmentFiles {
    /// Takes the directory into use.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when another process uses it, [`ErrorKind::Unsupported`] when io_uring is demanded and refused;
    /// otherwise what the system says of the path.
    pub(crate) fn open(
        agent: &Agent,
        config: &DiskConfig,
        layout: SegmentLayout,
        model_identity: [u8; 32],
        pages: Arc<Scratch>,
    ) -> Result<Self> {
        let directory = &config.path;
        fs::create_dir_all(directory)
            .map_err(|error| Error::io(format!("make directory {}", directory.display()), error))?;
        let lock = lock(&directory.join(LOCK_FILE))?;
        let engine = agent.start_file_engine(config.engine)?;
        tracing::info!(directory = %directory.display(), engine, "the disk tier is open");
        Ok(Self {
            agent: agent.clone(),
            config: config.clone(),
            layout,
            model_identity,
            pages,
            open: Mutex::default(),
            _lock: lock,
        })
    }

    /// The file and offset of a record, as messages name it.
    pub(crate) fn place(&self, slot: DiskSlot) -> String {
        let offset = self.layout.record_offset(slot.position);
        format!("{}:{offset}", self.path(slot.segment).display())
    }

    /// Where the record's bytes are.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such segment.
    pub(crate) fn payload(&self, slot: DiskSlot) -> Result<Descriptor> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let region = open
            .get(&slot.segment)
            .and_then(|cell| cell.get())
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::NotFound,
                    format!("{} is not open", self.place(slot)),
                )
            })?;
        let offset = self.layout.payload_offset(slot.position);
        Ok(region.descriptor(offset, self.layout.block_bytes()))
    }

    /// Where the record's header page and bytes go; makes the segment's file if it is not there.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] when the disk is full.
    pub(crate) async fn record(&self, slot: DiskSlot) -> Result<(Descriptor, Descriptor)> {
        let cell = {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.entry(slot.segment).or_default().clone()
        };
        let region = cell.get_or_try_init(|| self.create(slot.segment)).await?;
        let header = region.descriptor(self.layout.record_offset(slot.position), PAGE_BYTES);
        let payload = region.descriptor(
            self.layout.payload_offset(slot.position),
            self.layout.block_bytes(),
        );
        Ok((header, payload))
    }

    /// Deletes a segment's file; its space comes back.
    pub(crate) async fn drop_segment(&self, segment: SegmentId) -> Result<()> {
        let path = self.path(segment);
        drop(
            self.open
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&segment),
        );
        blocking(move || remove(&path)).await
    }

    /// Asks the system to put on disk what was written.
    pub(crate) async fn sync(&self) -> Result<()> {
        let regions: Vec<Region> = {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.values()
                .filter_map(|cell| cell.get().cloned())
                .collect()
        };
        for region in regions {
            region.sync()?.await?;
        }
        Ok(())
    }

    /// Makes an empty segment file: whatever had its name before is gone.
    async fn create(&self, segment: SegmentId) -> Result<Region> {
        let made = self.create_with_header(segment).await;
        if made.is_err() {
            // A half-made file would hold space on a disk that may be full.
            let path = self.path(segment);
            blocking(move || remove(&path)).await?;
        }
        made
    }

    async fn create_with_header(&self, segment: SegmentId) -> Result<Region> {
        let region = self.open_file(segment, Opening::Anew).await?;
        let header = SegmentHeader {
            model_identity: self.model_identity,
            segment: segment.0,
            block_bytes: self.layout.block_bytes(),
            slots: self.layout.slots(),
        };
        let page = self.pages.take(1, Instant::now() + HEADERS_TIMEOUT).await?;
        page.write(0, &header.encode())?;
        let pair = (
            page.descriptor(0, PAGE_BYTES),
            region.descriptor(0, PAGE_BYTES),
        );
        self.request(Operation::Write, vec![pair]).await?;
        Ok(region)
    }

    async fn open_file(&self, segment: SegmentId, opening: Opening) -> Result<Region> {
        let (agent, path) = (self.agent.clone(), self.path(segment));
        let whole = self.layout.file_bytes();
        let options = FileOptions {
            create: opening == Opening::Anew,
            len_bytes: (opening != Opening::AsItIs).then_some(whole),
            preallocate: opening == Opening::Anew,
            direct: self.config.direct,
            read_only: opening == Opening::AsItIs,
        };
        blocking(move || {
            if opening == Opening::Anew {
                remove(&path)?;
            }
            agent.open_file(&path, &options)
        })
        .await
    }

    async fn request(
        &self,
        operation: Operation,
        pairs: Vec<(Descriptor, Descriptor)>,
    ) -> Result<()> {
        let options = RequestOptions {
            deadline: Some(HEADERS_TIMEOUT),
            ..RequestOptions::default()
        };
        let request = self
            .agent
            .transfer(operation, &pairs, Side::Local, options)?;
        let done = request.completion().await;
        if done.is_err() {
            // The pages go back to the pool when the caller returns: not before they are free.
            request.drained().await;
        }
        done.map(|_| ()).map_err(Error::from)
    }

    /// Looks through the directory. Files of other segments than the `segments` first ones lie
    /// outside the budget and are deleted; foreign or damaged records are skipped and told. What was
    /// written last comes last.
    pub(crate) async fn recover(&self, segments: u32) -> Result<Recovered> {
        let mut recovered = Recovered::default();
        for (segment, path) in self.list()? {
            if segment.0 >= segments {
                tracing::info!(file = %path.display(), "delete a segment beyond the budget");
                remove(&path)?;
                continue;
            }
            let report = match self.scan(segment, &path).await {
                Ok(report) => report,
                Err(error) => {
                    tracing::warn!(file = %path.display(), %error, "segment cannot be read");
                    recovered.unreadable += 1;
                    continue;
                }
            };
            for fault in &report.faults {
                let directory = self.config.path.display();
                tracing::warn!("skipped {directory}/{fault}");
            }
            recovered
                .blocks
                .extend(report.blocks.iter().map(|found| RecoveredBlock {
                    info: found.info,
                    slot: DiskSlot {
                        segment,
                        position: found.position,
                    },
                    checksum: found.checksum,
                }));
            recovered.faults.extend(report.faults);
        }
        Ok(recovered)
    }

    /// The segment files, those written last at the end.
    fn list(&self) -> Result<Vec<(SegmentId, PathBuf)>> {
        let directory = &self.config.path;
        let failed = |error| Error::io(format!("list directory {}", directory.display()), error);
        let mut found = Vec::new();
        for entry in fs::read_dir(directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if let Some(segment) = entry.file_name().to_str().and_then(segment_of_file_name) {
                // A file system without times, or a file that goes at this moment: as if it were the oldest.
                let written = entry.metadata().and_then(|metadata| metadata.modified());
                found.push((written.ok(), SegmentId(segment), entry.path()));
            }
        }
        found.sort();
        let found = found.into_iter();
        Ok(found.map(|(_, segment, path)| (segment, path)).collect())
    }

    async fn scan(&self, segment: SegmentId, path: &Path) -> Result<ScanReport> {
        let length = fs::metadata(path)
            .map_err(|error| Error::io(format!("length of {}", path.display()), error))?
            .len();
        let mut scanner = Scanner::new(self.layout, self.model_identity, segment.0, length);
        if length < PAGE_BYTES {
            // Less than one page: nothing can be served, whatever it is.
            scanner.start(&[]);
            return Ok(scanner.finish());
        }
        let region = self.open_file(segment, Opening::AsItIs).await?;
        let first = self.read_pages(&region, &[0]).await?;
        let records = match scanner.start(&first[0]) {
            Verdict::Scan { records } => records,
            Verdict::Skip => return Ok(scanner.finish()),
        };
        let positions: Vec<u32> = (0..records).collect();
        for batch in positions.chunks(SCAN_BATCH) {
            let offsets: Vec<u64> = batch
                .iter()
                .map(|position| self.layout.record_offset(*position))
                .collect();
            let pages = self.read_pages(&region, &offsets).await?;
            for (position, page) in batch.iter().zip(&pages) {
                scanner.record(*position, page);
            }
        }
        let report = scanner.finish();
        if !report.blocks.is_empty() {
            drop(region);
            // From here on it takes new records too, so a file that was cut gets its length back.
            let region = self.open_file(segment, Opening::Whole).await?;
            let cell = Arc::new(OnceCell::new_with(Some(region)));
            self.open
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(segment, cell);
        }
        Ok(report)
    }

    async fn read_pages(&self, region: &Region, offsets: &[u64]) -> Result<Vec<Vec<u8>>> {
        let pages = self
            .pages
            .take(offsets.len(), Instant::now() + HEADERS_TIMEOUT)
            .await?;
        let pairs = offsets.iter().enumerate().map(|(at, offset)| {
            (
                pages.descriptor(at, PAGE_BYTES),
                region.descriptor(*offset, PAGE_BYTES),
            )
        });
        self.request(Operation::Read, pairs.collect()).await?;
        let mut read = Vec::with_capacity(offsets.len());
        for at in 0..offsets.len() {
            let mut page = vec![0; PAGE_BYTES as usize];
            pages.read(at, 0, &mut page)?;
            read.push(page);
        }
        Ok(read)
    }

    fn path(&self, segment: SegmentId) -> PathBuf {
        self.config.path.join(file_name(segment.0))
    }
}

fn lock(path: &Path) -> Result<fs::File> {
    let failed = |error| Error::io(format!("lock file {}", path.display()), error);
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => {
            let context = format!(
                "{} is held: another process uses this directory",
                path.display()
            );
            Err(Error::new(ErrorKind::Busy, context))
        }
        Err(fs::TryLockError::Error(error)) => Err(failed(error)),
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("delete {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

/// Runs a call that may wait for the disk where it holds nobody up.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(call).await.map_err(|error| {
        Error::new(ErrorKind::Internal, "a thread for a disk call").with_source(error)
    })?
}
