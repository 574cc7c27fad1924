//! What our transfers stand beside: the same bytes moved by the plainest means.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{Agent, DirectMode, HostMemory, Region, RegionOptions};
use rustix::fs::OFlags;

use crate::clock::process_cpu;

use super::contents::{self, POISON};
use super::plan::{Plan, Way};
use super::process::TargetProcess;
use super::remote::{Contents, Files, at};
use super::subject::Subject;
use super::target::RAW_HEADER_BYTES;

/// How long the other end of the raw socket may be silent.
const RAW_PATIENCE: Duration = Duration::from_secs(120);
/// What direct I/O asks of addresses, offsets and lengths on the devices we know.
const DIRECT_ALIGNMENT: usize = 4096;

fn source(plan: &Plan) -> Vec<u8> {
    let mut bytes = vec![0; plan.shape.total_bytes as usize];
    contents::fill(plan.shape.seed, 0, &mut bytes);
    bytes
}

fn poisoned(plan: &Plan) -> Vec<u8> {
    vec![POISON; plan.shape.total_bytes as usize]
}

fn verify(plan: &Plan, target: &[u8]) -> Result<()> {
    contents::verify(plan, |offset, block| {
        block.copy_from_slice(&target[offset as usize..][..block.len()]);
        Ok(())
    })
}

/// One contiguous copy between two private buffers: what memory gives.
pub(super) struct Memcpy {
    plan: Plan,
    source: Vec<u8>,
    target: Vec<u8>,
}

impl Memcpy {
    pub(super) fn new(plan: &Plan) -> Self {
        let plan = plan.in_order();
        Self {
            source: source(&plan),
            target: poisoned(&plan),
            plan,
        }
    }
}

impl Subject for Memcpy {
    fn name(&self) -> &'static str {
        "memcpy"
    }

    fn poison(&mut self) -> Result<()> {
        self.target.fill(POISON);
        Ok(())
    }

    fn move_all(&mut self) -> Result<u64> {
        self.target.copy_from_slice(&self.source);
        Ok(std::hint::black_box(&self.target).len() as u64)
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        let (start, len) = (
            self.plan.offset(position) as usize,
            self.plan.shape.block_bytes,
        );
        let block = start..start + len as usize;
        self.target[block.clone()].copy_from_slice(&self.source[block.clone()]);
        Ok(std::hint::black_box(&self.target[block]).len() as u64)
    }

    fn verify(&mut self) -> Result<()> {
        verify(&self.plan, &self.target)
    }
}

/// A bare loop of copies, block by block as planned, between a private buffer and shared memory that this process has
/// mapped: what is left of a transfer when all bookkeeping is taken away.
pub(super) struct MappedLoop {
    plan: Plan,
    local: Vec<u8>,
    shared: Region,
    _agent: Agent,
}

impl MappedLoop {
    pub(super) fn new(plan: &Plan) -> Result<Self> {
        let agent = Agent::builder("mapped-loop").build()?;
        let memory = HostMemory::shared(plan.shape.total_bytes)?;
        let shared = agent.register(memory, RegionOptions::default())?;
        shared.fill_at(0, shared.bytes(), POISON)?;
        let local = match plan.shape.way {
            Way::Write => source(plan),
            Way::Read => {
                contents::write_source(plan, |offset, block| shared.write_at(offset, block))?;
                poisoned(plan)
            }
        };
        Ok(Self {
            plan: plan.clone(),
            local,
            shared,
            _agent: agent,
        })
    }

    fn copy(&mut self, position: usize) -> Result<()> {
        let start = self.plan.offset(self.plan.local[position]) as usize;
        let own = &mut self.local[start..start + self.plan.shape.block_bytes as usize];
        let other = self.plan.offset(self.plan.remote[position]);
        match self.plan.shape.way {
            Way::Read => self.shared.read_at(other, own),
            Way::Write => self.shared.write_at(other, own),
        }
    }
}

impl Subject for MappedLoop {
    fn name(&self) -> &'static str {
        "mapped-loop"
    }

    fn poison(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => self.local.fill(POISON),
            Way::Write => self.shared.fill_at(0, self.shared.bytes(), POISON)?,
        }
        Ok(())
    }

    fn move_all(&mut self) -> Result<u64> {
        let blocks = self.plan.shape.blocks();
        for position in 0..blocks as usize {
            self.copy(position)?;
        }
        Ok(self.plan.offset(blocks))
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        self.copy(position as usize)?;
        Ok(self.plan.shape.block_bytes)
    }

    fn verify(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => verify(&self.plan, &self.local),
            Way::Write => contents::verify(&self.plan, |offset, block| {
                self.shared.read_at(offset, block)
            }),
        }
    }
}

/// Blocking loopback sockets between two processes: one question, a stream of blocks, one answer.
pub(super) struct RawTcp {
    plan: Plan,
    process: TargetProcess,
    stream: TcpStream,
    local: Vec<u8>,
}

impl RawTcp {
    pub(super) fn connect(plan: &Plan) -> Result<Self> {
        let plan = plan.in_order();
        let mut process = TargetProcess::start()?;
        let port = process.listen(plan.shape)?;
        let failed = |error| Error::io("connect the raw reference", error);
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        stream
            .set_read_timeout(Some(RAW_PATIENCE))
            .map_err(failed)?;
        stream
            .set_write_timeout(Some(RAW_PATIENCE))
            .map_err(failed)?;
        let local = match plan.shape.way {
            Way::Write => source(&plan),
            Way::Read => poisoned(&plan),
        };
        Ok(Self {
            plan,
            process,
            stream,
            local,
        })
    }

    fn exchange(&mut self, first: u32, count: u32) -> Result<u64> {
        let Plan { shape, .. } = self.plan;
        let is_write = shape.way == Way::Write;
        let mut header = [0; RAW_HEADER_BYTES];
        let words = [
            u64::from(is_write),
            shape.block_bytes,
            u64::from(first),
            u64::from(count),
        ];
        for (word, out) in words.iter().zip(header.chunks_exact_mut(8)) {
            out.copy_from_slice(&word.to_le_bytes());
        }
        let start = self.plan.offset(first) as usize;
        let len = self.plan.offset(count) as usize;
        let blocks = self.local[start..start + len].chunks_exact_mut(shape.block_bytes as usize);
        let run = || {
            self.stream.write_all(&header)?;
            for block in blocks {
                if is_write {
                    self.stream.write_all(block)?;
                } else {
                    self.stream.read_exact(block)?;
                }
            }
            if is_write {
                self.stream.read_exact(&mut [0])?;
            }
            Ok(len as u64)
        };
        run().map_err(|error| Error::io("the raw reference", error))
    }
}

impl Subject for RawTcp {
    fn name(&self) -> &'static str {
        "raw-tcp"
    }

    fn poison(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => self.local.fill(POISON),
            Way::Write => self.process.poison()?,
        }
        Ok(())
    }

    fn move_all(&mut self) -> Result<u64> {
        self.exchange(0, self.plan.shape.blocks())
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        self.exchange(position, 1)
    }

    fn verify(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => verify(&self.plan, &self.local),
            Way::Write => self.process.verify(),
        }
    }

    fn cpu(&mut self) -> Result<Duration> {
        Ok(process_cpu() + self.process.cpu()?)
    }
}

/// A loop of `pread` or `pwrite`, one block at a time, on a file of the same folder, cached or direct like ours.
pub(super) struct Disk {
    plan: Plan,
    files: Files,
    file: File,
    path: PathBuf,
    local: Vec<u8>,
    /// Where in `local` the first aligned byte is.
    start: usize,
}

impl Disk {
    pub(super) fn open(plan: &Plan, direct: DirectMode, folder: &Path) -> Result<Self> {
        let path = folder.join(format!("reference-{}", plan.shape.name()));
        let files = Files {
            paths: vec![path.clone()],
            blocks_each: plan.shape.blocks(),
        };
        files.write(
            plan,
            match plan.shape.way {
                Way::Read => Contents::Source,
                Way::Write => Contents::Poison,
            },
        )?;
        let file = open(&path, plan, direct)?;
        let mut local = vec![POISON; plan.shape.total_bytes as usize + DIRECT_ALIGNMENT];
        let start = local.as_ptr().align_offset(DIRECT_ALIGNMENT);
        if plan.shape.way == Way::Write {
            contents::fill(
                plan.shape.seed,
                0,
                &mut local[start..][..plan.shape.total_bytes as usize],
            );
        }
        Ok(Self {
            plan: plan.clone(),
            files,
            file,
            path,
            local,
            start,
        })
    }

    fn copy(&mut self, position: usize) -> Result<()> {
        let start = self.start + self.plan.offset(self.plan.local[position]) as usize;
        let block = &mut self.local[start..start + self.plan.shape.block_bytes as usize];
        let offset = self.plan.offset(self.plan.remote[position]);
        let done = match self.plan.shape.way {
            Way::Read => self.file.read_exact_at(block, offset),
            Way::Write => self.file.write_all_at(block, offset),
        };
        done.map_err(|error| at(&self.path, error))
    }
}

fn open(path: &Path, plan: &Plan, direct: DirectMode) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true);
    let is_aligned = plan
        .shape
        .block_bytes
        .is_multiple_of(DIRECT_ALIGNMENT as u64);
    if direct != DirectMode::Off && is_aligned {
        let flag = OFlags::DIRECT.bits() as i32;
        match options.clone().custom_flags(flag).open(path) {
            Err(error) if direct == DirectMode::On => return Err(at(path, error)),
            Err(_) => {}
            Ok(file) => return Ok(file),
        }
    } else if direct == DirectMode::On {
        let context = format!("--direct on needs blocks of a multiple of {DIRECT_ALIGNMENT} bytes");
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    options.open(path).map_err(|error| at(path, error))
}

impl Subject for Disk {
    fn name(&self) -> &'static str {
        "disk"
    }

    fn poison(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => self.local.fill(POISON),
            Way::Write => self.files.write(&self.plan, Contents::Poison)?,
        }
        Ok(())
    }

    fn move_all(&mut self) -> Result<u64> {
        let blocks = self.plan.shape.blocks();
        for position in 0..blocks as usize {
            self.copy(position)?;
        }
        Ok(self.plan.offset(blocks))
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        self.copy(position as usize)?;
        Ok(self.plan.shape.block_bytes)
    }

    fn verify(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => verify(&self.plan, &self.local[self.start..]),
            Way::Write => self.files.verify(&self.plan),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::{BackendKind, shape};
    use super::*;

    /// Every reference of one process in both directions: refused before, verified after.
    #[test]
    fn references_move_every_block() {
        let folder = tempfile::tempdir().unwrap();
        for way in [Way::Read, Way::Write] {
            let plan = Plan::new(shape(BackendKind::Shm, way)).unwrap();
            let subjects: [Box<dyn Subject>; 3] = [
                Box::new(Memcpy::new(&plan)),
                Box::new(MappedLoop::new(&plan).unwrap()),
                Box::new(Disk::open(&plan, DirectMode::Auto, folder.path()).unwrap()),
            ];
            for mut subject in subjects {
                subject.poison().unwrap();
                assert_eq!(subject.verify().unwrap_err().kind(), ErrorKind::Corrupt);
                assert_eq!(subject.move_all().unwrap(), 64 << 10, "{}", subject.name());
                subject.verify().unwrap();
                assert_eq!(subject.move_block(15).unwrap(), 4096);
                subject.verify().unwrap();
            }
        }
    }
}
