//! A cuFile without a drive that reaches GPUs, for tests: it does what the documentation of the calls says, over real files and the memory
//! of the stand-in for the CUDA driver.
//!
//! What would be wrong to ask of the real one is noted down, and fails the test that looks ([`FakeCufile::check`]).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::binding as ffi;
use super::calls::{Code, CufileCalls, Failure, Handle, Properties, moved};
use super::report::Cufile;
use crate::sys::cuda::fake::Fake;

/// Far beyond what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a call answers that a test has spoilt.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ending {
    /// −1, and this number in `errno`.
    Errno(i32),
    /// This number, as it is.
    Raw(isize),
    /// At most so many bytes.
    Short(u64),
}

/// What a call of the system leaves behind.
pub(super) fn set_errno(number: i32) {
    // SAFETY: no preconditions.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: this thread's own, for as long as it lives.
    unsafe { *place = number };
}

struct Known {
    file: File,
    fd: RawFd,
    users: u64,
}

struct State {
    version: i32,
    properties: Properties,
    is_forced: Option<bool>,
    open: Result<(), Code>,
    opened: u64,
    files: HashMap<usize, Known>,
    next_file: usize,
    /// Registered memory: bytes, and calls with it.
    memory: BTreeMap<u64, (u64, u64)>,
    refused_file: Option<i32>,
    refused_memory: Option<i32>,
    /// The most bytes that a call moves.
    most: u64,
    endings: VecDeque<(u64, Ending)>,
    calls: u64,
    under_way: usize,
    under_way_max: usize,
    is_held: bool,
    /// What one of the calls that are held answers at once.
    answer: Option<isize>,
    wrong: Vec<String>,
}

/// The stand-in. Clones are the same one.
#[derive(Clone)]
pub(crate) struct FakeCufile {
    state: Arc<Mutex<State>>,
    changed: Arc<Condvar>,
    cuda: Fake,
}

impl FakeCufile {
    /// cuFile 1.14 with nvidia-fs and drives that it reaches, whose compatibility mode is off.
    pub(crate) fn new(cuda: &Fake) -> Self {
        let properties = Properties {
            module: (2, 22),
            call_bytes_max: 16 << 20,
            reached: 1 << ffi::CU_FILE_NVME_SUPPORTED,
            may_bounce: false,
        };
        Self {
            state: Arc::new(Mutex::new(State {
                version: 1140,
                properties,
                is_forced: Some(false),
                open: Ok(()),
                opened: 0,
                files: HashMap::new(),
                next_file: 16,
                memory: BTreeMap::new(),
                refused_file: None,
                refused_memory: None,
                most: u64::MAX,
                endings: VecDeque::new(),
                calls: 0,
                under_way: 0,
                under_way_max: 0,
                is_held: false,
                answer: None,
                wrong: Vec::new(),
            })),
            changed: Arc::default(),
            cuda: cuda.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn open(&self) -> kvcache_core::Result<Arc<Cufile>> {
        Cufile::open(Arc::new(self.clone()))
    }

    /// What it says of itself.
    pub(crate) fn describe(&self, module: (u32, u32), reached: u32, may_bounce: bool) {
        let properties = &mut self.lock().properties;
        (properties.module, properties.reached) = (module, reached);
        properties.may_bounce = may_bounce;
    }

    /// What it says of `force_compat_mode`, if it does.
    pub(crate) fn set_forced(&self, is_forced: Option<bool>) {
        self.lock().is_forced = is_forced;
    }

    pub(crate) fn fail_opening(&self, error: i32) {
        self.lock().open = Err(Code::new(error));
    }

    /// How often it was opened.
    pub(crate) fn opened(&self) -> u64 {
        self.lock().opened
    }

    /// It takes no files, or no memory, from now on.
    pub(crate) fn refuse(&self, files: Option<i32>, memory: Option<i32>) {
        let mut state = self.lock();
        (state.refused_file, state.refused_memory) = (files, memory);
    }

    /// Calls move at most so many bytes from now on.
    pub(crate) fn set_most(&self, bytes: u64) {
        self.lock().most = bytes;
    }

    /// After so many more calls one ends so.
    pub(crate) fn spoil(&self, after: u64, ending: Ending) {
        let mut state = self.lock();
        let at = state.calls + after;
        state.endings.push_back((at, ending));
    }

    /// How many calls were made.
    pub(crate) fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// How many calls there were at once, at most.
    pub(crate) fn under_way_max(&self) -> usize {
        self.lock().under_way_max
    }

    /// Files that calls are under way with.
    pub(crate) fn files_in_use(&self) -> usize {
        let state = self.lock();
        state.files.values().filter(|known| known.users > 0).count()
    }

    /// Files and ranges of memory that are registered.
    pub(crate) fn registered(&self) -> (usize, usize) {
        let state = self.lock();
        (state.files.len(), state.memory.len())
    }

    /// Calls that begin from now on move nothing before [`FakeCufile::release`].
    pub(crate) fn hold(&self) {
        self.lock().is_held = true;
    }

    pub(crate) fn release(&self) {
        self.lock().is_held = false;
        self.changed.notify_all();
    }

    /// One of the calls that are held answers this at once.
    pub(crate) fn fail_one(&self, answer: isize) {
        self.lock().answer = Some(answer);
        self.changed.notify_all();
    }

    /// Waits until so many calls are under way.
    pub(crate) fn await_calls(&self, count: usize) {
        let end = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while state.under_way < count {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} calls are under way", state.under_way);
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// What was asked that the real one would punish.
    pub(crate) fn check(&self) {
        let state = self.lock();
        assert!(state.wrong.is_empty(), "{:#?}", state.wrong);
    }

    /// Makes a call: the file, if it may be used, and how much of it is moved.
    fn begin(&self, file: Handle, (base, offset): (u64, u64), bytes: usize, at: u64) -> Begun {
        let mut state = self.lock();
        state.calls += 1;
        let number = state.calls - 1;
        for value in [base, offset, bytes as u64, at] {
            if value % 4096 != 0 {
                state
                    .wrong
                    .push(format!("{bytes} bytes at {at} from {base:#x}+{offset:#x}"));
            }
        }
        state.under_way += 1;
        state.under_way_max = state.under_way_max.max(state.under_way);
        if let Some((_, users)) = state.memory.get_mut(&base) {
            *users += 1;
        }
        let known = state.files.get_mut(&file.0.addr());
        let known = known.map(|known| {
            known.users += 1;
            known.file.try_clone().unwrap()
        });
        self.changed.notify_all();
        let end = Instant::now() + PATIENCE;
        while state.is_held {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "a call was never let go");
            if let Some(answer) = state.answer.take() {
                return Err(answer);
            }
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
        let ending = match state.endings.front() {
            Some(&(after, ending)) if number >= after => {
                state.endings.pop_front();
                Some(ending)
            }
            _ => None,
        };
        let most = state.most.min(bytes as u64);
        drop(state);
        match (known, ending) {
            (None, _) => Err(-(ffi::CU_FILE_HANDLE_NOT_REGISTERED as isize)),
            (_, Some(Ending::Errno(number))) => {
                set_errno(number);
                Err(-1)
            }
            (_, Some(Ending::Raw(number))) => Err(number),
            (Some(file), Some(Ending::Short(most))) => Ok((file, most.min(bytes as u64))),
            (Some(file), None) => Ok((file, most)),
        }
    }

    fn end(&self, file: Handle, base: u64) {
        let mut state = self.lock();
        state.under_way -= 1;
        if let Some((_, users)) = state.memory.get_mut(&base) {
            *users = users.saturating_sub(1);
        }
        if let Some(known) = state.files.get_mut(&file.0.addr()) {
            known.users -= 1;
        }
        self.changed.notify_all();
    }

    fn is_there(&self, call: &'static str, address: u64, bytes: u64) -> bool {
        let is_there = self.cuda.is_reached(call, address, bytes);
        if !is_there {
            let text = format!("{call}: {bytes} bytes at {address:#x} are not there");
            self.lock().wrong.push(text);
        }
        is_there
    }
}

type Begun = Result<(File, u64), isize>;

impl CufileCalls for FakeCufile {
    fn version(&self) -> Option<i32> {
        Some(self.lock().version)
    }

    fn open(&self) -> Result<(), Code> {
        let mut state = self.lock();
        state.opened += 1;
        state.open
    }

    fn properties(&self) -> Result<Properties, Code> {
        Ok(self.lock().properties)
    }

    fn always_bounces(&self) -> Option<bool> {
        self.lock().is_forced
    }

    unsafe fn register_file(&self, fd: RawFd) -> Result<Handle, Code> {
        let mut state = self.lock();
        if let Some(error) = state.refused_file {
            return Err(Code::new(error));
        }
        // SAFETY: open, by the caller's promise.
        let flags = rustix::fs::fcntl_getfl(unsafe { BorrowedFd::borrow_raw(fd) }).unwrap();
        if !flags.contains(OFlags::DIRECT) {
            state.wrong.push(format!("descriptor {fd} is not direct"));
        }
        if state.files.values().any(|known| known.fd == fd) {
            return Err(Code::new(ffi::CU_FILE_HANDLE_ALREADY_REGISTERED));
        }
        let own = format!("/proc/self/fd/{fd}");
        let writable = File::options().read(true).write(true).open(&own);
        let file = writable.or_else(|_| File::open(&own)).unwrap();
        state.next_file += 1;
        let number = state.next_file;
        state.files.insert(number, Known { file, fd, users: 0 });
        Ok(Handle(std::ptr::without_provenance_mut(number)))
    }

    unsafe fn deregister_file(&self, file: Handle) {
        let mut state = self.lock();
        match state.files.remove(&file.0.addr()) {
            Some(known) if known.users == 0 => {
                let own = format!("/proc/self/fd/{}", known.fd);
                if !std::path::Path::new(&own).exists() {
                    state
                        .wrong
                        .push("a file is closed before it is deregistered".to_owned());
                }
            }
            Some(_) => state.wrong.push("a file in use is deregistered".to_owned()),
            None => state.wrong.push("no such file".to_owned()),
        }
    }

    unsafe fn register_memory(&self, address: u64, bytes: usize) -> Result<(), Code> {
        if !self.is_there("cuFileBufRegister", address, bytes as u64) {
            return Err(Code::new(ffi::CU_FILE_CUDA_POINTER_INVALID));
        }
        let mut state = self.lock();
        if let Some(error) = state.refused_memory {
            return Err(Code::new(error));
        }
        if state.memory.contains_key(&address) {
            state
                .wrong
                .push(format!("{address:#x} is registered twice"));
            return Err(Code::MEMORY_ALREADY_REGISTERED);
        }
        state.memory.insert(address, (bytes as u64, 0));
        Ok(())
    }

    unsafe fn deregister_memory(&self, address: u64) -> Result<(), Code> {
        let mut state = self.lock();
        match state.memory.remove(&address) {
            Some((_, 0)) => Ok(()),
            Some(_) => {
                state.wrong.push("memory in use is deregistered".to_owned());
                Ok(())
            }
            None => Err(Code::new(ffi::CU_FILE_MEMORY_NOT_REGISTERED)),
        }
    }

    unsafe fn read(
        &self,
        file: Handle,
        base: u64,
        offset: u64,
        bytes: usize,
        at: u64,
    ) -> Result<u64, Failure> {
        let answer = self.begin(file, (base, offset), bytes, at);
        let answer = answer.map_or_else(
            |answer| answer,
            |(file, most)| {
                let mut content = vec![0; most as usize];
                let read = file.read_at(&mut content, at).unwrap();
                if self.is_there("cuFileRead", base + offset, read as u64) {
                    self.cuda.write(base + offset, &content[..read]);
                }
                read as isize
            },
        );
        let moved = moved(answer);
        self.end(file, base);
        moved
    }

    unsafe fn write(
        &self,
        file: Handle,
        base: u64,
        offset: u64,
        bytes: usize,
        at: u64,
    ) -> Result<u64, Failure> {
        let answer = self.begin(file, (base, offset), bytes, at);
        let answer = answer.map_or_else(
            |answer| answer,
            |(file, most)| {
                if self.is_there("cuFileWrite", base + offset, most) {
                    let content = self.cuda.read(base + offset, most);
                    file.write_all_at(&content, at).unwrap();
                }
                most as isize
            },
        );
        let moved = moved(answer);
        self.end(file, base);
        moved
    }
}
