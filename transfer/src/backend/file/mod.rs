//! Files: one engine an agent, on io_uring where the kernel allows it and on blocking threads elsewhere.

mod answer;
mod blocking;
mod door;
mod inbox;
mod job;
mod open;
mod pinned;
mod plan;
mod ring;
#[cfg(test)]
mod tests;
mod uring;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use kvcache_core::{Error, ErrorKind, Result};

use super::gds::Stored;
use super::{Backend, Capabilities, Job, Refusal};
use crate::agent::Agent;
use crate::region::{External, MemoryKind, Region, RegionCore};
use crate::request::Priority;
use crate::sys::cufile::Cufile;

use answer::Reply;
use blocking::Blocking;
use inbox::Inbox;
use job::{FileJob, FileOperation, Waiter};
use open::OpenFile;
use uring::Uring;

pub use answer::Answer;
pub use open::{DirectMode, FileOptions};

/// The name in reports and statistics.
const NAME: &str = "file";

/// How the engine talks to the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FileEngineMode {
    /// io_uring, or blocking threads where the kernel refuses.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// Blocking threads.
    Blocking,
}

enum Engine {
    Uring(Uring),
    Blocking(Blocking),
}

/// Reads and writes files on threads of its own; ends with its last handle.
pub(crate) struct FileBackend {
    capabilities: Capabilities,
    inbox: Arc<Inbox>,
    engine: Engine,
    why: String,
}

impl FileBackend {
    /// Starts the engine.
    ///
    /// # Errors
    /// `Unsupported` when io_uring is demanded and refused, `Io` when the system gives no thread.
    fn start(mode: FileEngineMode) -> Result<Self> {
        let inbox = Arc::new(Inbox::default());
        let (engine, why) = match mode {
            FileEngineMode::Blocking => (
                Engine::Blocking(Blocking::start(&inbox)?),
                "blocking threads, as asked".to_owned(),
            ),
            FileEngineMode::Uring => (
                Engine::Uring(Uring::start(Arc::clone(&inbox))?),
                "io_uring".to_owned(),
            ),
            FileEngineMode::Auto => match Uring::start(Arc::clone(&inbox)) {
                Ok(uring) => (Engine::Uring(uring), "io_uring".to_owned()),
                Err(error) => {
                    tracing::warn!(%error, "files are read and written by blocking threads");
                    let why = format!("blocking threads, because io_uring is refused: {error}");
                    (Engine::Blocking(Blocking::start(&inbox)?), why)
                }
            },
        };
        let capabilities = Capabilities {
            local: Capabilities::HOST,
            remote: &[MemoryKind::File],
            notifications: false,
            checksums: false,
        };
        Ok(Self {
            capabilities,
            inbox,
            engine,
            why,
        })
    }

    /// Whether io_uring or blocking threads are at work, and why.
    fn report(&self) -> &str {
        &self.why
    }

    fn submit(&self, job: FileJob) -> Result<(), (FileJob, Error)> {
        self.inbox.submit(job)?;
        self.wake();
        Ok(())
    }

    fn wake(&self) {
        match &self.engine {
            Engine::Uring(uring) => uring.wake(),
            Engine::Blocking(blocking) => blocking.wake(),
        }
    }
}

impl Drop for FileBackend {
    fn drop(&mut self) {
        self.inbox.close("closed");
        self.wake();
    }
}

impl Backend for FileBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn post(&self, job: Job) -> Result<(), Refusal> {
        let job = FileJob::of_transfer(job).map_err(|(job, error)| job.refuse(error))?;
        self.submit(job)
            .map_err(|(job, error)| job.waiter.refuse(error))
    }

    fn reap(&self) {
        self.inbox.reap();
        self.wake();
    }
}

/// An open file as a region.
pub(crate) struct FileTarget {
    file: Arc<OpenFile>,
    backend: Arc<FileBackend>,
    /// As cuFile knows it, once it was asked.
    stored: OnceLock<Result<Stored, String>>,
}

impl FileTarget {
    /// What cuFile makes of it, asked once.
    ///
    /// # Errors
    /// Why it does not take it.
    pub(crate) fn stored(&self, cufile: &Arc<Cufile>) -> Result<&Stored, String> {
        let known = self.stored.get_or_init(|| {
            let (fd, alignment) = self.file.another_direct()?;
            Stored::new(cufile, fd, alignment)
        });
        known.as_ref().map_err(Clone::clone)
    }

    /// cuFile itself has failed: it is not asked any more.
    pub(crate) fn give_up(&self, reason: &str) {
        if let Some(Ok(stored)) = self.stored.get() {
            tracing::warn!(path = %self.file.path().display(), reason, "cuFile is not used for a file any more");
            stored.give_up(reason);
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Whether writes are refused.
    pub(crate) fn is_read_only(&self) -> bool {
        self.file.is_read_only()
    }

    /// Brings everything that was written before, and its metadata as far as needed to read it, to the device.
    ///
    /// # Errors
    /// `Poisoned` when the engine broke down. What the device says comes from the answer.
    fn sync(&self) -> Result<Answer<()>> {
        let (reply, answer) = Answer::channel();
        let job = FileJob {
            operation: FileOperation::Sync,
            files: vec![Arc::clone(&self.file)],
            memory: Arc::from([]),
            pieces: Vec::new(),
            priority: Priority::Normal,
            waiter: Box::new(SyncWaiter(reply)),
        };
        self.backend.submit(job).map_err(|(_, error)| error)?;
        Ok(answer)
    }
}

impl External for FileTarget {
    fn kind(&self) -> MemoryKind {
        MemoryKind::File
    }

    fn bytes(&self) -> u64 {
        self.file.len()
    }

    fn backend(&self) -> Arc<dyn Backend> {
        self.backend.clone()
    }
}

/// Whoever asked for a sync.
struct SyncWaiter(Reply<()>);

impl Waiter for SyncWaiter {
    fn is_abandoned(&self) -> bool {
        // Nothing is lent to a sync, so there is nothing to gain from ending it early.
        false
    }

    fn settle(self: Box<Self>, outcome: Result<()>) {
        self.0.send(outcome);
    }

    fn refuse(self: Box<Self>, error: Error) -> Refusal {
        Refusal(error)
    }
}

impl Agent {
    /// Opens a file as a region, for the remote side of requests. The file engine starts with the first one.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] or [`ErrorKind::Denied`] as the system says, [`ErrorKind::Invalid`] for something that is
    /// no regular file or is shorter than asked and read-only, [`ErrorKind::NoSpace`] when the space cannot be
    /// reserved, [`ErrorKind::Unsupported`] when direct I/O is demanded and refused. All name the path.
    pub fn open_file(&self, path: impl AsRef<Path>, options: &FileOptions) -> Result<Region> {
        self.core().check()?;
        let backend = self.file_backend(FileEngineMode::Auto)?;
        let file = Arc::new(OpenFile::open(path.as_ref(), options)?);
        self.register_external(Arc::new(FileTarget {
            file,
            backend,
            stored: OnceLock::new(),
        }))
    }

    /// Starts the file engine in this mode, unless it runs already; says how it talks to the kernel, and why.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when io_uring is demanded and refused, [`ErrorKind::Io`] when the system gives no
    /// thread.
    pub fn start_file_engine(&self, mode: FileEngineMode) -> Result<String> {
        self.core().check()?;
        Ok(self.file_backend(mode)?.report().to_owned())
    }

    fn file_backend(&self, mode: FileEngineMode) -> Result<Arc<FileBackend>> {
        self.core().extension(|| {
            let backend = FileBackend::start(mode)?;
            if let Engine::Uring(uring) = &backend.engine {
                self.core().exports().add_keeper(&uring.keeper());
            }
            Ok(backend)
        })
    }
}

/// The file that a region is, if it is one.
pub(crate) fn target_of(region: &RegionCore) -> Option<&FileTarget> {
    let any: &dyn std::any::Any = &**region.external()?;
    any.downcast_ref::<FileTarget>()
}

impl Region {
    fn file(&self) -> Result<&FileTarget> {
        target_of(self.core()).ok_or_else(|| {
            let text = format!("region {} is no file but {:?}", self.id(), self.kind());
            Error::new(ErrorKind::Unsupported, text)
        })
    }

    /// Brings everything written to this file before, and its metadata as far as needed to read it, to the device
    /// (`fdatasync`).
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when it is no file, [`ErrorKind::Poisoned`] when the engine broke down. What the device
    /// says comes from the answer.
    pub fn sync(&self) -> Result<Answer<()>> {
        self.file()?.sync()
    }

    /// Whether reads and writes of this file pass by the page cache, and for which alignment; or why not.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when it is no file.
    pub fn direct_report(&self) -> Result<String> {
        Ok(self.file()?.file.direct_report())
    }
}
