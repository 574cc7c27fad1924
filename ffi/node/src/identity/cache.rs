//! Digests of files that were read before.

use std::fs::{self, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use crate::config::parse_identity;
use crate::identity::to_hex;

/// A file changed so recently may change again without its modification time telling: file systems have coarse clocks.
const SETTLED_AFTER: Duration = Duration::from_secs(2);

/// Remembers digests of files by device, inode, size and modification time. It only saves work: whatever goes wrong with it
/// means that a file is read again.
#[derive(Clone, Debug)]
pub struct DigestCache {
    folder: Option<PathBuf>,
}

impl DigestCache {
    /// In this folder, which is made when there is something to remember.
    #[must_use]
    pub fn within(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: Some(folder.into()),
        }
    }

    /// Where this user's caches are: `$XDG_CACHE_HOME`, or `$HOME/.cache`; nowhere without either.
    #[must_use]
    pub fn of_user() -> Self {
        let absolute = |name| {
            let path = std::env::var_os(name).map(PathBuf::from);
            path.filter(|path| path.is_absolute())
        };
        let caches =
            absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
        Self {
            folder: caches.map(|caches| caches.join("kvfabric").join("weights")),
        }
    }

    pub(super) fn get(&self, file: &Metadata) -> Option<[u8; 32]> {
        let text = fs::read_to_string(self.place(file)?).ok()?;
        parse_identity(text.trim_end()).ok()
    }

    pub(super) fn put(&self, file: &Metadata, digest: &[u8; 32]) {
        let modified = file.modified().ok();
        let age = modified.and_then(|modified| SystemTime::now().duration_since(modified).ok());
        let Some(place) = self.place(file).filter(|_| age >= Some(SETTLED_AFTER)) else {
            return;
        };
        if let Err(error) = write(&place, &to_hex(digest)) {
            tracing::warn!(%error, place = %place.display(), "digest of weights not remembered");
        }
    }

    fn place(&self, file: &Metadata) -> Option<PathBuf> {
        let name = format!(
            "{:x}-{:x}-{:x}-{:x}.{:09}",
            file.dev(),
            file.ino(),
            file.size(),
            file.mtime(),
            file.mtime_nsec()
        );
        self.folder.as_ref().map(|folder| folder.join(name))
    }
}

/// Whole or not at all: two processes may write the same.
fn write(place: &PathBuf, text: &str) -> io::Result<()> {
    let Some(folder) = place.parent() else {
        return Ok(());
    };
    fs::create_dir_all(folder)?;
    let draft = place.with_extension(format!("{}.draft", std::process::id()));
    let mut file = fs::File::create(&draft)?;
    file.write_all(text.as_bytes())?;
    drop(file);
    fs::rename(&draft, place)
}
