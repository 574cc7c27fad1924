//! What a device's thread does.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind};

use super::lane::Shared;
use super::options::CudaOptions;
use super::staging::{Chunk, Chunks};
use super::task::{Built, Landing, Readiness, Task, Way};
use crate::request::Priority;
use crate::sys::cuda::{Flight, Stream, Unsent};

/// Batches that are in flight on a stream, of about so many bytes each: enough to keep a bus busy while the thread sleeps.
pub(super) const FLIGHTS_MAX: usize = 4;
const BATCH_BYTES: u64 = 16 << 20;

/// The same of a stream that waits for an engine's, which may take long to let go of the first; no more bytes than of the others.
const ORDERED_FLIGHTS_MAX: usize = 32;
const FLYING_BYTES_MAX: u64 = FLIGHTS_MAX as u64 * BATCH_BYTES;

/// Less of what gives way to others, so that they need not wait for much.
const BACKGROUND_FLIGHTS_MAX: usize = 2;
const BACKGROUND_BATCH_BYTES: u64 = 2 << 20;

/// The pause between two looks is this part of the wait so far, within bounds.
const PAUSE_PART: u32 = 8;
const PAUSE_MIN: Duration = Duration::from_micros(20);
const PAUSE_MAX: Duration = Duration::from_millis(1);

/// A batch in flight.
struct Sent {
    flight: Flight,
    task: u64,
    chunk: Option<Chunk>,
    landings: Vec<Landing>,
    priority: Priority,
    bytes: u64,
}

/// One stream, and what waits for it.
struct Line {
    stream: Stream,
    flights_max: usize,
    /// The task whose turn it is waits for an engine's stream, and nothing but the thread sees to that.
    is_held: bool,
    sent: VecDeque<Sent>,
    normal: VecDeque<u64>,
    background: VecDeque<u64>,
}

impl Line {
    fn new(stream: Stream, flights_max: usize) -> Self {
        Self {
            stream,
            flights_max,
            is_held: false,
            sent: VecDeque::new(),
            normal: VecDeque::new(),
            background: VecDeque::new(),
        }
    }

    fn has_room(&self) -> bool {
        let bytes = self.sent.iter().map(|sent| sent.bytes).sum::<u64>();
        self.sent.len() < self.flights_max && bytes < FLYING_BYTES_MAX
    }

    fn queue(&mut self, priority: Priority) -> &mut VecDeque<u64> {
        match priority {
            Priority::Normal => &mut self.normal,
            Priority::Background => &mut self.background,
        }
    }

    /// Has the stream wait for what a task begins after, or else the thread, which looks again.
    fn may_begin(&mut self, task: &mut Task) -> kvcache_core::Result<bool> {
        match task.readiness()? {
            Readiness::Ready => {}
            Readiness::After(point) => self.stream.follow(&point)?,
            Readiness::Held => self.is_held = true,
        }
        Ok(!self.is_held)
    }

    /// The task whose turn it is, if there is room for more of it.
    fn next(&self) -> Option<(u64, Priority)> {
        if let Some(&task) = self.normal.front() {
            return self.has_room().then_some((task, Priority::Normal));
        }
        let is_background = |sent: &&Sent| sent.priority == Priority::Background;
        let room = self.sent.iter().filter(is_background).count() < BACKGROUND_FLIGHTS_MAX;
        let task = self.background.front().filter(|_| room && self.has_room());
        task.map(|&task| (task, Priority::Background))
    }
}

/// The thread's own.
pub(super) struct Worker {
    shared: Arc<Shared>,
    /// In the order of [`Way::ALL`], and once more in that order for those that wait for an engine's stream.
    lines: Vec<Line>,
    tasks: HashMap<u64, Task>,
    next_task: u64,
    chunks: Chunks,
    polling: Duration,
    /// When something was last done.
    moved_at: Instant,
}

/// Nothing of the device can be told any more.
struct Broken(Error);

impl Worker {
    /// With a stream for each way, and one for what waits for an engine's stream before it goes that way.
    pub(super) fn new(
        shared: Arc<Shared>,
        free: [Stream; 3],
        ordered: [Stream; 3],
        options: &CudaOptions,
    ) -> Self {
        let free = free.map(|stream| Line::new(stream, FLIGHTS_MAX));
        let ordered = ordered.map(|stream| Line::new(stream, ORDERED_FLIGHTS_MAX));
        Self {
            shared,
            lines: free.into_iter().chain(ordered).collect(),
            tasks: HashMap::new(),
            next_task: 0,
            chunks: Chunks::new(options.staging_bytes),
            polling: options.polling,
            moved_at: Instant::now(),
        }
    }

    pub(super) fn run(mut self) {
        let gone = Gone(self.shared.clone());
        loop {
            let (took, is_closed) = self.take_in();
            let turn = self.land().and_then(|landed| Ok(landed | self.send()?));
            match turn {
                Err(Broken(error)) => {
                    self.break_down(&error);
                    break;
                }
                Ok(moved) if took || moved => self.moved_at = Instant::now(),
                Ok(_) if is_closed && self.tasks.is_empty() => break,
                Ok(_) => self.rest(is_closed),
            }
        }
        drop(gone);
    }

    /// What callers have posted or given up. Whether there was something, and whether no more will come.
    fn take_in(&mut self) -> (bool, bool) {
        let mut letters = self.shared.lock();
        let taken = std::mem::take(&mut letters.tasks);
        let reap = std::mem::take(&mut letters.reap);
        let is_closed = letters.is_closed;
        let let_go = std::mem::take(&mut letters.let_go);
        drop(letters);
        drop(let_go);
        let took = !taken.is_empty() || reap;
        for (way, priority, task) in taken {
            self.next_task += 1;
            let line = way as usize + if task.is_ordered() { Way::ALL.len() } else { 0 };
            self.tasks.insert(self.next_task, task);
            self.lines[line].queue(priority).push_back(self.next_task);
        }
        if reap {
            self.end_given_up();
        }
        (took, is_closed)
    }

    /// Of those that wait for their turn: the others end when what is in flight of them is over.
    fn end_given_up(&mut self) {
        for line in &mut self.lines {
            for queue in [&mut line.normal, &mut line.background] {
                let tasks = &mut self.tasks;
                queue.retain(|number| {
                    let sent = tasks.get_mut(number).is_none_or(Task::is_sent);
                    if sent && tasks.get(number).is_some_and(|task| task.open == 0) {
                        tasks.remove(number).into_iter().for_each(Task::end);
                    }
                    !sent
                });
            }
        }
    }

    /// Takes up what is over. Whether there was something.
    fn land(&mut self) -> Result<bool, Broken> {
        let mut landed = false;
        for line in &mut self.lines {
            while let Some(first) = line.sent.front_mut() {
                if !line.stream.is_over(&mut first.flight).map_err(Broken)? {
                    break;
                }
                let Some(sent) = line.sent.pop_front() else {
                    break;
                };
                landed = true;
                take_up(&mut self.tasks, &mut self.chunks, sent);
            }
        }
        Ok(landed)
    }

    /// Queues what there is room for. Whether there was something.
    fn send(&mut self) -> Result<bool, Broken> {
        let mut moved = false;
        for line in 0..self.lines.len() {
            self.lines[line].is_held = false;
            while let Some((number, priority)) = self.lines[line].next() {
                match self.send_of(line, number, priority)? {
                    true => moved = true,
                    // It waits for buffers, or for an engine.
                    false => break,
                }
            }
        }
        Ok(moved)
    }

    /// Queues the next batch of a task, or takes it from the queue when there is none. Whether it did either.
    fn send_of(&mut self, line: usize, number: u64, priority: Priority) -> Result<bool, Broken> {
        let line = &mut self.lines[line];
        let Some(task) = self.tasks.get_mut(&number) else {
            line.queue(priority).pop_front();
            return Ok(true);
        };
        if task.is_sent() {
            line.queue(priority).pop_front();
            if task.open == 0 {
                self.tasks.remove(&number).into_iter().for_each(Task::end);
            }
            return Ok(true);
        }
        match line.may_begin(task) {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) => {
                task.failure.get_or_insert(error);
                return Ok(true);
            }
        }
        let bytes = match priority {
            Priority::Normal => BATCH_BYTES,
            Priority::Background => BACKGROUND_BATCH_BYTES,
        };
        let Built {
            batch,
            chunk,
            landings,
        } = match task.build(bytes, &mut self.chunks) {
            Ok(Some(built)) => built,
            Ok(None) => return Ok(false),
            Err(error) => {
                task.failure.get_or_insert(error);
                return Ok(true);
            }
        };
        let bytes = batch.bytes();
        match line.stream.submit(batch) {
            Ok((flight, failure)) => {
                task.open += 1;
                if let Some(error) = failure {
                    task.failure.get_or_insert(error);
                }
                if task.is_queued() {
                    task.job.queued(flight.point());
                }
                line.sent.push_back(Sent {
                    flight,
                    task: number,
                    chunk,
                    landings,
                    priority,
                    bytes,
                });
                Ok(true)
            }
            Err(Unsent::Refused(error)) => {
                chunk
                    .into_iter()
                    .for_each(|chunk| self.chunks.give_back(chunk));
                task.failure.get_or_insert(error);
                Ok(true)
            }
            Err(Unsent::Broken(error)) => {
                // Something of it may be under way.
                task.open += 1;
                Err(Broken(error))
            }
        }
    }

    fn rest(&self, is_closed: bool) {
        let expects = |line: &Line| line.is_held || !line.sent.is_empty();
        if !self.lines.iter().any(expects) {
            return self.shared.sleep(None);
        }
        let waited = self.moved_at.elapsed();
        if waited < self.polling {
            return std::thread::yield_now();
        }
        let pause = (waited / PAUSE_PART).clamp(PAUSE_MIN, PAUSE_MAX);
        match is_closed {
            true => std::thread::sleep(pause),
            false => self.shared.sleep(Some(pause)),
        }
    }

    /// The context is beyond use. What is in flight is never called free: nothing tells when the device lets go of it.
    fn break_down(&mut self, error: &Error) {
        let text = format!("{error}; CUDA can be used again only in a new process");
        tracing::error!(%error, "a CUDA device is given up");
        let waiting = self.shared.break_down(&text);
        let failed = || Error::new(ErrorKind::Poisoned, text.clone());
        for task in self.tasks.drain().map(|(_, task)| task) {
            match task.open {
                0 => task.fail(failed()),
                // A job that is dropped keeps its memory for ever.
                _ => task.job.report(failed()),
            }
        }
        for (_, _, task) in waiting {
            task.fail(failed());
        }
    }
}

fn take_up(tasks: &mut HashMap<u64, Task>, chunks: &mut Chunks, sent: Sent) {
    let Sent {
        task: number,
        chunk,
        landings,
        ..
    } = sent;
    if let Some(task) = tasks.get_mut(&number) {
        task.open -= 1;
        // Also notes that its caller has given it up: then nothing more is written to its memory.
        let is_sent = task.is_sent();
        if task.failure.is_none()
            && let Err(error) = task.land(&landings)
        {
            task.failure = Some(error);
        }
        if is_sent && task.open == 0 {
            tasks.remove(&number).into_iter().for_each(Task::end);
        }
    }
    chunk.into_iter().for_each(|chunk| chunks.give_back(chunk));
}

/// However the thread ends, nothing is taken after that.
struct Gone(Arc<Shared>);

impl Drop for Gone {
    fn drop(&mut self) {
        for (_, _, task) in self.0.break_down("its thread has ended") {
            let text = "the thread of a CUDA device has ended";
            task.fail(Error::new(ErrorKind::Poisoned, text));
        }
    }
}
