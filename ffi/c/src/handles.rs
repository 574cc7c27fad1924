//! Handles: numbers in the clothes of pointers, each given out once.
//!
//! What a handle stands for is looked up at each call and never reached through the caller's pointer. So a handle that was
//! freed, one of another type, and any other value are refused instead of being followed; and freeing a handle that another
//! thread uses only takes effect after that. A lookup costs some tens of nanoseconds.

use std::any::Any;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use kvfabric::transfer::Process;
use kvfabric::{Error, ErrorKind, Result};

use crate::boundary::{Handle, null};

/// Calls on different handles mostly go to different maps.
const SHARDS: usize = 64;

/// Numbers grow in such steps, so that they are aligned as pointers are.
const STEP: usize = 16;

type Shard = RwLock<HashMap<usize, Entry, BuildHasherDefault<Spread>>>;

/// Spreads handles of one shard, which are `STEP * SHARDS` apart, over a table. They are our own numbers, so nobody can make
/// many collide; a stranger's number is only looked for.
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_usize(usize::from(*byte));
        }
    }

    fn write_usize(&mut self, number: usize) {
        const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
        self.0 = (self.0 ^ (number / (STEP * SHARDS)) as u64).wrapping_mul(ODD);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

struct Entry {
    handle: Arc<dyn Any + Send + Sync>,
    /// What it is, for whoever takes it for something else.
    name: &'static str,
}

/// The handles of one process. A forked child gets its own: a lock of the parent's may have been held when it was forked.
struct Registry {
    process: Process,
    /// Smaller numbers were given out by the parent.
    first: usize,
    shards: [Shard; SHARDS],
}

/// Null before the first handle.
static REGISTRY: AtomicPtr<Registry> = AtomicPtr::new(std::ptr::null_mut());

/// The next number. At a million handles a second a 64-bit number lasts for tens of thousands of years.
static NEXT: AtomicUsize = AtomicUsize::new(STEP);

impl Registry {
    /// The registry of this process, or the one of its parent.
    fn latest() -> Option<&'static Self> {
        // SAFETY: null, or from `Box::into_raw` in `own`, and never given back.
        unsafe { REGISTRY.load(Ordering::Acquire).as_ref() }
    }

    /// The registry of this process, made if it has none.
    fn own() -> &'static Self {
        loop {
            let latest = Self::latest();
            if let Some(registry) = latest.filter(|latest| latest.process.is_current()) {
                return registry;
            }
            let latest = latest.map_or(std::ptr::null(), std::ptr::from_ref);
            let new = Box::into_raw(Box::new(Self {
                process: Process::current(),
                first: NEXT.load(Ordering::Relaxed),
                shards: std::array::from_fn(|_| Shard::default()),
            }));
            let order = Ordering::AcqRel;
            let raced = REGISTRY.compare_exchange(latest.cast_mut(), new, order, Ordering::Acquire);
            if raced.is_err() {
                // SAFETY: from `Box::into_raw` above, and nobody else has seen it.
                drop(unsafe { Box::from_raw(new) });
            }
        }
    }

    fn shard(&self, number: usize) -> &Shard {
        &self.shards[number / STEP % SHARDS]
    }

    /// Where to look for a handle.
    fn of(number: usize) -> Result<&'static Shard> {
        let registry = Self::latest();
        let own = registry.filter(|registry| registry.process.is_current());
        match (registry, own) {
            (None, _) => Err(Error::new(
                ErrorKind::Invalid,
                "no handle was ever given out",
            )),
            (Some(_), Some(own)) if number >= own.first => Ok(own.shard(number)),
            _ => {
                let text = "the handle was made before this process was forked";
                Err(Error::new(ErrorKind::Forked, text))
            }
        }
    }
}

/// Keeps a handle until it is removed, and names it.
pub(crate) fn add<H: Handle>(handle: H) -> *mut H {
    // Before the number is drawn, so that it is not below the registry's first.
    let registry = Registry::own();
    let number = NEXT.fetch_add(STEP, Ordering::Relaxed);
    let entry = Entry {
        handle: Arc::new(handle),
        name: H::NAME,
    };
    let mut shard = registry
        .shard(number)
        .write()
        .unwrap_or_else(PoisonError::into_inner);
    shard.insert(number, entry);
    std::ptr::without_provenance_mut(number)
}

/// What a handle stands for.
pub(crate) fn find<H: Handle>(handle: *const H, name: &str) -> Result<Arc<H>> {
    if handle.is_null() {
        return Err(null(name));
    }
    let number = handle.addr();
    let shard = Registry::of(number)?;
    let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
    let entry = shard.get(&number).ok_or_else(|| gone::<H>(name))?;
    let found = entry.handle.clone();
    found.downcast().map_err(|_| {
        let text = format!("{name} is a kvf_{}, not a kvf_{}", entry.name, H::NAME);
        Error::new(ErrorKind::Invalid, text)
    })
}

/// Forgets a handle that was found, which then stands for nothing.
pub(crate) fn remove<H: Handle>(handle: *const H, name: &str) -> Result<()> {
    let number = handle.addr();
    let shard = Registry::of(number)?;
    let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
    let removed = shard.remove(&number);
    // What it stands for is dropped without the lock.
    drop(shard);
    removed.map(drop).ok_or_else(|| gone::<H>(name))
}

fn gone<H: Handle>(name: &str) -> Error {
    let text = format!("{name} is no kvf_{}, or was freed", H::NAME);
    Error::new(ErrorKind::Invalid, text)
}
