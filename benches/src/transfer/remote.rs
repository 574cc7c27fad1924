//! The other side of our transfers: how it is filled, overwritten and checked without the backend under test.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::Region;

use super::contents::{self, POISON};
use super::devices::OnDevice;
use super::objects::Objects;
use super::plan::{Plan, Way};
use super::process::Target;

/// Where the blocks are that are not in this process's local region.
pub(super) enum Remote {
    /// Another region of this process.
    Own(Region),
    /// Memory of another process, which looks after it by itself.
    Process(Target),
    /// Memory of another process, which somebody else looks after.
    Elsewhere,
    /// A file, or the files that objects are.
    Files(Files),
    /// Objects of a store.
    Objects(Objects),
    /// Memory of a GPU.
    Device(OnDevice),
}

/// Files that hold the blocks one after the other.
pub(super) struct Files {
    pub(super) paths: Vec<PathBuf>,
    /// Blocks in each; the last may have fewer.
    pub(super) blocks_each: u32,
}

impl Files {
    /// The one file of a case that ours and the references share: where a file lies on its device decides how fast it is.
    pub(super) fn shared(plan: &Plan, folder: &Path) -> Self {
        Self {
            paths: vec![folder.join(format!("{}.blocks", plan.shape.name()))],
            blocks_each: plan.shape.blocks(),
        }
    }

    /// Which file holds this offset, and where in it.
    fn place(&self, plan: &Plan, offset: u64) -> (&Path, u64) {
        let bytes_each = plan.offset(self.blocks_each);
        (
            &self.paths[(offset / bytes_each) as usize],
            offset % bytes_each,
        )
    }

    /// Writes every block's bytes as `contents` gives them, and waits until the device has them.
    pub(super) fn write(&self, plan: &Plan, contents: Contents) -> Result<()> {
        let write = |offset, block: &[u8]| {
            let (path, inner) = self.place(plan, offset);
            write_file(path, inner, block)
        };
        match contents {
            Contents::Source => contents::write_source(plan, write)?,
            Contents::Poison => {
                let block = vec![POISON; plan.shape.block_bytes as usize];
                for place in 0..plan.shape.blocks() {
                    write(plan.offset(place), &block)?;
                }
            }
        }
        for path in &self.paths {
            let file = File::open(path).map_err(|error| at(path, error))?;
            file.sync_all().map_err(|error| at(path, error))?;
        }
        Ok(())
    }

    /// Compares every block with what writes must have left.
    pub(super) fn verify(&self, plan: &Plan) -> Result<()> {
        contents::verify(plan, |offset, block| {
            let (path, inner) = self.place(plan, offset);
            read_file(path, inner, block)
        })
    }
}

/// What files are filled with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Contents {
    Source,
    Poison,
}

impl Remote {
    /// Writes the source's bytes, if this side is the source.
    pub(super) fn prepare(&self, plan: &Plan) -> Result<()> {
        if plan.shape.way == Way::Write {
            return Ok(());
        }
        match self {
            Self::Own(region) => {
                contents::write_source(plan, |offset, block| region.write_at(offset, block))
            }
            Self::Process(_) | Self::Elsewhere => Ok(()),
            Self::Files(files) => files.write(plan, Contents::Source),
            Self::Objects(objects) => objects.write(plan, Contents::Source),
            Self::Device(device) => device.write(plan, Contents::Source),
        }
    }

    /// Overwrites it, as the target of writes.
    pub(super) fn poison(&mut self, plan: &Plan) -> Result<()> {
        match self {
            Self::Own(region) => region.fill_at(0, region.bytes(), POISON),
            Self::Process(process) => process.poison(),
            Self::Elsewhere => Err(not_here()),
            Self::Files(files) => files.write(plan, Contents::Poison),
            Self::Objects(objects) => objects.write(plan, Contents::Poison),
            Self::Device(device) => device.write(plan, Contents::Poison),
        }
    }

    /// Compares it with what writes must have left.
    pub(super) fn verify(&mut self, plan: &Plan) -> Result<()> {
        match self {
            Self::Own(region) => {
                contents::verify(plan, |offset, block| region.read_at(offset, block))
            }
            Self::Process(process) => process.verify(),
            Self::Elsewhere => Err(not_here()),
            Self::Files(files) => files.verify(plan),
            Self::Objects(objects) => objects.verify(plan),
            Self::Device(device) => device.verify(plan),
        }
    }

    /// CPU time of the other process, if there is one.
    pub(super) fn cpu(&mut self) -> Result<Option<Duration>> {
        match self {
            Self::Process(process) => process.cpu().map(Some),
            Self::Own(_)
            | Self::Files(_)
            | Self::Objects(_)
            | Self::Device(_)
            | Self::Elsewhere => Ok(None),
        }
    }
}

/// Nobody may take silence for bytes that were compared.
fn not_here() -> Error {
    let text = "whoever exposed this memory overwrites and verifies it";
    Error::new(ErrorKind::Internal, text)
}

pub(super) fn at(path: &Path, error: std::io::Error) -> Error {
    Error::io(path.display().to_string(), error)
}

/// Writes at an offset of a file that need not exist, nor its folder.
pub(super) fn write_file(path: &Path, offset: u64, bytes: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|error| at(folder, error))?;
    }
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(|error| at(path, error))?;
    file.write_all_at(bytes, offset)
        .map_err(|error| at(path, error))
}

/// Reads exactly this much.
pub(super) fn read_file(path: &Path, offset: u64, bytes: &mut [u8]) -> Result<()> {
    let file = File::open(path).map_err(|error| at(path, error))?;
    file.read_exact_at(bytes, offset)
        .map_err(|error| at(path, error))
}
