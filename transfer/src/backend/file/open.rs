//! Local files as a place for bytes: how they are opened, and whether the page cache can be passed by.

use std::fs::{File, FileType, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::fs::{AtFlags, FallocateFlags, StatxFlags};

/// What direct I/O needs where the kernel does not say: a page, which every device and file system accepts.
const ALIGNMENT_ASSUMED: u64 = 4096;
/// The largest alignment believed; anything beyond it is a broken driver.
const ALIGNMENT_MAX: u64 = 1 << 20;

/// Whether reads and writes pass by the page cache (`O_DIRECT`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectMode {
    /// Where the file system can and the alignment of memory, offset and length allows; through the cache otherwise.
    #[default]
    Auto,
    /// Always: opening fails where the file system cannot, and requests at unaligned offsets are refused.
    On,
    /// Never.
    Off,
}

/// How a file is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// Make the file when it is missing.
    pub create: bool,
    /// Its length as a region, in bytes; a shorter writable file is extended. None: its length now.
    pub len_bytes: Option<u64>,
    /// Reserve the space of `len_bytes` at once, so that a full disk shows here and not in the middle of a write.
    pub preallocate: bool,
    /// Whether the page cache is passed by.
    pub direct: DirectMode,
    /// Refuse writes.
    pub read_only: bool,
}

/// The second handle of a file, for direct I/O, and what that demands.
#[derive(Debug)]
struct Direct {
    file: File,
    memory_alignment: u64,
    offset_alignment: u64,
}

/// An open file of fixed length.
#[derive(Debug)]
pub(super) struct OpenFile {
    path: PathBuf,
    len: u64,
    read_only: bool,
    mode: DirectMode,
    buffered: File,
    direct: Option<Direct>,
    direct_refused: Option<String>,
}

/// Through which handle one access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// Through the page cache.
    Buffered,
    /// Straight between the device and the caller's memory.
    Direct,
    /// Straight between the device and aligned memory of ours, because the caller's is not aligned.
    DirectBounced,
}

impl OpenFile {
    /// Opens `path`.
    ///
    /// # Errors
    /// `NotFound` or `Denied` as the system says, `Invalid` for something that is not a regular file or is shorter than
    /// asked and read-only, `NoSpace` when the space cannot be reserved, `Unsupported` when direct I/O is demanded and
    /// refused. All name the path.
    pub(super) fn open(path: &Path, options: &FileOptions) -> Result<Self> {
        // Before it is opened, too: that of a pipe to read waits for somebody who writes to it, and that of a directory to
        // write says only what the system calls it.
        if let Ok(found) = std::fs::metadata(path) {
            regular(found.file_type(), path)?;
        }
        let buffered = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .create(options.create && !options.read_only)
            .truncate(false)
            .open(path)
            .map_err(|error| Error::io(format!("open {}", path.display()), error))?;
        let found = buffered
            .metadata()
            .map_err(|error| Error::io(format!("stat {}", path.display()), error))?;
        regular(found.file_type(), path)?;
        let len = sized(&buffered, path, options)?;
        Self::with_handle(buffered, path, len, options)
    }

    /// Takes an open handle of any kind as a file of `len` bytes; its kind and length are not checked.
    pub(super) fn with_handle(
        buffered: File,
        path: &Path,
        len: u64,
        options: &FileOptions,
    ) -> Result<Self> {
        let (direct, direct_refused) = match options.direct {
            DirectMode::Off => (None, Some("switched off".to_owned())),
            DirectMode::Auto | DirectMode::On => match Direct::open(&buffered, path, options) {
                Ok(direct) => (Some(direct), None),
                Err(error) if options.direct == DirectMode::On => {
                    let text = format!("direct I/O on {}", path.display());
                    return Err(Error::new(ErrorKind::Unsupported, text).with_source(error));
                }
                Err(error) => (None, Some(error.to_string())),
            },
        };
        Ok(Self {
            path: path.to_owned(),
            len,
            read_only: options.read_only,
            mode: options.direct,
            buffered,
            direct,
            direct_refused,
        })
    }

    /// The length it was opened with, in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether writes are refused.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// How direct I/O stands, for reports: the alignment it needs, or why it is not used.
    pub(super) fn direct_report(&self) -> String {
        match (&self.direct, &self.direct_refused) {
            (Some(direct), _) => format!(
                "direct for memory aligned to {} and offsets to {} bytes",
                direct.memory_alignment, direct.offset_alignment
            ),
            (None, Some(reason)) => format!("through the page cache: direct I/O {reason}"),
            (None, None) => "through the page cache".to_owned(),
        }
    }

    /// The route of an access of `len` bytes at `offset` from or to `address`.
    ///
    /// # Errors
    /// `Invalid` when direct I/O is demanded and the range is not aligned.
    pub(super) fn route(&self, address: usize, offset: u64, len: usize) -> Result<Route> {
        let Some(direct) = &self.direct else {
            return Ok(Route::Buffered);
        };
        let range_aligned = offset.is_multiple_of(direct.offset_alignment)
            && (len as u64).is_multiple_of(direct.offset_alignment);
        let memory_aligned = (address as u64).is_multiple_of(direct.memory_alignment);
        match (range_aligned, memory_aligned, self.mode) {
            (true, true, _) => Ok(Route::Direct),
            (true, false, DirectMode::On) => Ok(Route::DirectBounced),
            (false, _, DirectMode::On) => {
                let text = format!(
                    "{} at {offset}, {len} bytes: direct I/O needs multiples of {}",
                    self.path.display(),
                    direct.offset_alignment
                );
                Err(Error::new(ErrorKind::Invalid, text))
            }
            _ => Ok(Route::Buffered),
        }
    }

    /// Whether going through the page cache is out of the question.
    pub(super) fn demands_direct(&self) -> bool {
        self.mode == DirectMode::On
    }

    /// What memory must be aligned to on the direct routes, in bytes.
    pub(super) fn memory_alignment(&self) -> usize {
        self.direct
            .as_ref()
            .map_or(1, |direct| direct.memory_alignment as usize)
    }

    /// A handle for direct I/O of somebody else's, and what offsets must be aligned to there, in bytes.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn another_direct(&self) -> Result<(OwnedFd, u64), String> {
        let Some(direct) = &self.direct else {
            return Err(self.direct_report());
        };
        let file = direct.file.try_clone().map_err(|error| error.to_string())?;
        Ok((file.into(), direct.offset_alignment))
    }

    /// The file descriptor of a route.
    pub(super) fn descriptor(&self, route: Route) -> RawFd {
        match (&self.direct, route) {
            (Some(direct), Route::Direct | Route::DirectBounced) => direct.file.as_raw_fd(),
            _ => self.buffered.as_raw_fd(),
        }
    }
}

impl Direct {
    fn open(buffered: &File, path: &Path, options: &FileOptions) -> io::Result<Self> {
        let (memory_alignment, offset_alignment) = alignment(buffered)?;
        // Opened through the handle, not the path: another file may have taken the name meanwhile.
        let own = format!("/proc/self/fd/{}", buffered.as_raw_fd());
        let file = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(libc::O_DIRECT)
            .open(&own)
            .map_err(|error| io::Error::new(error.kind(), format!("refused: {error}")))?;
        tracing::debug!(path = %path.display(), memory_alignment, offset_alignment, "direct I/O");
        Ok(Self {
            file,
            memory_alignment,
            offset_alignment,
        })
    }
}

/// What the kernel demands of memory addresses and of file offsets and lengths for direct I/O.
fn alignment(file: &File) -> io::Result<(u64, u64)> {
    let stat = match rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(stat) => stat,
        Err(rustix::io::Errno::NOSYS) => return Ok((ALIGNMENT_ASSUMED, ALIGNMENT_ASSUMED)),
        Err(error) => return Err(error.into()),
    };
    if !StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN) {
        return Ok((ALIGNMENT_ASSUMED, ALIGNMENT_ASSUMED));
    }
    let pair = (
        u64::from(stat.stx_dio_mem_align),
        u64::from(stat.stx_dio_offset_align),
    );
    for value in [pair.0, pair.1] {
        if !value.is_power_of_two() || value > ALIGNMENT_MAX {
            return Err(io::Error::other(format!("not offered (alignment {value})")));
        }
    }
    Ok(pair)
}

fn regular(kind: FileType, path: &Path) -> Result<()> {
    let what = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_block_device() || kind.is_char_device() {
        "a device"
    } else {
        "neither a file nor a directory"
    };
    let text = format!("{} is {what}, expected a regular file", path.display());
    Err(Error::new(ErrorKind::Invalid, text))
}

/// Brings the file to the length asked for; answers its length as a region.
fn sized(file: &File, path: &Path, options: &FileOptions) -> Result<u64> {
    let place = |what: &str| format!("{what} {}", path.display());
    let len = file
        .metadata()
        .map_err(|error| Error::io(place("stat"), error))?
        .len();
    let Some(wanted) = options.len_bytes else {
        return Ok(len);
    };
    if options.read_only {
        if wanted > len {
            let text = format!("{} has {len} bytes, expected {wanted}", path.display());
            return Err(Error::new(ErrorKind::Invalid, text));
        }
        return Ok(wanted);
    }
    if options.preallocate && wanted > 0 {
        match rustix::fs::fallocate(file.as_fd(), FallocateFlags::empty(), 0, wanted) {
            // A file system without reservation still extends the file.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(Error::io(place("reserve the space of"), error.into())),
        }
    }
    let len = file
        .metadata()
        .map_err(|error| Error::io(place("stat"), error))?
        .len();
    if len < wanted {
        file.set_len(wanted)
            .map_err(|error| Error::io(place("extend"), error))?;
    }
    Ok(wanted)
}
