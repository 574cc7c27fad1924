//! Fixtures for the backends of this crate.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use kvcache_core::Result;

use super::{Fixture, Place, Receiver};
use crate::agent::Agent;
use crate::backend::file::FileOptions;
use crate::region::RegionOptions;
use crate::sys::memory::HostMemory;

/// Two agents and the memory of one of them.
pub struct PeerFixture {
    backend: &'static str,
    agent: Agent,
    peer: Agent,
    private: bool,
}

impl PeerFixture {
    /// `agent` reaches `peer` over `backend`, and nothing else, because both were built so.
    #[must_use]
    pub fn new(backend: &'static str, agent: Agent, peer: Agent) -> Self {
        Self {
            backend,
            agent,
            peer,
            private: false,
        }
    }

    /// With memory that other processes cannot map.
    #[must_use]
    pub fn private(self) -> Self {
        Self {
            private: true,
            ..self
        }
    }
}

impl Fixture for PeerFixture {
    fn backend(&self) -> &'static str {
        self.backend
    }

    fn agent(&self) -> &Agent {
        &self.agent
    }

    fn peer(&self) -> Option<&dyn Receiver> {
        Some(&self.peer)
    }

    fn place(&self, bytes: u64) -> Result<Place> {
        let options = RegionOptions {
            remote_read: true,
            remote_write: true,
        };
        let memory = if self.private {
            HostMemory::anonymous(bytes)?
        } else {
            HostMemory::shared(bytes)?
        };
        let owner = self.peer.register(memory, options)?;
        let peer = self.agent.load_peer(&self.peer.metadata())?;
        Ok(Place {
            owner: Box::new(owner),
            peer: Some(peer),
        })
    }
}

/// Files in a directory.
pub struct FileFixture {
    agent: Agent,
    directory: PathBuf,
    options: FileOptions,
    made: AtomicU64,
}

impl FileFixture {
    /// Makes files in `directory`, which exists, opened with `options`.
    #[must_use]
    pub fn new(agent: Agent, directory: PathBuf, options: FileOptions) -> Self {
        Self {
            agent,
            directory,
            options,
            made: AtomicU64::new(0),
        }
    }
}

impl Fixture for FileFixture {
    fn backend(&self) -> &'static str {
        "file"
    }

    fn agent(&self) -> &Agent {
        &self.agent
    }

    fn peer(&self) -> Option<&dyn Receiver> {
        None
    }

    fn place(&self, bytes: u64) -> Result<Place> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let path = self.directory.join(format!("place-{number}"));
        let options = FileOptions {
            create: true,
            len_bytes: Some(bytes),
            ..self.options.clone()
        };
        Ok(Place {
            owner: Box::new(self.agent.open_file(path, &options)?),
            peer: None,
        })
    }
}

/// Objects in a store of the agent.
pub struct ObjectFixture {
    agent: Agent,
    store: String,
    made: AtomicU64,
}

impl ObjectFixture {
    /// Makes objects in `store`, which the agent knows.
    #[must_use]
    pub fn new(agent: Agent, store: &str) -> Self {
        Self {
            agent,
            store: store.to_owned(),
            made: AtomicU64::new(0),
        }
    }
}

impl Fixture for ObjectFixture {
    fn backend(&self) -> &'static str {
        "object"
    }

    fn agent(&self) -> &Agent {
        &self.agent
    }

    fn peer(&self) -> Option<&dyn Receiver> {
        None
    }

    fn place(&self, _bytes: u64) -> Result<Place> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let owner = self
            .agent
            .object(&self.store, &format!("conformance/place-{number}"))?;
        Ok(Place {
            owner: Box::new(owner),
            peer: None,
        })
    }

    fn writes_whole(&self) -> bool {
        true
    }
}
