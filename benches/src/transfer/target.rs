//! The target's process: memory that the initiator reads and writes.

use std::io::{BufRead, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{Agent, HostMemory, Region, RegionOptions, UcxOptions};

use crate::clock::process_cpu;

use super::contents::{self, POISON};
use super::plan::{BackendKind, Plan, Shape, Way};
use super::protocol::{Answer, Ask};

/// How long the raw reference may be silent.
const RAW_PATIENCE: Duration = Duration::from_secs(120);
/// The raw reference's question: way, block size, first block, number of blocks.
pub(super) const RAW_HEADER_BYTES: usize = 32;

/// Serves until the initiator closes the pipe.
///
/// # Errors
/// `Io` when a pipe fails.
pub(crate) fn serve() -> Result<()> {
    let failed = |error| Error::io("talk to the initiator", error);
    let mut memory = None;
    for line in std::io::stdin().lock().lines() {
        let answer = answer(&line.map_err(failed)?, &mut memory);
        let answer = answer.unwrap_or_else(|error| Answer::Failed {
            is_corrupt: error.kind() == ErrorKind::Corrupt,
            text: error.to_string(),
        });
        let mut text = serde_json::to_string(&answer).map_err(|error| {
            Error::new(ErrorKind::Internal, "encode a message").with_source(error)
        })?;
        text.push('\n');
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())
            .and_then(|()| out.flush())
            .map_err(failed)?;
    }
    Ok(())
}

fn answer(line: &str, memory: &mut Option<Exposed>) -> Result<Answer> {
    let ask: Ask = serde_json::from_str(line).map_err(|error| {
        Error::new(ErrorKind::Invalid, format!("message {line:?}")).with_source(error)
    })?;
    if let Ask::Cpu = ask {
        let nanoseconds = process_cpu().as_nanos() as u64;
        return Ok(Answer::Cpu { nanoseconds });
    }
    if let Ask::Expose { shape, is_raw } = ask {
        let (exposed, answer) = Exposed::new(shape, is_raw)?;
        *memory = Some(exposed);
        return Ok(answer);
    }
    let Some(exposed) = memory else {
        return Err(Error::new(ErrorKind::Invalid, "nothing is exposed yet"));
    };
    match ask {
        Ask::Poison => exposed.memory.poison()?,
        _ => exposed.verify()?,
    }
    Ok(Answer::Done)
}

/// Memory of this process that both kinds of initiator can reach.
enum Memory {
    Region { region: Region, _agent: Agent },
    Raw(Arc<Mutex<Vec<u8>>>),
}

struct Exposed {
    plan: Plan,
    memory: Memory,
}

impl Exposed {
    fn new(shape: Shape, is_raw: bool) -> Result<(Self, Answer)> {
        let mut plan = Plan::new(shape)?;
        let (memory, answer) = if is_raw {
            plan = plan.in_order();
            let memory = Arc::new(Mutex::new(vec![POISON; shape.total_bytes as usize]));
            let port = listen(memory.clone())?;
            (Memory::Raw(memory), Answer::Listening { port })
        } else {
            let agent = agent("target", shape.backend)?;
            let options = RegionOptions {
                remote_read: true,
                remote_write: true,
            };
            let region = agent.register(HostMemory::shared(shape.total_bytes)?, options)?;
            let metadata = agent.metadata().to_vec();
            let answer = Answer::Exposed {
                region: region.id().0,
                metadata,
            };
            (
                Memory::Region {
                    region,
                    _agent: agent,
                },
                answer,
            )
        };
        memory.poison()?;
        if shape.way == Way::Read {
            contents::write_source(&plan, |offset, block| memory.write(offset, block))?;
        }
        Ok((Self { plan, memory }, answer))
    }

    fn verify(&self) -> Result<()> {
        contents::verify(&self.plan, |offset, block| self.memory.read(offset, block))
    }
}

impl Memory {
    fn poison(&self) -> Result<()> {
        match self {
            Self::Region { region, .. } => region.fill_at(0, region.bytes(), POISON),
            Self::Raw(memory) => {
                lock(memory).fill(POISON);
                Ok(())
            }
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Region { region, .. } => region.write_at(offset, bytes),
            Self::Raw(memory) => {
                lock(memory)[offset as usize..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        match self {
            Self::Region { region, .. } => region.read_at(offset, bytes),
            Self::Raw(memory) => {
                bytes.copy_from_slice(&lock(memory)[offset as usize..][..bytes.len()]);
                Ok(())
            }
        }
    }
}

fn lock(memory: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An agent that reaches others only by this backend.
pub(super) fn agent(name: &str, backend: BackendKind) -> Result<Agent> {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Agent::builder(name)
        .shm(backend == BackendKind::Shm)
        .tcp((backend == BackendKind::Tcp).then_some(loopback))
        .ucx((backend == BackendKind::Ucx).then(UcxOptions::default))
        .build()
}

/// Serves memory over a plain socket, one connection; returns the port.
fn listen(memory: Arc<Mutex<Vec<u8>>>) -> Result<u16> {
    let failed = |error| Error::io("listen for the raw reference", error);
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let serving = move || {
        // An end of the stream is how every run ends; the initiator tells of anything else.
        if let Ok((stream, _)) = listener.accept() {
            let _ = serve_raw(stream, &memory);
        }
    };
    std::thread::Builder::new()
        .name("raw".to_owned())
        .spawn(serving)
        .map_err(failed)?;
    Ok(port)
}

fn serve_raw(mut stream: TcpStream, memory: &Mutex<Vec<u8>>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(RAW_PATIENCE))?;
    stream.set_write_timeout(Some(RAW_PATIENCE))?;
    let mut header = [0; RAW_HEADER_BYTES];
    loop {
        stream.read_exact(&mut header)?;
        let mut words = header.chunks_exact(8).map(|word| {
            word.iter()
                .rev()
                .fold(0, |value, byte| value << 8 | usize::from(*byte))
        });
        let mut next = || words.next().unwrap_or(0);
        let (is_read, block, first, count) = (next() == 0, next(), next(), next());
        let mut memory = lock(memory);
        let range = first.checked_mul(block).zip(count.checked_mul(block));
        let range = range.and_then(|(start, len)| memory.get_mut(start..start.checked_add(len)?));
        let Some(range) = range else {
            return Err(std::io::ErrorKind::InvalidInput.into());
        };
        for block in range.chunks_mut(block.max(1)) {
            if is_read {
                stream.write_all(block)?;
            } else {
                stream.read_exact(block)?;
            }
        }
        if !is_read {
            stream.write_all(&[1])?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::shape;
    use super::*;

    fn say(ask: &Ask, memory: &mut Option<Exposed>) -> Result<Answer> {
        answer(&serde_json::to_string(ask).unwrap(), memory)
    }

    /// Speaks to a target of each kind: memory that nobody wrote is wrong, as is memory with one changed byte.
    #[test]
    fn a_target_finds_its_memory_corrupted() {
        for (backend, is_raw) in [(BackendKind::Shm, false), (BackendKind::Tcp, true)] {
            let mut exposed = None;
            let shape = shape(backend, Way::Write);
            say(&Ask::Expose { shape, is_raw }, &mut exposed).unwrap();
            let error = say(&Ask::Verify, &mut exposed).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            // What a write would leave: each block at its place.
            let Exposed { plan, memory } = exposed.as_ref().unwrap();
            let mut block = vec![0; plan.shape.block_bytes as usize];
            for (&source, &target) in plan.sources().iter().zip(plan.targets()) {
                contents::fill(plan.shape.seed, plan.offset(source), &mut block);
                memory.write(plan.offset(target), &block).unwrap();
            }
            say(&Ask::Verify, &mut exposed).unwrap();
            exposed
                .as_ref()
                .unwrap()
                .memory
                .write(4096 * 2, b"wrong")
                .unwrap();
            let error = say(&Ask::Verify, &mut exposed).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains("1 of 16 blocks are wrong, first block 2"),
                "{error}"
            );
        }
    }

    /// Messages that make no sense, or come too early, are answered by an error.
    #[test]
    fn a_target_refuses_what_it_cannot_do() {
        let error = answer("{", &mut None).unwrap_err();
        assert!(error.to_string().contains("message"), "{error}");
        assert_eq!(
            say(&Ask::Poison, &mut None).unwrap_err().kind(),
            ErrorKind::Invalid
        );
        assert!(matches!(
            say(&Ask::Cpu, &mut None),
            Ok(Answer::Cpu { nanoseconds: 1.. })
        ));
    }
}
