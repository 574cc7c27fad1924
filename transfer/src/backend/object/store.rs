//! One object store: what can be asked of it beside reading and writing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use kvcache_core::{Error, ErrorKind, Result};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use tokio::sync::Mutex;

use super::connect;
use super::http::NotConditional;
use super::options::{Hidden, ObjectOptions};
use super::turns::Turns;
use crate::backend::file::Answer;
use crate::request::Priority;

/// The longest key, in bytes: what S3 allows.
pub const OBJECT_KEY_BYTES_MAX: usize = 1024;
/// The most objects of one page of a listing.
pub const LISTING_PAGE_MAX: usize = 10_000;

/// What a store tells of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its key, without the store's own prefix.
    pub key: String,
    /// Its size in bytes.
    pub bytes: u64,
}

impl From<ObjectMeta> for ObjectInfo {
    fn from(meta: ObjectMeta) -> Self {
        Self {
            key: meta.location.into(),
            bytes: meta.size,
        }
    }
}

/// An open object store.
pub(crate) struct Store {
    name: String,
    options: ObjectOptions,
    hidden: Hidden,
    pub(super) inner: Arc<dyn ObjectStore>,
    /// One for each request.
    pub(super) turns: Arc<Turns>,
    runtime: tokio::runtime::Handle,
    /// Whether it may know conditional writes.
    is_conditional: AtomicBool,
}

impl Store {
    pub(super) fn open(
        runtime: tokio::runtime::Handle,
        name: &str,
        url: &str,
        options: ObjectOptions,
    ) -> Result<Arc<Self>> {
        let opened = connect::open(url, &options)
            .map_err(|error| error.at(format!("object store {name:?}")))?;
        let turns = Turns::new(options.concurrency_max);
        Ok(Arc::new(Self {
            name: name.to_owned(),
            options,
            hidden: opened.hidden,
            inner: opened.store,
            turns,
            runtime,
            is_conditional: AtomicBool::new(true),
        }))
    }

    /// The name it was opened with.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// As it was opened.
    pub(super) fn options(&self) -> &ObjectOptions {
        &self.options
    }

    /// Where its requests run.
    pub(super) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// Whether a write on condition that there is no such object may be tried: until the store has refused one.
    pub(super) fn is_conditional(&self) -> bool {
        self.is_conditional.load(Ordering::Relaxed)
    }

    /// Whether this error says that the store has no conditional writes; then it is not asked for one again.
    pub(super) fn note_unconditional(&self, error: &object_store::Error) -> bool {
        let is_so = is_unconditional(error);
        if is_so && self.is_conditional.swap(false, Ordering::Relaxed) {
            tracing::warn!(
                store = self.name,
                "no conditional writes here: an object that two write at once is written twice"
            );
        }
        is_so
    }

    /// Checks a key.
    ///
    /// # Errors
    /// `Invalid` for an empty or overlong key and for one with empty, `.` or `..` parts: two keys never mean one object.
    pub(crate) fn path(&self, key: &str) -> Result<Path> {
        let rule = if key.is_empty() {
            "is empty".to_owned()
        } else if key.len() > OBJECT_KEY_BYTES_MAX {
            format!("is longer than {OBJECT_KEY_BYTES_MAX} bytes")
        } else {
            match Path::parse(key) {
                Ok(path) if path.as_ref() == key => return Ok(path),
                Ok(path) => format!("is not the plain form of {path}"),
                Err(error) => format!("is refused: {error}"),
            }
        };
        let text = format!("object store {:?}: key {key:?} {rule}", self.name);
        Err(Error::new(ErrorKind::Invalid, text))
    }

    /// What the store knows of an object; none if it has no such object.
    ///
    /// # Errors
    /// `Invalid` for a bad key; the rest comes from the answer.
    pub(crate) fn head(self: &Arc<Self>, key: &str) -> Result<Answer<Option<ObjectInfo>>> {
        let path = self.path(key)?;
        let store = Arc::clone(self);
        Ok(self.ask(async move {
            let _turn = store.turns.take(Priority::Normal).await;
            match store.inner.head(&path).await {
                Ok(meta) => Ok(Some(meta.into())),
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(store.error("head", &path, &error)),
            }
        }))
    }

    /// Removes an object; that there is none is fine.
    ///
    /// # Errors
    /// `Invalid` for a bad key; the rest comes from the answer.
    pub(crate) fn delete(self: &Arc<Self>, key: &str) -> Result<Answer<()>> {
        let path = self.path(key)?;
        let store = Arc::clone(self);
        Ok(self.ask(async move {
            let _turn = store.turns.take(Priority::Normal).await;
            match store.inner.delete(&path).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(store.error("delete", &path, &error)),
            }
        }))
    }

    /// The objects below `prefix` (whole path parts; empty for all), in no particular order.
    ///
    /// # Errors
    /// `Invalid` for a bad prefix.
    pub(crate) fn list(self: &Arc<Self>, prefix: &str) -> Result<ObjectListing> {
        let path = match prefix.trim_end_matches('/') {
            "" => None,
            prefix => Some(self.path(prefix)?),
        };
        let objects = self.inner.list(path.as_ref());
        let place = path.unwrap_or_default();
        Ok(ObjectListing {
            store: Arc::clone(self),
            place,
            objects: Arc::new(Mutex::new(Some(objects))),
        })
    }

    fn ask<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Answer<T> {
        let (reply, answer) = Answer::channel();
        self.runtime.spawn(async move { reply.send(work.await) });
        answer
    }

    /// What went wrong, with the store and the key and without secrets. The cause is kept as text: the original could
    /// hold what must not be shown.
    pub(super) fn error(&self, verb: &str, path: &Path, error: &object_store::Error) -> Error {
        let kind = match error {
            object_store::Error::NotFound { .. } => ErrorKind::NotFound,
            object_store::Error::InvalidPath { .. } => ErrorKind::Invalid,
            object_store::Error::AlreadyExists { .. }
            | object_store::Error::Precondition { .. }
            | object_store::Error::PermissionDenied { .. }
            | object_store::Error::Unauthenticated { .. } => ErrorKind::Denied,
            object_store::Error::NotImplemented { .. }
            | object_store::Error::NotSupported { .. } => ErrorKind::Unsupported,
            other if is_unconditional(other) => ErrorKind::Unsupported,
            other => cause_kind(other),
        };
        let text = format!("{verb} {path} in object store {:?}", self.name);
        Error::new(kind, text).with_source(self.hidden.redact(error.to_string()))
    }
}

type Cause = dyn std::error::Error + 'static;

/// An error and what caused it, outermost first.
fn causes(error: &object_store::Error) -> impl Iterator<Item = &Cause> {
    let outermost: &Cause = error;
    std::iter::successors(Some(outermost), |error| error.source())
}

fn is_unconditional(error: &object_store::Error) -> bool {
    let is_disabled = matches!(
        error,
        object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. }
    );
    is_disabled || causes(error).any(|cause| cause.is::<NotConditional>())
}

/// The kind that the deepest cause suggests.
fn cause_kind(error: &object_store::Error) -> ErrorKind {
    for error in causes(error) {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            match io.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                    return ErrorKind::NoSpace;
                }
                std::io::ErrorKind::TimedOut => return ErrorKind::Timeout,
                std::io::ErrorKind::PermissionDenied => return ErrorKind::Denied,
                _ => {}
            }
        }
        if error
            .downcast_ref::<reqwest::Error>()
            .is_some_and(reqwest::Error::is_timeout)
        {
            return ErrorKind::Timeout;
        }
    }
    ErrorKind::Io
}

type Objects = BoxStream<'static, object_store::Result<ObjectMeta>>;

/// A listing under way, taken page by page: nothing is read ahead of what is asked for but the store's own page.
pub struct ObjectListing {
    store: Arc<Store>,
    place: Path,
    objects: Arc<Mutex<Option<Objects>>>,
}

impl ObjectListing {
    /// The next objects, at most `count_max` (1 to [`LISTING_PAGE_MAX`]); none left when the answer is empty. After an
    /// error the listing is over.
    ///
    /// # Errors
    /// `Invalid` for a count out of range; the rest comes from the answer.
    pub fn next_page(&mut self, count_max: usize) -> Result<Answer<Vec<ObjectInfo>>> {
        if !(1..=LISTING_PAGE_MAX).contains(&count_max) {
            return Err(Error::invalid(
                "objects a page",
                count_max,
                1..=LISTING_PAGE_MAX,
            ));
        }
        let (store, place) = (Arc::clone(&self.store), self.place.clone());
        let objects = Arc::clone(&self.objects);
        Ok(self.store.ask(async move {
            let _turn = store.turns.take(Priority::Normal).await;
            let mut objects = objects.lock().await;
            let mut page = Vec::new();
            while page.len() < count_max {
                let Some(stream) = objects.as_mut() else {
                    break;
                };
                match stream.next().await {
                    Some(Ok(meta)) => page.push(meta.into()),
                    Some(Err(error)) => {
                        *objects = None;
                        return Err(store.error("list", &place, &error));
                    }
                    None => *objects = None,
                }
            }
            Ok(page)
        }))
    }
}

impl std::fmt::Debug for ObjectListing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ObjectListing({:?}, {})", self.store.name, self.place)
    }
}
