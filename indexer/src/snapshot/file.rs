//! Snapshots in files: a magic number, then each piece with its length and checksum.
//!
//! A file is written under another name, synced, and renamed over the old one, so that there is always a whole one.

use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind as IoKind, Read, Write};
use std::path::{Path, PathBuf};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_proto::v1;
use prost::Message;

use super::corrupt;
use crate::wire::MESSAGE_BYTES_MAX;

/// What the file begins with. What follows is versioned by the first piece.
const MAGIC: [u8; 8] = *b"KVFINDEX";
/// Length and checksum before each piece, u32 little-endian both.
const HEADER_BYTES: usize = 8;
/// How much is read or written at once.
const BUFFER_BYTES: usize = 256 << 10;

/// CRC-32C (Castagnoli).
fn checksum(bytes: &[u8]) -> u32 {
    // 32 bits of checksum in the lower half.
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// Writes the pieces that `produce` gives to its argument into a file, which replaces the one at `path` as a whole.
///
/// # Errors
/// What `produce` fails with; `Io` naming the file; as [`check_replaceable`]. The old file stays then.
pub(crate) fn write(
    path: &Path,
    produce: impl FnOnce(&mut dyn FnMut(v1::SnapshotPiece) -> Result<()>) -> Result<()>,
) -> Result<u64> {
    check_replaceable(path)?;
    let part = with_suffix(path, ".part");
    let failed = |error| Error::io(format!("write snapshot {}", part.display()), error);
    let file = File::create(&part).map_err(failed)?;
    let mut output = BufWriter::with_capacity(BUFFER_BYTES, file);
    output.write_all(&MAGIC).map_err(failed)?;
    let mut bytes = MAGIC.len() as u64;
    let mut buffer = Vec::new();
    produce(&mut |piece| {
        buffer.clear();
        buffer.resize(HEADER_BYTES, 0);
        // A vector grows as it must, so this cannot fail.
        piece.encode(&mut buffer).map_err(|error| {
            Error::new(ErrorKind::Internal, "encode a snapshot").with_source(error)
        })?;
        let payload = &buffer[HEADER_BYTES..];
        let length = u32::try_from(payload.len()).map_err(|_| {
            Error::invalid("bytes of a piece", payload.len(), 0..=MESSAGE_BYTES_MAX)
        })?;
        let sum = checksum(payload);
        buffer[..4].copy_from_slice(&length.to_le_bytes());
        buffer[4..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
        bytes += buffer.len() as u64;
        output.write_all(&buffer).map_err(failed)
    })?;
    let file = output
        .into_inner()
        .map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)?;
    drop(file);
    std::fs::rename(&part, path)
        .and_then(|()| sync_folder(path))
        .map_err(|error| Error::io(format!("replace snapshot {}", path.display()), error))?;
    Ok(bytes)
}

/// Whether a snapshot may be written here: a path that was mistyped must not cost somebody else's file. A snapshot may be
/// replaced, whatever follows its beginning, and so may an empty file.
///
/// # Errors
/// `Invalid` for a file that is something else, for what is no file, and for a folder that there is not; `Io` when it cannot be
/// read.
pub(crate) fn check_replaceable(path: &Path) -> Result<()> {
    let wrong = |what: &str| {
        let text = format!("{} {what}: no snapshot is kept there", path.display());
        Err(Error::new(ErrorKind::Invalid, text))
    };
    let failed = |error| Error::io(format!("look at {}", path.display()), error);
    match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => return wrong("is no regular file"),
        Ok(_) => {}
        Err(error) if error.kind() == IoKind::NotFound => {
            return match folder_of(path).is_dir() {
                true => Ok(()),
                false => wrong("lies in a folder that does not exist"),
            };
        }
        Err(error) => return Err(failed(error)),
    }
    let mut begin = Vec::with_capacity(MAGIC.len());
    let file = File::open(path).map_err(failed)?;
    file.take(MAGIC.len() as u64)
        .read_to_end(&mut begin)
        .map_err(failed)?;
    match MAGIC.starts_with(&begin) {
        true => Ok(()),
        false => wrong("is another file than a snapshot, and would be replaced by one"),
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// The rename itself must survive a power cut too.
fn sync_folder(path: &Path) -> std::io::Result<()> {
    File::open(folder_of(path))?.sync_all()
}

fn folder_of(path: &Path) -> &Path {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// The pieces of a file, one after the other.
pub(crate) struct FileReader {
    input: BufReader<File>,
    path: PathBuf,
    offset: u64,
}

impl FileReader {
    /// Opens a snapshot; none when there is no such file.
    ///
    /// # Errors
    /// `Corrupt` when it is no snapshot; `Io` when it cannot be read.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == IoKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(Error::io(
                    format!("open snapshot {}", path.display()),
                    error,
                ));
            }
        };
        let mut reader = Self {
            input: BufReader::with_capacity(BUFFER_BYTES, file),
            path: path.to_owned(),
            offset: 0,
        };
        let mut magic = [0; MAGIC.len()];
        reader.fill(&mut magic)?;
        if magic != MAGIC {
            return Err(reader.error(corrupt("it does not begin as a snapshot does")));
        }
        Ok(Some(reader))
    }

    /// The next piece; an error at the end of the file, since the last piece says that it is the last.
    ///
    /// # Errors
    /// `Corrupt` naming the file, the offset and what is wrong there; `Io` when it cannot be read.
    pub(crate) fn next(&mut self) -> Result<v1::SnapshotPiece> {
        let mut header = [0; HEADER_BYTES];
        self.fill(&mut header)?;
        let [a, b, c, d, e, f, g, h] = header;
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        let sum = u32::from_le_bytes([e, f, g, h]);
        if length > MESSAGE_BYTES_MAX {
            let what = format!("a piece of {length} bytes, at most {MESSAGE_BYTES_MAX} are read");
            return Err(self.error(corrupt(what)));
        }
        let mut payload = vec![0; length];
        self.fill(&mut payload)?;
        if checksum(&payload) != sum {
            return Err(self.error(corrupt("the piece before does not match its checksum")));
        }
        v1::SnapshotPiece::decode(payload.as_slice()).map_err(|error| {
            self.error(corrupt("the piece before is malformed").with_source(error))
        })
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        match self.input.read_exact(buffer) {
            Ok(()) => {
                self.offset += buffer.len() as u64;
                Ok(())
            }
            Err(error) if error.kind() == IoKind::UnexpectedEof => {
                Err(self.error(corrupt("the file ends in the middle")))
            }
            Err(error) => Err(Error::io(format!("read {}", self.path.display()), error)),
        }
    }

    fn error(&self, error: Error) -> Error {
        error.at(format_args!(
            "snapshot {}, byte {}",
            self.path.display(),
            self.offset
        ))
    }
}
