//! A node, as all objects made from it share it.

use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvfabric::life::Life;
use kvfabric::{AttachedNode, Error, ErrorKind, Result};
use pyo3::prelude::*;

use crate::fabric::Fabric;

/// A node, shared by all objects made from it.
pub(crate) struct Core {
    pub(crate) fabric: Arc<Fabric>,
    pub(crate) node: ManuallyDrop<AttachedNode>,
    /// What keeps the memory of the HBM tier: for ever, unless the tier is closed.
    hbm: Mutex<Option<ManuallyDrop<Py<PyAny>>>>,
}

impl Core {
    pub(crate) fn of(node: AttachedNode) -> Arc<Self> {
        let fabric = Fabric::new(node.life().clone(), node.node().agent().clone());
        let node = ManuallyDrop::new(node);
        Arc::new(Self {
            fabric,
            node,
            hbm: Mutex::default(),
        })
    }

    /// What keeps the memory of the HBM tier.
    pub(crate) fn kept(&self) -> MutexGuard<'_, Option<ManuallyDrop<Py<PyAny>>>> {
        self.hbm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn life(&self) -> &Arc<Life> {
        self.node.life()
    }

    /// # Errors
    /// [`ErrorKind::Invalid`] for an object of another node.
    pub(crate) fn check(self: &Arc<Self>, what: &str, other: &Arc<Self>) -> Result<()> {
        if Arc::ptr_eq(self, other) {
            return Ok(());
        }
        let pod = other.node.node().pod();
        let text = format!("the {what} are of another node, {:?}", pod.as_str());
        Err(Error::new(ErrorKind::Invalid, text))
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // In a forked child the node's threads do not exist: it is left as it is.
        if !self.life().is_forked() {
            // SAFETY: not used after this, as the core is being dropped.
            unsafe { ManuallyDrop::drop(&mut self.node) };
        }
    }
}
