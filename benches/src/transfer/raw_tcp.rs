//! Blocking sockets between two processes: one question, a stream of blocks, one answer.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::contents::{self, POISON};
use super::plan::{Plan, Way};
use super::process::{Target, TargetAt};
use super::subject::{Cpu, Subject};

/// How long the other end may be silent, and how long a connection is waited for.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often it is looked for one.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// The question: flags, first block, number of blocks.
const HEADER_BYTES: usize = 24;
/// Blocks go to the target.
const FLAG_WRITE: u64 = 1;
/// All blocks of the question go in one call of the socket each.
const FLAG_STREAM: u64 = 2;

/// Blocks of each connection: as equal as they get.
fn parts(plan: &Plan) -> Vec<Range<u32>> {
    let blocks = plan.shape.blocks();
    let each = blocks.div_ceil(plan.shape.threads.min(blocks));
    let starts = (0..blocks).step_by(each as usize);
    starts
        .map(|first| first..blocks.min(first + each))
        .collect()
}

/// Memory that is served, a part for each connection.
pub(super) struct RawMemory {
    plan: Plan,
    parts: Vec<(Range<u32>, Mutex<Vec<u8>>)>,
}

impl RawMemory {
    /// Poisoned memory of a plan, which must be in order.
    pub(super) fn new(plan: &Plan) -> Self {
        let bytes = |part: &Range<u32>| vec![POISON; plan.offset(part.end - part.start) as usize];
        let parts = parts(plan).into_iter();
        Self {
            plan: plan.clone(),
            parts: parts
                .map(|part| (part.clone(), Mutex::new(bytes(&part))))
                .collect(),
        }
    }

    pub(super) fn fill(&self, value: u8) {
        for (_, memory) in &self.parts {
            lock(memory).fill(value);
        }
    }

    /// Lets `body` see the bytes of the block that begins at `offset`.
    pub(super) fn block(&self, offset: u64, body: impl FnOnce(&mut [u8])) {
        let place = (offset / self.plan.shape.block_bytes) as u32;
        for (part, memory) in &self.parts {
            if part.contains(&place) {
                let mut memory = lock(memory);
                let inner = (offset - self.plan.offset(part.start)) as usize;
                let rest = &mut memory[inner..];
                let len = rest.len().min(self.plan.shape.block_bytes as usize);
                return body(&mut rest[..len]);
            }
        }
    }

    /// Serves as many connections as there are parts; returns the port.
    pub(super) fn listen(self: &Arc<Self>, address: IpAddr) -> Result<u16> {
        let failed = |error| Error::io("listen for the raw reference", error);
        let listener = TcpListener::bind((address, 0)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        let memory = self.clone();
        let serving = move || {
            let until = Instant::now() + PATIENCE;
            let mut expected = memory.parts.len();
            while expected > 0 && Instant::now() < until && Arc::strong_count(&memory) > 1 {
                let Ok((stream, _)) = listener.accept() else {
                    std::thread::sleep(LOOK_EVERY);
                    continue;
                };
                expected -= 1;
                let memory = memory.clone();
                // An end of the stream is how every run ends; the initiator tells of anything else.
                let serve = move || drop(memory.serve(stream));
                let _ = std::thread::Builder::new()
                    .name("raw".to_owned())
                    .spawn(serve);
            }
        };
        std::thread::Builder::new()
            .name("raw-listen".to_owned())
            .spawn(serving)
            .map_err(failed)?;
        Ok(port)
    }

    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let refused = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let mut header = [0; HEADER_BYTES];
        loop {
            stream.read_exact(&mut header)?;
            let mut words = header.chunks_exact(8).map(|word| {
                word.iter()
                    .rev()
                    .fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
            });
            let mut next = || words.next().unwrap_or(0);
            let (flags, first, count) = (next(), next(), next());
            let part = self.parts.iter().find(|(part, _)| {
                let last = first.checked_add(count);
                u64::from(part.start) <= first
                    && last.is_some_and(|last| last <= u64::from(part.end))
            });
            let (part, memory) = part.ok_or_else(refused)?;
            let mut memory = lock(memory);
            let block = self.plan.shape.block_bytes;
            let start = (first - u64::from(part.start)) * block;
            let range = memory
                .get_mut(start as usize..(start + count * block) as usize)
                .ok_or_else(refused)?;
            let chunk = if flags & FLAG_STREAM != 0 {
                range.len().max(1)
            } else {
                block as usize
            };
            for block in range.chunks_mut(chunk) {
                if flags & FLAG_WRITE == 0 {
                    stream.write_all(block)?;
                } else {
                    stream.read_exact(block)?;
                }
            }
            if flags & FLAG_WRITE != 0 {
                stream.write_all(&[1])?;
            }
        }
    }
}

fn lock(memory: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection for each thread, each with its part of the memory.
pub(super) struct RawTcp {
    plan: Plan,
    target: Target,
    parts: Vec<Range<u32>>,
    streams: Vec<TcpStream>,
    local: Vec<u8>,
    /// All blocks in one call, not one call for each.
    is_stream: bool,
}

impl RawTcp {
    pub(super) fn connect(plan: &Plan, at: &TargetAt, is_stream: bool) -> Result<Self> {
        let plan = plan.in_order();
        let mut target = Target::open(at)?;
        let place = target.listen(plan.shape)?;
        let parts = parts(&plan);
        let streams = parts
            .iter()
            .map(|_| connect(place))
            .collect::<std::io::Result<_>>()
            .map_err(|error| Error::io("connect the raw reference", error))?;
        let mut local = vec![POISON; plan.shape.total_bytes as usize];
        if plan.shape.way == Way::Write {
            contents::fill(plan.shape.seed, 0, &mut local);
        }
        Ok(Self {
            plan,
            target,
            parts,
            streams,
            local,
            is_stream,
        })
    }

    fn question(&self, first: u32, count: u32) -> [u8; HEADER_BYTES] {
        let mut flags = 0;
        if self.plan.shape.way == Way::Write {
            flags |= FLAG_WRITE;
        }
        if self.is_stream {
            flags |= FLAG_STREAM;
        }
        let mut header = [0; HEADER_BYTES];
        let words = [flags, u64::from(first), u64::from(count)];
        for (word, out) in words.iter().zip(header.chunks_exact_mut(8)) {
            out.copy_from_slice(&word.to_le_bytes());
        }
        header
    }

    fn is_write(&self) -> bool {
        self.plan.shape.way == Way::Write
    }

    fn chunk(&self) -> usize {
        if self.is_stream {
            usize::MAX
        } else {
            self.plan.shape.block_bytes as usize
        }
    }
}

fn connect(place: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&place, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Asks, and moves the bytes one way.
fn exchange(
    mut stream: &TcpStream,
    question: &[u8],
    bytes: &mut [u8],
    chunk: usize,
    is_write: bool,
) -> Result<u64> {
    let mut run = || {
        stream.write_all(question)?;
        for block in bytes.chunks_mut(chunk) {
            if is_write {
                stream.write_all(block)?;
            } else {
                stream.read_exact(block)?;
            }
        }
        if is_write {
            stream.read_exact(&mut [0])?;
        }
        Ok(bytes.len() as u64)
    };
    run().map_err(|error| Error::io("the raw reference", error))
}

impl Subject for RawTcp {
    fn name(&self) -> &'static str {
        if self.is_stream {
            "raw-tcp-stream"
        } else {
            "raw-tcp"
        }
    }

    fn poison(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => self.local.fill(POISON),
            Way::Write => self.target.poison()?,
        }
        Ok(())
    }

    fn move_all(&mut self) -> Result<u64> {
        let (is_write, chunk) = (self.is_write(), self.chunk());
        let questions: Vec<_> = self
            .parts
            .iter()
            .map(|part| self.question(part.start, part.end - part.start))
            .collect();
        let mut rest = self.local.as_mut_slice();
        let mut jobs = Vec::with_capacity(questions.len());
        for ((part, stream), question) in self.parts.iter().zip(&self.streams).zip(questions) {
            let len = self.plan.offset(part.end - part.start) as usize;
            let (own, others) = rest.split_at_mut(len);
            rest = others;
            jobs.push(move || exchange(stream, &question, own, chunk, is_write));
        }
        in_parallel(jobs)
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        let question = self.question(position, 1);
        let part = self.parts.iter().position(|part| part.contains(&position));
        let Some(stream) = part.and_then(|part| self.streams.get(part)) else {
            let context = format!("block {position} is in no part");
            return Err(Error::new(ErrorKind::Internal, context));
        };
        let start = self.plan.offset(position) as usize;
        let (is_write, chunk) = (self.is_write(), self.chunk());
        let block = &mut self.local[start..][..self.plan.shape.block_bytes as usize];
        exchange(stream, &question, block, chunk, is_write)
    }

    fn verify(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => contents::verify(&self.plan, |offset, block| {
                block.copy_from_slice(&self.local[offset as usize..][..block.len()]);
                Ok(())
            }),
            Way::Write => self.target.verify(),
        }
    }

    fn cpu(&mut self) -> Result<Cpu> {
        Ok(Cpu::with(self.target.cpu()?))
    }
}

/// Runs all jobs at once, the first of them on this thread, and adds up what they moved.
pub(super) fn in_parallel<J: FnOnce() -> Result<u64> + Send>(jobs: Vec<J>) -> Result<u64> {
    let mut jobs = jobs.into_iter();
    let Some(own) = jobs.next() else {
        return Ok(0);
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = jobs.map(|job| scope.spawn(job)).collect();
        let mut moved = own();
        for other in others {
            let result = other
                .join()
                .unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "a thread panicked")));
            moved = moved.and_then(|moved| Ok(moved + result?));
        }
        moved
    })
}
