//! Which model it is: what its folder tells of the weights.
//!
//! | the model is in | its weights are named by |
//! |---|---|
//! | a snapshot folder of a model hub's cache (`models--ORG--NAME/snapshots/COMMIT`) | repository and commit |
//! | another folder with weight files, or one weight file | a digest of these files |
//! | neither, and the operator gave a name | that name |
//! | neither | nothing: that is an error, because blocks of different weights would be taken for each other |
//!
//! # Digest of weight files, version 1
//!
//! ```text
//! B3("kvfabric/weights/v1\0" u32(count) { u64(bytes of name) name B3(file)[32] } sorted by name)      little-endian
//! ```
//!
//! Weight files are those that end in `.safetensors`, `.bin`, `.pt` or `.gguf`, in that folder itself. A file is read once:
//! its digest is kept in `$XDG_CACHE_HOME/kvfabric/weights` under its device, inode, size and modification time.

mod cache;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kvcache_core::prefix::data::{ModelDescription, ModelIdentity, Weights};
use kvcache_core::{Error, ErrorKind, Result};

pub use cache::DigestCache;

const WEIGHTS: &[u8] = b"kvfabric/weights/v1\0";
const SUFFIXES: [&str; 4] = ["safetensors", "bin", "pt", "gguf"];
/// More weight files than any model has; a folder with more is not a model's.
const FILES_MAX: usize = 65_536;
const READ_BYTES: usize = 1 << 20;
const COMMIT_DIGITS: usize = 40;

/// A model, as an engine or its operator describes it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Model<'a> {
    /// The folder it was loaded from, or its one weight file; none if it is not known.
    pub path: Option<&'a Path>,
    /// The operator's name for the weights, taken when `path` tells nothing; it must change when the weights do.
    pub name: Option<&'a str>,
    /// The cache's element type, like `bf16`.
    pub element: &'a str,
    /// How weights and activations are quantised; empty for not at all.
    pub quantisation: &'a str,
    /// The order of bytes within a block, with its version.
    pub layout: &'a str,
    /// Whatever else changes the bytes, each name once.
    pub attributes: &'a [(&'a str, &'a str)],
}

/// The identity of a model's cache; its text is [`to_hex`].
///
/// Reads all weight files if they were not read before, which takes as long as the disk needs.
///
/// # Errors
/// [`ErrorKind::Invalid`] when nothing names the weights, for an attribute given twice, and for weight files that change
/// while they are read; what the system says of files that cannot be read, with their path.
pub fn of_model(model: &Model<'_>) -> Result<[u8; 32]> {
    of_model_with(model, &DigestCache::of_user())
}

/// As [`of_model`], with another place for the digests of files.
///
/// # Errors
/// As [`of_model`].
pub fn of_model_with(model: &Model<'_>, cache: &DigestCache) -> Result<[u8; 32]> {
    let snapshot = model.path.map(snapshot).transpose()?.flatten();
    let digest = match (&snapshot, model.path) {
        (None, Some(path)) => weights_digest(path, cache)?,
        _ => None,
    };
    let weights = match (&snapshot, digest, model.name) {
        (Some((repository, commit)), ..) => Weights::Snapshot { repository, commit },
        (None, Some(digest), _) => Weights::Digest(digest),
        (None, None, Some(name)) => Weights::Named(name),
        (None, None, None) => return Err(nothing_names(model.path)),
    };
    let identity = ModelIdentity::new(&ModelDescription {
        weights,
        element: model.element,
        quantisation: model.quantisation,
        layout: model.layout,
        attributes: model.attributes,
    })?;
    Ok(identity.0)
}

/// The 64 digits that configurations take as `model_identity`.
#[must_use]
pub fn to_hex(identity: &[u8; 32]) -> String {
    kvcache_core::BlockKey(*identity).to_hex()
}

fn nothing_names(path: Option<&Path>) -> Error {
    let text = match path {
        Some(path) => format!(
            "nothing names the weights of the model at {}: it is no snapshot folder of a model hub and has no weight files \
             (*.safetensors, *.bin, *.pt, *.gguf); give a name that changes whenever the weights do",
            path.display()
        ),
        None => "nothing names the model's weights: give its folder, or a name that changes whenever they do".to_owned(),
    };
    Error::new(ErrorKind::Invalid, text)
}

/// Repository and commit, if the folder is a snapshot in a model hub's cache.
fn snapshot(path: &Path) -> Result<Option<(String, String)>> {
    let resolved = fs::canonicalize(path)
        .map_err(|error| Error::io(format!("model folder {}", path.display()), error))?;
    let mut parts = resolved.iter().rev().map(|part| part.to_str());
    let (Some(Some(commit)), Some(Some("snapshots")), Some(Some(repository))) =
        (parts.next(), parts.next(), parts.next())
    else {
        return Ok(None);
    };
    let is_commit = commit.len() == COMMIT_DIGITS && commit.bytes().all(|b| b.is_ascii_hexdigit());
    let repository = repository.strip_prefix("models--").filter(|_| is_commit);
    Ok(repository.map(|repository| (repository.replace("--", "/"), commit.to_owned())))
}

/// The digest of a folder's weight files; none if it has no such file.
fn weights_digest(path: &Path, cache: &DigestCache) -> Result<Option<[u8; 32]>> {
    let mut message = blake3::Hasher::new();
    message.update(WEIGHTS);
    let files = weight_files(path)?;
    if files.is_empty() {
        return Ok(None);
    }
    message.update(&(files.len() as u32).to_le_bytes());
    for (name, file) in &files {
        let digest = file_digest(file, cache).map_err(|e| e.at(file.display()))?;
        message.update(&(name.len() as u64).to_le_bytes());
        message.update(name.as_bytes());
        message.update(&digest);
    }
    Ok(Some(*message.finalize().as_bytes()))
}

/// Names and paths, sorted by name.
fn weight_files(path: &Path) -> Result<Vec<(String, PathBuf)>> {
    let failed = |error| Error::io(format!("list weight files in {}", path.display()), error);
    let is_weights = |path: &Path| {
        let suffix = path.extension().and_then(|suffix| suffix.to_str());
        suffix.is_some_and(|suffix| SUFFIXES.contains(&suffix))
    };
    if fs::metadata(path).map_err(failed)?.is_file() {
        // Its own name says nothing about it: moving a single file changes no weights.
        let file = is_weights(path).then(|| (String::new(), path.to_owned()));
        return Ok(file.into_iter().collect());
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        if !is_weights(&file) || !fs::metadata(&file).map_err(failed)?.is_file() {
            continue;
        }
        if files.len() == FILES_MAX {
            return Err(Error::invalid("weight files", FILES_MAX + 1, ..=FILES_MAX));
        }
        let Some(name) = file.file_name().and_then(|name| name.to_str()) else {
            let text = format!("the name of {} is not UTF-8", file.display());
            return Err(Error::new(ErrorKind::Invalid, text));
        };
        files.push((name.to_owned(), file));
    }
    files.sort_unstable();
    Ok(files)
}

fn file_digest(path: &Path, cache: &DigestCache) -> Result<[u8; 32]> {
    let failed = |error| Error::io("read the weights", error);
    let mut file = File::open(path).map_err(failed)?;
    let before = file.metadata().map_err(failed)?;
    if let Some(digest) = cache.get(&before) {
        return Ok(digest);
    }
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => break,
            read => hasher.update(&buffer[..read]),
        };
    }
    let after = file.metadata().map_err(failed)?;
    let stamp = |file: &fs::Metadata| (file.size(), file.mtime(), file.mtime_nsec());
    if stamp(&before) != stamp(&after) {
        let text = "the file changed while it was read";
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    let digest = *hasher.finalize().as_bytes();
    cache.put(&before, &digest);
    Ok(digest)
}

#[cfg(test)]
mod tests;
