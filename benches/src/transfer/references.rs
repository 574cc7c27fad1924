//! What our transfers stand beside: the same bytes moved by the plainest means.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{Agent, DirectMode, HostMemory, Region, RegionOptions};
use memmap2::{Advice, MmapMut};
use rustix::fs::OFlags;

use super::contents::{self, POISON};
use super::plan::{Plan, Way};
use super::raw_tcp::in_parallel;
use super::remote::{Contents, Files, at};
use super::subject::Subject;

/// A page, and what direct I/O asks of addresses, offsets and lengths on the devices we know.
const PAGE_BYTES: usize = 4096;

fn verify(plan: &Plan, target: &[u8]) -> Result<()> {
    contents::verify(plan, |offset, block| {
        block.copy_from_slice(&target[offset as usize..][..block.len()]);
        Ok(())
    })
}

/// One contiguous copy between two private buffers, a part for each thread: what memory gives.
pub(super) struct Memcpy {
    plan: Plan,
    source: Pages,
    target: Pages,
}

impl Memcpy {
    pub(super) fn new(plan: &Plan) -> Result<Self> {
        let plan = plan.in_order();
        Ok(Self {
            source: Pages::new(&plan, Contents::Source)?,
            target: Pages::new(&plan, Contents::Poison)?,
            plan,
        })
    }
}

impl Subject for Memcpy {
    fn name(&self) -> &'static str {
        "memcpy"
    }

    fn poison(&mut self) -> Result<()> {
        self.target.get().fill(POISON);
        Ok(())
    }

    fn move_all(&mut self) -> Result<u64> {
        let (source, target) = (self.source.get(), self.target.get());
        let each = target.len().div_ceil(self.plan.shape.threads as usize);
        let parts = source.chunks(each).zip(target.chunks_mut(each));
        let copy = |(from, to): (&'_ [u8], &'_ mut [u8])| {
            to.copy_from_slice(from);
            Ok(std::hint::black_box(to).len() as u64)
        };
        in_parallel(parts.map(|part| move || copy(part)).collect())
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        let (start, len) = (
            self.plan.offset(position) as usize,
            self.plan.shape.block_bytes,
        );
        let block = start..start + len as usize;
        let (source, target) = (self.source.get(), self.target.get());
        target[block.clone()].copy_from_slice(&source[block.clone()]);
        Ok(std::hint::black_box(&target[block]).len() as u64)
    }

    fn verify(&mut self) -> Result<()> {
        verify(&self.plan, self.target.get())
    }
}

/// Private memory that begins at a page and asks for huge ones, as what agents make does: that decides how fast copies are, and
/// into how many pieces a disk's calls fall.
struct Pages(MmapMut);

impl Pages {
    fn new(plan: &Plan, contents: Contents) -> Result<Self> {
        let len = plan.shape.total_bytes as usize;
        let mapped = MmapMut::map_anon(len);
        let mut bytes = mapped.map_err(|error| Error::io(format!("map {len} bytes"), error))?;
        // A wish, as theirs is: where there are none, neither has them.
        let _ = bytes.advise(Advice::HugePage);
        match contents {
            Contents::Source => contents::fill(plan.shape.seed, 0, &mut bytes),
            Contents::Poison => bytes.fill(POISON),
        }
        Ok(Self(bytes))
    }

    fn get(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// Which blocks each thread copies: those that lie in its part of the local memory, in the order of the plan.
struct Shares {
    /// Positions of each part's blocks.
    positions: Vec<Vec<u32>>,
    blocks_each: u32,
}

impl Shares {
    fn new(plan: &Plan, threads: u32) -> Self {
        let blocks_each = plan.shape.blocks().div_ceil(threads);
        let mut positions = vec![Vec::new(); threads as usize];
        for (position, place) in (0..).zip(&plan.local) {
            positions[(place / blocks_each) as usize].push(position);
        }
        Self {
            positions,
            blocks_each,
        }
    }

    /// Lets `copy` have each block: its bytes here and where it is on the other side.
    fn run(
        &self,
        plan: &Plan,
        local: &mut [u8],
        copy: &(impl Fn(&mut [u8], u64) -> Result<()> + Sync),
    ) -> Result<u64> {
        let part_bytes = plan.offset(self.blocks_each) as usize;
        let block_bytes = plan.shape.block_bytes as usize;
        let parts = self.positions.iter().zip(local.chunks_mut(part_bytes));
        let jobs = parts.zip(0..).map(|((positions, part), number)| {
            let first = number * self.blocks_each;
            move || {
                for &position in positions {
                    let inner = plan.offset(plan.local[position as usize] - first) as usize;
                    let other = plan.offset(plan.remote[position as usize]);
                    copy(&mut part[inner..inner + block_bytes], other)?;
                }
                Ok(positions.len() as u64 * plan.shape.block_bytes)
            }
        });
        in_parallel(jobs.collect())
    }
}

/// A bare loop of copies, block by block as planned, between a private buffer and shared memory that this process has
/// mapped: what is left of a transfer when all bookkeeping is taken away.
pub(super) struct MappedLoop {
    plan: Plan,
    shares: Shares,
    local: Pages,
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
            Way::Write => Pages::new(plan, Contents::Source)?,
            Way::Read => {
                contents::write_source(plan, |offset, block| shared.write_at(offset, block))?;
                Pages::new(plan, Contents::Poison)?
            }
        };
        Ok(Self {
            plan: plan.clone(),
            shares: Shares::new(plan, plan.shape.threads),
            local,
            shared,
            _agent: agent,
        })
    }
}

impl Subject for MappedLoop {
    fn name(&self) -> &'static str {
        "mapped-loop"
    }

    fn poison(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => self.local.get().fill(POISON),
            Way::Write => self.shared.fill_at(0, self.shared.bytes(), POISON)?,
        }
        Ok(())
    }

    fn move_all(&mut self) -> Result<u64> {
        let (shared, local) = (&self.shared, self.local.get());
        match self.plan.shape.way {
            Way::Read => self
                .shares
                .run(&self.plan, local, &|own, other| shared.read_at(other, own)),
            Way::Write => self
                .shares
                .run(&self.plan, local, &|own, other| shared.write_at(other, own)),
        }
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        let position = position as usize;
        let start = self.plan.offset(self.plan.local[position]) as usize;
        let own = &mut self.local.get()[start..][..self.plan.shape.block_bytes as usize];
        let other = self.plan.offset(self.plan.remote[position]);
        match self.plan.shape.way {
            Way::Read => self.shared.read_at(other, own)?,
            Way::Write => self.shared.write_at(other, own)?,
        }
        Ok(self.plan.shape.block_bytes)
    }

    fn verify(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => verify(&self.plan, self.local.get()),
            Way::Write => contents::verify(&self.plan, |offset, block| {
                self.shared.read_at(offset, block)
            }),
        }
    }
}

/// So many `pread` or `pwrite` at once keep a device busy; more queues than this gain nothing on those we know.
pub(super) const DEEP: u32 = 16;

/// Loops of `pread` or `pwrite`, one block at a time, on a file, cached or direct like ours.
pub(super) struct Disk {
    plan: Plan,
    shares: Shares,
    files: Files,
    file: File,
    local: Pages,
    /// Loops at once.
    threads: u32,
}

impl Disk {
    pub(super) fn open(
        plan: &Plan,
        direct: DirectMode,
        folder: &Path,
        threads: u32,
    ) -> Result<Self> {
        let files = Files::shared(plan, folder);
        let (there, here) = match plan.shape.way {
            Way::Read => (Contents::Source, Contents::Poison),
            Way::Write => (Contents::Poison, Contents::Source),
        };
        files.write(plan, there)?;
        let file = open(&files.paths[0], plan, direct)?;
        Ok(Self {
            plan: plan.clone(),
            shares: Shares::new(plan, threads),
            files,
            file,
            local: Pages::new(plan, here)?,
            threads,
        })
    }

    /// Calls for all blocks, or for one.
    fn transfer(&mut self, one: Option<u32>) -> Result<u64> {
        let (file, path, way) = (&self.file, &self.files.paths[0], self.plan.shape.way);
        let call = |block: &mut [u8], offset| {
            let done = match way {
                Way::Read => file.read_exact_at(block, offset),
                Way::Write => file.write_all_at(block, offset),
            };
            done.map_err(|error| at(path, error))
        };
        let (plan, local) = (&self.plan, self.local.get());
        let Some(position) = one.map(|position| position as usize) else {
            return self.shares.run(plan, local, &call);
        };
        let start = plan.offset(plan.local[position]) as usize;
        let block = &mut local[start..][..plan.shape.block_bytes as usize];
        call(block, plan.offset(plan.remote[position])).map(|()| plan.shape.block_bytes)
    }
}

fn open(path: &Path, plan: &Plan, direct: DirectMode) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true);
    let is_aligned = plan.shape.block_bytes.is_multiple_of(PAGE_BYTES as u64);
    if direct != DirectMode::Off && is_aligned {
        let flag = OFlags::DIRECT.bits() as i32;
        match options.clone().custom_flags(flag).open(path) {
            Err(error) if direct == DirectMode::On => return Err(at(path, error)),
            Err(_) => {}
            Ok(file) => return Ok(file),
        }
    } else if direct == DirectMode::On {
        let context = format!("--direct on needs blocks of a multiple of {PAGE_BYTES} bytes");
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    options.open(path).map_err(|error| at(path, error))
}

impl Subject for Disk {
    fn name(&self) -> &'static str {
        if self.threads == 1 {
            "disk"
        } else {
            "disk-deep"
        }
    }

    fn poison(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => self.local.get().fill(POISON),
            Way::Write => self.files.write(&self.plan, Contents::Poison)?,
        }
        Ok(())
    }

    fn move_all(&mut self) -> Result<u64> {
        self.transfer(None)
    }

    fn move_block(&mut self, position: u32) -> Result<u64> {
        self.transfer(Some(position))
    }

    fn verify(&mut self) -> Result<()> {
        match self.plan.shape.way {
            Way::Read => verify(&self.plan, self.local.get()),
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
            let mut shape = shape(BackendKind::Shm, way);
            shape.threads = 3;
            let plan = Plan::new(shape).unwrap();
            let disk = |threads| Disk::open(&plan, DirectMode::Auto, folder.path(), threads);
            let subjects: [Box<dyn Subject>; 4] = [
                Box::new(Memcpy::new(&plan).unwrap()),
                Box::new(MappedLoop::new(&plan).unwrap()),
                Box::new(disk(1).unwrap()),
                Box::new(disk(DEEP).unwrap()),
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
