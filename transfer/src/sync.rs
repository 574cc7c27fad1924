//! Where the parts that several threads decide together take their locks and atomics from: the standard library here, loom in
//! `transfer/orders`, which runs these very files.

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
pub(crate) use std::thread;
