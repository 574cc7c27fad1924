//! A driver without a device, for tests: it does what the documentation of the calls says, and no more.
//!
//! Device memory is memory of the test under addresses that no processor can reach, unless it is to be reached by network cards. Work is queued, and done only when it is
//! told to go on, or asked whether it is over: then one entry at a time, those of a batch last to first. What would be wrong to
//! ask of the real driver is noted down, and fails the test that looks ([`Fake::check`]).

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use kvcache_core::Result;

use super::calls::{Answer, Calls, Code, Handle, PointerFacts};
use super::driver::Cuda;
use super::memory::DeviceMemory;
use super::sharing::IPC_NAME_BYTES;
use crate::region::Region;

mod calls;
mod direct;
mod engine;
mod kernels;
mod memory;
mod sharing;
mod work;

use direct::Direct;
use memory::Backing;
use work::Entry;

/// Where device memory begins: no address of a process, so whoever follows it falls.
const FIRST: u64 = 1 << 56;

/// What a call answers that needs a context and finds none.
const INVALID_CONTEXT: Code = Code(201);

/// Errors that tests have calls fail with.
pub(crate) const NOT_SUPPORTED: Code = Code::NOT_SUPPORTED;
pub(crate) const OUT_OF_MEMORY: Code = Code::OUT_OF_MEMORY;
pub(crate) const CAPTURE_IMPLICIT: Code = Code::CAPTURE_IMPLICIT;
pub(crate) const UNSUPPORTED_PTX: Code = Code(222);
pub(crate) const ILLEGAL_ADDRESS: Code = Code(700);

/// An error by the driver's number.
pub(crate) fn code(number: u32) -> Code {
    Code(number)
}

/// What lies between two allocations.
const GAP: u64 = 1 << 20;

/// Memory of a device.
struct Allocation {
    backing: Backing,
    facts: PointerFacts,
    of: Of,
}

/// Whose memory it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    /// Allocated in this process, and free to be shared.
    Own,
    /// Of one of the driver's pools: no other process can have it.
    Pool,
    /// Another process's.
    Other,
    /// Another process's, mapped and not to be touched yet.
    Barred,
}

struct Event {
    /// How often it was recorded, and how many of these records are not done.
    recorded: u64,
    pending: u64,
    /// Of which device.
    device: i32,
}

/// What is special of a stream that an engine has made.
#[derive(Clone, Copy)]
struct EngineStream {
    context: u64,
    is_captured: bool,
}

#[derive(Default)]
struct State {
    version: i32,
    devices: i32,
    is_started: bool,
    has_batch: bool,
    /// Work is done when somebody asks whether it is over.
    is_running: bool,
    /// How often each device's primary context is retained.
    retained: HashMap<i32, i64>,
    current: HashMap<ThreadId, Vec<u64>>,
    modes: HashMap<ThreadId, u32>,
    memory: BTreeMap<u64, Allocation>,
    /// What network cards may do with it.
    direct: Direct,
    next_address: u64,
    next_handle: u64,
    /// Registered host memory, by address: bytes, and whether a test did it.
    pinned: BTreeMap<u64, (u64, bool)>,
    streams: HashMap<u64, VecDeque<Entry>>,
    /// Of each stream that was made, its device.
    stream_devices: HashMap<u64, i32>,
    engine_streams: HashMap<u64, EngineStream>,
    /// Events that were last recorded into a graph.
    captured_events: HashSet<u64>,
    /// Contexts of engines, and their devices.
    contexts: HashMap<u64, i32>,
    /// What streams are held at, and not any more.
    released: HashSet<u64>,
    /// Destroyed with work left.
    orphans: Vec<VecDeque<Entry>>,
    events: HashMap<u64, Event>,
    /// Destroyed while streams had not come to them.
    past_events: HashMap<u64, Event>,
    /// Loaded modules, and the kernels that were looked up in them: module and name.
    modules: HashSet<u64>,
    kernels: HashMap<u64, (u64, String)>,
    /// What is open of other processes, by name: where, and how often.
    opened: HashMap<[u8; IPC_NAME_BYTES], (u64, u64)>,
    /// Handles of memory that can be mapped: the file, and its bytes.
    pieces: HashMap<u64, (OwnedFd, u64)>,
    reserved: BTreeMap<u64, u64>,
    /// Whose memory whose context reaches.
    linked: HashSet<(i32, i32)>,
    /// Devices reach each other's memory.
    is_linked: bool,
    /// This process opens its own allocations as if they were another's.
    is_forced: bool,
    /// Kernels reach registered host memory.
    is_mapped: bool,
    /// Kernels write something else than they should.
    is_spoilt: bool,
    /// Of which range of the next sums a byte changes before.
    spoils_sum_of: Option<usize>,
    /// Errors to come, by call: after how many calls of it, and which.
    errors: HashMap<&'static str, VecDeque<(u64, Code)>>,
    counts: HashMap<&'static str, u64>,
    wrong: Vec<String>,
}

/// The stand-in. Clones are the same one.
#[derive(Clone)]
pub(crate) struct Fake(Arc<Mutex<State>>);

impl Fake {
    /// So many devices, and the driver of CUDA 12.8.
    pub(crate) fn new(devices: i32) -> Self {
        Self(Arc::new(Mutex::new(State {
            version: 12_080,
            devices,
            has_batch: true,
            is_running: true,
            is_mapped: true,
            is_linked: true,
            next_address: FIRST,
            // Lower ones are contexts and default streams.
            next_handle: 1 << 16,
            ..State::default()
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn calls(&self) -> Arc<dyn Calls> {
        Arc::new(self.clone())
    }

    pub(crate) fn start(&self) -> Cuda {
        Cuda::start(self.calls(), None).unwrap()
    }

    pub(crate) fn set_version(&self, version: i32) {
        let mut state = self.lock();
        (state.version, state.has_batch) = (version, version >= 12_080);
    }

    /// Whether kernels reach host memory that is registered, which they do at first.
    pub(crate) fn set_mapped(&self, is_mapped: bool) {
        self.lock().is_mapped = is_mapped;
    }

    /// Whether devices reach each other's memory, which they do at first.
    pub(crate) fn set_linked(&self, is_linked: bool) {
        self.lock().is_linked = is_linked;
    }

    /// This process opens its own allocations as if they were another's.
    pub(crate) fn force_opening(&self) {
        self.lock().is_forced = true;
    }

    /// How much is open of other processes' memory: allocations, and addresses at which pieces are mapped.
    pub(crate) fn opened(&self) -> (usize, usize) {
        let state = self.lock();
        (state.opened.len(), state.reserved.len())
    }

    /// Memory of one of the driver's pools: no other process can have it.
    pub(crate) fn engine_pool(&self, ordinal: i32, bytes: u64) -> u64 {
        let address = self.engine_mappings(ordinal, &[bytes]);
        let mut state = self.lock();
        state.memory.get_mut(&address).unwrap().of = Of::Pool;
        address
    }

    /// Kernels write something else than they should from now on.
    pub(crate) fn spoil_kernels(&self) {
        self.lock().is_spoilt = true;
    }

    /// A byte of this range of the next sums changes before they are made.
    pub(crate) fn spoil_before_sum(&self, range: usize) {
        self.lock().spoils_sum_of = Some(range);
    }

    /// Whether work is done as soon as somebody asks for it, which it is at first, or only by [`Fake::advance`].
    pub(crate) fn set_running(&self, is_running: bool) {
        self.lock().is_running = is_running;
    }

    /// The call fails in this way, once, after so many that do not.
    pub(crate) fn fail(&self, call: &'static str, after: u64, code: Code) {
        let mut state = self.lock();
        let made = state.counts.get(call).copied().unwrap_or(0);
        let errors = state.errors.entry(call).or_default();
        errors.push_back((made + after, code));
    }

    /// How often a call was made.
    pub(crate) fn count(&self, call: &'static str) -> u64 {
        self.lock().counts.get(call).copied().unwrap_or(0)
    }

    /// Memory that an engine has allocated itself.
    pub(crate) fn engine_memory(&self, ordinal: i32, bytes: u64) -> u64 {
        self.lock().allocate(ordinal, bytes)
    }

    /// The same in pieces that were mapped side by side, as expandable pools are.
    pub(crate) fn engine_mappings(&self, ordinal: i32, pieces: &[u64]) -> u64 {
        let mut state = self.lock();
        let first = state.next_address;
        for &bytes in pieces {
            let address = state.allocate(ordinal, bytes);
            let facts = &mut state.memory.get_mut(&address).unwrap().facts;
            facts.is_legacy = false;
            // The next one touches it.
            state.next_address = address + bytes;
        }
        state.next_address += GAP;
        first
    }

    /// Changes what the driver says of an engine's memory.
    pub(crate) fn describe(&self, address: u64, change: impl FnOnce(&mut PointerFacts)) {
        change(&mut self.lock().memory.get_mut(&address).unwrap().facts);
    }

    pub(crate) fn engine_frees(&self, address: u64) {
        self.lock().free(address).unwrap();
    }

    /// An engine pins memory by itself.
    pub(crate) fn engine_pins(&self, address: u64, bytes: u64) {
        self.lock().pinned.insert(address, (bytes, true));
    }

    /// Lends memory of an engine, which the test keeps.
    pub(crate) fn lend(
        &self,
        cuda: &Cuda,
        ordinal: u32,
        address: u64,
        bytes: u64,
    ) -> Result<DeviceMemory> {
        // SAFETY: only this driver can reach the address, and it looks whether memory is there.
        unsafe { DeviceMemory::lent(cuda, ordinal, address, bytes) }
    }

    pub(crate) fn read(&self, address: u64, bytes: u64) -> Vec<u8> {
        let state = self.lock();
        let (start, allocation) = state.memory.range(..=address).next_back().unwrap();
        let from = (address - start) as usize;
        allocation.backing.get(from, bytes as usize)
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.lock().write(address, bytes);
    }

    /// Entries that are queued and not done, on all streams.
    pub(crate) fn queued(&self) -> usize {
        let state = self.lock();
        state.streams.values().map(VecDeque::len).sum()
    }

    /// Does so many entries of every stream.
    pub(crate) fn advance(&self, entries: usize) {
        let mut state = self.lock();
        for _ in 0..entries {
            state.turn_all();
        }
    }

    /// How many pieces of host memory we have pinned.
    pub(crate) fn pinned(&self) -> usize {
        self.lock()
            .pinned
            .values()
            .filter(|(_, others)| !others)
            .count()
    }

    /// An engine pins the first page of a region's memory.
    pub(crate) fn engine_pins_part(&self, region: &Region) {
        let start = region.core().mapping().unwrap().address();
        self.engine_pins(start, 4096);
    }

    pub(crate) fn engine_unpins_part(&self, region: &Region) {
        let start = region.core().mapping().unwrap().address();
        let mut state = self.lock();
        if state.pinned.get(&start) == Some(&(4096, true)) {
            state.pinned.remove(&start);
        }
    }

    /// Whether nothing of ours is left.
    pub(crate) fn is_empty(&self) -> bool {
        let state = self.lock();
        state.retained.values().all(|count| *count == 0) && state.own_streams() == 0
    }

    /// What was asked that the real driver would punish.
    pub(crate) fn check(&self) {
        let state = self.lock();
        assert!(state.wrong.is_empty(), "{:#?}", state.wrong);
    }

    /// As [`Fake::check`], when everybody has let go: nothing is left of contexts, streams, events, memory and pins.
    pub(crate) fn check_empty(&self) {
        self.check();
        let state = self.lock();
        assert!(
            state.retained.values().all(|count| *count == 0),
            "contexts: {:?}",
            state.retained
        );
        assert_eq!(state.own_streams(), 0, "streams");
        assert!(state.events.is_empty(), "{} events", state.events.len());
        assert!(state.modules.is_empty(), "{} modules", state.modules.len());
        assert!(
            state.memory.is_empty(),
            "{} allocations",
            state.memory.len()
        );
        assert!(state.pinned.is_empty(), "pins: {:?}", state.pinned);
        assert!(state.opened.is_empty(), "{} openings", state.opened.len());
        assert!(state.pieces.is_empty(), "{} pieces", state.pieces.len());
        assert!(state.reserved.is_empty(), "reserved: {:?}", state.reserved);
        assert!(
            state.current.values().all(Vec::is_empty),
            "a context is current"
        );
        assert!(
            state.modes.values().all(|mode| *mode == 0),
            "a capture mode is left"
        );
    }
}

impl State {
    fn wrong(&mut self, text: impl Into<String>) {
        self.wrong.push(text.into());
    }

    /// Counts a call, and fails it if a test wants that.
    fn begin(&mut self, call: &'static str) -> Answer<()> {
        let made = self.counts.entry(call).or_default();
        *made += 1;
        let made = *made - 1;
        if let Some(errors) = self.errors.get_mut(call)
            && let Some(&(at, code)) = errors.front()
            && made >= at
        {
            errors.pop_front();
            return Err(code);
        }
        Ok(())
    }

    /// As [`State::begin`] for what needs a context: the device of the thread's current one.
    fn begin_in(&mut self, call: &'static str) -> Answer<i32> {
        self.begin(call)?;
        let current = self
            .current
            .get(&thread::current().id())
            .and_then(|all| all.last());
        let Some(&context) = current else {
            self.wrong(format!("{call} without a current context"));
            return Err(INVALID_CONTEXT);
        };
        if self.modes.get(&thread::current().id()) != Some(&2) {
            self.wrong(format!("{call} may spoil a graph's capture"));
        }
        let engines = self.contexts.get(&context).copied();
        Ok(engines.unwrap_or(context as i32 - 1))
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        let (start, allocation) = self.memory.range(..=address).next_back().unwrap();
        let from = (address - start) as usize;
        allocation.backing.put(from, bytes);
    }

    /// Streams that no engine has made.
    fn own_streams(&self) -> usize {
        let own = |stream: &&u64| !self.engine_streams.contains_key(stream);
        self.streams.keys().filter(own).count()
    }

    fn handle(&mut self) -> u64 {
        self.next_handle += 1;
        self.next_handle
    }

    fn allocate(&mut self, ordinal: i32, bytes: u64) -> u64 {
        self.place(ordinal, Backing::new(bytes), Of::Own)
    }

    /// Frees an allocation; none if there is none.
    fn free(&mut self, address: u64) -> Option<()> {
        let memory = self.memory.remove(&address)?;
        // What is mapped in pieces stays for those who have mapped it, too.
        if memory.backing.free() && memory.facts.is_legacy {
            self.wrong("memory is freed that another process has open");
        }
        Some(())
    }

    /// The device that an address belongs to.
    fn device_of(&self, address: u64) -> Option<i32> {
        let (start, memory) = self.memory.range(..=address).next_back()?;
        (address < start + memory.backing.len()).then_some(memory.facts.ordinal)
    }

    fn place(&mut self, ordinal: i32, backing: Backing, of: Of) -> u64 {
        let bytes = backing.len();
        // Memory that network cards reach lies in the process.
        let start = match of {
            Of::Own if self.direct.is_open() => backing.address(),
            _ => self.next_address,
        };
        self.next_address += bytes.next_multiple_of(GAP) + GAP;
        let facts = PointerFacts {
            memory_type: PointerFacts::DEVICE,
            is_managed: false,
            ordinal,
            start,
            bytes,
            buffer: self.handle(),
            is_legacy: true,
        };
        self.memory.insert(start, Allocation { backing, facts, of });
        start
    }

    /// What was registered and holds all of a range.
    fn is_pinned(&self, address: u64, bytes: u64) -> bool {
        let found = self.pinned.range(..=address).next_back();
        found.is_some_and(|(start, (len, _))| address + bytes <= start + len)
    }
}

fn name(handle: Handle) -> u64 {
    handle.0.addr() as u64
}

fn named(number: u64) -> Handle {
    Handle(std::ptr::without_provenance_mut(number as usize))
}
