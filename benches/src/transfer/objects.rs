//! Objects of a store that is no folder of ours: how they are filled, overwritten, checked and removed.

use std::path::Path;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_transfer::{
    Agent, HostMemory, ObjectOptions, Operation, Region, RegionOptions, RequestOptions, Side,
};

use super::contents::{self, POISON};
use super::plan::Plan;
use super::remote::Contents;

/// How the object store is called.
pub(super) const STORE: &str = "bench";
/// How long one object may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where files and objects are made, and which GPU's memory is used.
#[derive(Clone, Copy, Debug)]
pub(super) struct Storage<'a> {
    /// For files, and for objects unless there is a store.
    pub(super) folder: &'a Path,
    pub(super) store: Option<StoreAt<'a>>,
    pub(super) gpu: u32,
}

impl<'a> Storage<'a> {
    /// In a folder of this host only.
    pub(super) const fn folder(folder: &'a Path) -> Self {
        Self {
            folder,
            store: None,
            gpu: 0,
        }
    }
}

/// A store for objects.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoreAt<'a> {
    pub(super) url: &'a str,
    pub(super) allow_http: bool,
}

impl StoreAt<'_> {
    /// An agent that knows the store.
    pub(super) fn agent(&self, name: &str) -> Result<Agent> {
        let options = ObjectOptions {
            allow_http: self.allow_http,
            ..ObjectOptions::default()
        };
        Agent::builder(name)
            .object_store(STORE, self.url, options)
            .build()
            .map_err(|error| error.at("--store"))
    }
}

/// The objects of a case, looked after by an agent of their own; removed at the end.
pub(super) struct Objects {
    agent: Agent,
    memory: Region,
    keys: Vec<String>,
    bytes_each: u64,
    /// One more, of which only the name is known.
    single: String,
}

impl Objects {
    pub(super) fn new(
        plan: &Plan,
        at: StoreAt<'_>,
        keys: Vec<String>,
        single: String,
        blocks_each: u32,
    ) -> Result<Self> {
        let agent = at.agent("keeper")?;
        let memory = HostMemory::anonymous(plan.shape.total_bytes)?;
        let memory = agent.register(memory, RegionOptions::default())?;
        Ok(Self {
            agent,
            memory,
            keys,
            bytes_each: plan.offset(blocks_each),
            single,
        })
    }

    fn move_all(&self, operation: Operation) -> Result<()> {
        for (key, start) in self
            .keys
            .iter()
            .zip((0..).step_by(self.bytes_each as usize))
        {
            let len = self.bytes_each.min(self.memory.bytes() - start);
            let object = self.agent.object(STORE, key)?;
            let pair = (
                self.memory.descriptor(start, len),
                object.descriptor(0, len),
            );
            let options = RequestOptions {
                deadline: Some(PATIENCE),
                ..RequestOptions::default()
            };
            let request = self
                .agent
                .transfer(operation, &[pair], Side::Local, options)?;
            let done = request.wait(PATIENCE);
            done.map_err(|error| Error::new(error.kind(), error.to_string()))?;
        }
        Ok(())
    }

    /// Writes every object anew.
    pub(super) fn write(&self, plan: &Plan, contents: Contents) -> Result<()> {
        match contents {
            Contents::Source => {
                contents::write_source(plan, |offset, block| self.memory.write_at(offset, block))?
            }
            Contents::Poison => self.memory.fill_at(0, self.memory.bytes(), POISON)?,
        }
        self.move_all(Operation::Write)
    }

    /// Reads every object back and compares every block with what writes must have left.
    pub(super) fn verify(&self, plan: &Plan) -> Result<()> {
        self.memory.fill_at(0, self.memory.bytes(), POISON)?;
        self.move_all(Operation::Read)?;
        contents::verify(plan, |offset, block| self.memory.read_at(offset, block))
    }

    fn remove(&self) -> Result<()> {
        for key in self.keys.iter().chain([&self.single]) {
            let mut gone = self.agent.object_delete(STORE, key)?;
            gone.wait(PATIENCE)?;
        }
        Ok(())
    }
}

impl Drop for Objects {
    #[expect(clippy::print_stderr, reason = "somebody may have to pay for them")]
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("kv-bench: objects are left in the store: {error}");
        }
    }
}

/// What begins the names of this run's objects, so that runs at the same time do not meet.
pub(super) fn run_name() -> Result<String> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_err(|error| {
        Error::new(ErrorKind::Internal, "the clock is before 1970").with_source(error)
    })?;
    Ok(format!(
        "kv-bench-{}-{}",
        std::process::id(),
        now.as_nanos()
    ))
}
