//! Pinned memory that bytes pass through, in chunks that are lent to one piece of a request at a time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};
use tokio::sync::oneshot;

use super::super::cuda::CudaBackend;
use crate::region::{Body, RegionCore, RegionOptions};
use crate::request::Priority;
use crate::sys::cuda::Gpu;
use crate::sys::memory::{HostMemory, Mapping};

/// Bytes of a chunk: what goes one way while another one goes the other.
pub(super) const CHUNK_BYTES: u64 = 1 << 20;

/// A window for one device. It stays pinned until nobody has a chunk of it.
pub(super) struct Window {
    cuda: Arc<CudaBackend>,
    region: Arc<RegionCore>,
    is_pinned: bool,
    chunks: u64,
    lots: Mutex<Lots>,
}

/// What is free, and who waits for it.
struct Lots {
    free: Vec<u64>,
    normal: VecDeque<oneshot::Sender<Chunk>>,
    background: VecDeque<oneshot::Sender<Chunk>>,
    /// Chunks that what gives way to others has.
    in_background: u64,
}

impl Lots {
    /// Who waits longest of those whose turn it is.
    fn next(&mut self, background_max: u64) -> Option<(oneshot::Sender<Chunk>, Priority)> {
        while let Some(waiter) = self.normal.pop_front() {
            if !waiter.is_closed() {
                return Some((waiter, Priority::Normal));
            }
        }
        while self.in_background < background_max {
            let waiter = self.background.pop_front()?;
            if !waiter.is_closed() {
                self.in_background += 1;
                return Some((waiter, Priority::Background));
            }
        }
        None
    }
}

impl Window {
    /// Of so many bytes, all of which the device copies by itself if the driver pins them.
    pub(super) fn new(cuda: &Arc<CudaBackend>, gpu: &Arc<Gpu>, bytes: u64) -> Result<Arc<Self>> {
        let memory = HostMemory::anonymous(bytes)?;
        if let Err(error) = memory.mapping().populate(0, bytes) {
            tracing::debug!(%error, "pages of a window are taken one by one");
        }
        let region = RegionCore::new(Body::Host(memory), RegionOptions::default())?;
        let region = Arc::new(region);
        let is_pinned = cuda.pin(gpu, &region);
        let chunks = bytes / CHUNK_BYTES;
        Ok(Arc::new(Self {
            cuda: cuda.clone(),
            region,
            is_pinned,
            chunks,
            lots: Mutex::new(Lots {
                free: (0..chunks).rev().map(|n| n * CHUNK_BYTES).collect(),
                normal: VecDeque::new(),
                background: VecDeque::new(),
                in_background: 0,
            }),
        }))
    }

    /// The memory, as a region that nobody else knows.
    pub(super) fn region(&self) -> &Arc<RegionCore> {
        &self.region
    }

    /// Whether devices copy from and to it by themselves; otherwise its bytes are copied once more.
    pub(super) fn is_pinned(&self) -> bool {
        self.is_pinned
    }

    fn lock(&self) -> MutexGuard<'_, Lots> {
        self.lots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What gives way to others has half of it at most.
    fn background_max(&self) -> u64 {
        (self.chunks / 2).max(1)
    }

    /// A chunk, when there is one: those that give way to others wait for the rest.
    pub(super) async fn take(self: &Arc<Self>, priority: Priority) -> Result<Chunk> {
        let chunk = self.ask(priority).await;
        chunk.map_err(|_| Error::new(ErrorKind::Internal, "a window forgot who waits for it"))
    }

    fn ask(self: &Arc<Self>, priority: Priority) -> oneshot::Receiver<Chunk> {
        let (sender, receiver) = oneshot::channel();
        let mut lots = self.lock();
        match priority {
            Priority::Normal => lots.normal.push_back(sender),
            Priority::Background => lots.background.push_back(sender),
        }
        drop(lots);
        self.hand_out();
        receiver
    }

    /// Gives what is free to those who wait.
    fn hand_out(self: &Arc<Self>) {
        loop {
            let mut lots = self.lock();
            if lots.free.is_empty() {
                return;
            }
            let Some((waiter, priority)) = lots.next(self.background_max()) else {
                return;
            };
            let Some(start) = lots.free.pop() else {
                return;
            };
            drop(lots);
            let chunk = Chunk {
                window: self.clone(),
                start,
                priority,
            };
            // One who does not wait any more: the chunk comes back by being dropped, and is handed out there.
            drop(waiter.send(chunk));
        }
    }

    fn give_back(self: &Arc<Self>, start: u64, priority: Priority) {
        let mut lots = self.lock();
        lots.free.push(start);
        if priority == Priority::Background {
            lots.in_background -= 1;
        }
        drop(lots);
        self.hand_out();
    }

    #[cfg(test)]
    pub(super) fn free(&self) -> u64 {
        self.lock().free.len() as u64
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.cuda.unpin(&self.region);
    }
}

/// A part of a window, for whoever has it.
pub(super) struct Chunk {
    window: Arc<Window>,
    start: u64,
    priority: Priority,
}

impl Chunk {
    /// Bytes from the start of the window's region.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn region(&self) -> &Arc<RegionCore> {
        self.window.region()
    }

    /// The bytes, for the processor's own copies.
    pub(super) fn mapping(&self) -> Result<&Mapping> {
        self.window.region.mapping()
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.window.give_back(self.start, self.priority);
    }
}
