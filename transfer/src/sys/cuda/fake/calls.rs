//! The calls, as their documentation has them.

use std::collections::VecDeque;
use std::ffi::{CStr, c_void};
use std::thread;

use super::super::calls::{
    Answer, Attribute, Calls, Code, CopyList, Device, Handle, PointerFacts, Threads,
};
use super::kernels::Launch;
use super::work::{Copy, Entry};
use super::{Event, Fake, name, named};

impl Calls for Fake {
    fn init(&self) -> Answer<()> {
        let mut state = self.lock();
        state.begin("cuInit")?;
        state.is_started = true;
        match state.devices {
            0 => Err(Code::NO_DEVICE),
            _ => Ok(()),
        }
    }

    fn driver_version(&self) -> Answer<i32> {
        let mut state = self.lock();
        state.begin("cuDriverGetVersion")?;
        Ok(state.version)
    }

    fn device_count(&self) -> Answer<i32> {
        let mut state = self.lock();
        state.begin("cuDeviceGetCount")?;
        if !state.is_started {
            return Err(Code(3));
        }
        Ok(state.devices)
    }

    fn device(&self, ordinal: i32) -> Answer<Device> {
        let mut state = self.lock();
        state.begin("cuDeviceGet")?;
        match (0..state.devices).contains(&ordinal) {
            true => Ok(Device(ordinal)),
            false => Err(Code::INVALID_DEVICE),
        }
    }

    fn device_name(&self, device: Device) -> Answer<String> {
        Ok(format!("Stand-in {}", device.0))
    }

    fn device_uuid(&self, device: Device) -> Answer<[u8; 16]> {
        Ok([device.0 as u8 + 1; 16])
    }

    fn device_pci(&self, device: Device) -> Answer<String> {
        Ok(format!("0000:{:02x}:00.0", device.0 + 1))
    }

    fn device_bytes(&self, _device: Device) -> Answer<u64> {
        Ok(1 << 30)
    }

    fn attribute(&self, _device: Device, attribute: Attribute) -> Answer<i32> {
        Ok(match attribute {
            Attribute::ComputeMajor => 9,
            Attribute::ComputeMinor => 0,
            Attribute::UnifiedAddressing => 1,
            Attribute::Multiprocessors => 4,
            other => self.lock().direct.attribute(other),
        })
    }

    fn text(&self, code: Code) -> Option<(String, String)> {
        let (name, text) = match code {
            Code::INVALID_VALUE => ("CUDA_ERROR_INVALID_VALUE", "invalid argument"),
            Code::OUT_OF_MEMORY => ("CUDA_ERROR_OUT_OF_MEMORY", "out of memory"),
            Code::STUB_LIBRARY => ("CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"),
            Code::NO_DEVICE => ("CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"),
            Code(700) => (
                "CUDA_ERROR_ILLEGAL_ADDRESS",
                "an illegal memory access was encountered",
            ),
            Code::SYSTEM_NOT_READY => ("CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"),
            _ => return None,
        };
        Some((name.to_owned(), text.to_owned()))
    }

    fn pointer_facts(&self, address: u64) -> Answer<PointerFacts> {
        let mut state = self.lock();
        state.begin_in("cuPointerGetAttributes")?;
        let inside = |start: u64, bytes: u64| address >= start && address < start + bytes;
        let device = state.memory.range(..=address).next_back();
        if let Some((start, memory)) = device
            && inside(*start, memory.backing.len())
        {
            return Ok(memory.facts);
        }
        let host = state.pinned.range(..=address).next_back();
        Ok(match host {
            Some((&start, &(bytes, _))) if inside(start, bytes) => PointerFacts {
                memory_type: PointerFacts::HOST,
                start,
                bytes,
                ..PointerFacts::default()
            },
            _ => PointerFacts::default(),
        })
    }

    fn has_batch(&self) -> bool {
        self.lock().has_batch
    }

    unsafe fn retain_primary(&self, device: Device) -> Answer<Handle> {
        let mut state = self.lock();
        state.begin("cuDevicePrimaryCtxRetain")?;
        *state.retained.entry(device.0).or_default() += 1;
        Ok(named(device.0 as u64 + 1))
    }

    unsafe fn release_primary(&self, device: Device) -> Answer<()> {
        let mut state = self.lock();
        state.begin("cuDevicePrimaryCtxRelease")?;
        let retained = state.retained.entry(device.0).or_default();
        *retained -= 1;
        if *retained < 0 {
            state.wrong("a context is released more often than retained");
        }
        Ok(())
    }

    unsafe fn push(&self, context: Handle) -> Answer<()> {
        let mut state = self.lock();
        state.begin("cuCtxPushCurrent")?;
        let device = name(context) as i32 - 1;
        let is_engines = state.contexts.contains_key(&name(context));
        if !is_engines && state.retained.get(&device).copied().unwrap_or(0) <= 0 {
            state.wrong("a context is current that nobody retains");
        }
        let current = state.current.entry(thread::current().id()).or_default();
        current.push(name(context));
        Ok(())
    }

    unsafe fn pop(&self) -> Answer<()> {
        let mut state = self.lock();
        state.begin("cuCtxPopCurrent")?;
        let current = state.current.entry(thread::current().id()).or_default();
        match current.pop() {
            Some(_) => Ok(()),
            None => Err(super::INVALID_CONTEXT),
        }
    }

    fn capture_mode(&self, mode: u32) -> Answer<u32> {
        let mut state = self.lock();
        let before = state.modes.insert(thread::current().id(), mode);
        Ok(before.unwrap_or(0))
    }

    unsafe fn allocate(&self, bytes: usize) -> Answer<u64> {
        let mut state = self.lock();
        let device = state.begin_in("cuMemAlloc")?;
        Ok(state.allocate(device, bytes as u64))
    }

    unsafe fn free(&self, address: u64) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuMemFree")?;
        match state.free(address) {
            Some(()) => Ok(()),
            None => Err(Code::INVALID_VALUE),
        }
    }

    unsafe fn register_host(&self, base: *mut u8, bytes: usize) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuMemHostRegister")?;
        let (start, end) = (
            base.expose_provenance() as u64,
            base.addr() as u64 + bytes as u64,
        );
        let before = state.pinned.range(..end).next_back();
        if before.is_some_and(|(other, (len, _))| other + len > start) {
            return Err(Code::HOST_MEMORY_ALREADY_REGISTERED);
        }
        state.pinned.insert(start, (bytes as u64, false));
        Ok(())
    }

    unsafe fn unregister_host(&self, base: *mut u8) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuMemHostUnregister")?;
        match state.pinned.remove(&(base.addr() as u64)) {
            Some(_) => Ok(()),
            None => Err(Code(713)),
        }
    }

    unsafe fn device_pointer(&self, base: *mut u8) -> Answer<u64> {
        let mut state = self.lock();
        state.begin_in("cuMemHostGetDevicePointer")?;
        let address = base.addr() as u64;
        match state.is_mapped && state.is_pinned(address, 1) {
            true => Ok(address),
            false => Err(Code::INVALID_VALUE),
        }
    }

    unsafe fn load_module(&self, image: &CStr) -> Answer<Handle> {
        let mut state = self.lock();
        state.begin_in("cuModuleLoadData")?;
        if !image.to_bytes().windows(8).any(|text| text == b".version") {
            return Err(super::UNSUPPORTED_PTX);
        }
        let module = state.handle();
        state.modules.insert(module);
        Ok(named(module))
    }

    unsafe fn function(&self, module: Handle, wanted: &CStr) -> Answer<Handle> {
        let mut state = self.lock();
        state.begin_in("cuModuleGetFunction")?;
        let wanted = wanted.to_string_lossy().into_owned();
        if !state.modules.contains(&name(module)) {
            state.wrong("a kernel of a module that there is not");
        }
        let image = include_str!("../kernels/generated/kernels.ptx");
        if !image.contains(&format!(".entry {wanted}(")) {
            return Err(Code(500));
        }
        let kernel = state.handle();
        state.kernels.insert(kernel, (name(module), wanted));
        Ok(named(kernel))
    }

    unsafe fn unload_module(&self, module: Handle) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuModuleUnload")?;
        if !state.modules.remove(&name(module)) {
            state.wrong("a module is unloaded twice");
        }
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: Handle,
        threads: Threads,
        arguments: &mut [*mut c_void],
        stream: Handle,
    ) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuLaunchKernel")?;
        if threads.blocks == 0
            || !(32..=256).contains(&threads.each)
            || !threads.each.is_multiple_of(32)
        {
            return Err(Code::INVALID_VALUE);
        }
        let Some((module, kernel)) = state.kernels.get(&name(kernel)).cloned() else {
            state.wrong("a launch of no kernel");
            return Err(Code::INVALID_VALUE);
        };
        // SAFETY: the arguments are those of this kernel, by the caller's promise, which is what is tested.
        let Some(launch) = (unsafe { Launch::of(&kernel, arguments) }) else {
            return Err(Code::INVALID_VALUE);
        };
        match state.streams.get_mut(&name(stream)) {
            Some(queue) => queue.push_back(Entry::Launch(module, launch)),
            None => state.wrong("a launch on a stream that there is not"),
        }
        Ok(())
    }

    unsafe fn create_stream(&self) -> Answer<Handle> {
        let mut state = self.lock();
        let device = state.begin_in("cuStreamCreate")?;
        let stream = state.handle();
        state.stream_devices.insert(stream, device);
        state.streams.insert(stream, VecDeque::new());
        Ok(named(stream))
    }

    unsafe fn destroy_stream(&self, stream: Handle) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuStreamDestroy")?;
        match state.streams.remove(&name(stream)) {
            Some(left) => state.orphans.push(left),
            None => state.wrong("a stream is destroyed twice"),
        }
        Ok(())
    }

    unsafe fn create_event(&self) -> Answer<Handle> {
        let mut state = self.lock();
        let device = state.begin_in("cuEventCreate")?;
        let event = state.handle();
        let made = Event {
            recorded: 0,
            pending: 0,
            device,
        };
        state.events.insert(event, made);
        Ok(named(event))
    }

    unsafe fn destroy_event(&self, event: Handle) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuEventDestroy")?;
        let is_awaited = state.is_awaited_by_engine(name(event));
        match state.events.remove(&name(event)) {
            // The driver keeps it until streams have come to it; nobody but an engine's stream may take so long.
            Some(made) if made.pending > 0 && is_awaited => {
                state.past_events.insert(name(event), made);
            }
            Some(made) if made.pending > 0 => {
                state.wrong("an event is destroyed before it is over")
            }
            Some(_) => {}
            None => state.wrong("an event is destroyed twice"),
        }
        Ok(())
    }

    unsafe fn record(&self, event: Handle, stream: Handle) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuEventRecord")?;
        state.record(name(event), name(stream));
        Ok(())
    }

    unsafe fn stream_wait(&self, stream: Handle, event: Handle) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuStreamWaitEvent")?;
        let event = name(event);
        if state.captured_events.contains(&event) || state.is_captured(name(stream)) {
            state.wrong("a stream gets into a graph");
        }
        let Some(recorded) = state.events.get(&event).map(|event| event.recorded) else {
            state.wrong("a stream waits for an event that there is not");
            return Err(Code::INVALID_VALUE);
        };
        let wait = Entry::Wait(event, recorded);
        match state.queue_of(name(stream)) {
            Some(queue) => queue.push_back(wait),
            None => state.wrong("a stream waits that there is not"),
        }
        Ok(())
    }

    unsafe fn stream_context(&self, stream: Handle) -> Answer<Handle> {
        let mut state = self.lock();
        state.begin_in("cuStreamGetCtx")?;
        if let Some(engine) = state.engine_streams.get(&name(stream)) {
            return Ok(named(engine.context));
        }
        match state.stream_devices.get(&name(stream)) {
            Some(device) => Ok(named(*device as u64 + 1)),
            None => Err(Code::INVALID_VALUE),
        }
    }

    unsafe fn is_captured(&self, stream: Handle) -> Answer<u32> {
        let mut state = self.lock();
        state.begin_in("cuStreamIsCapturing")?;
        Ok(u32::from(state.is_captured(name(stream))))
    }

    fn current_device(&self) -> Answer<Device> {
        let mut state = self.lock();
        state.begin_in("cuCtxGetDevice").map(Device)
    }

    unsafe fn is_over(&self, event: Handle) -> Answer<bool> {
        let mut state = self.lock();
        state.begin_in("cuEventQuery")?;
        if state.captured_events.contains(&name(event)) {
            return Err(Code::CAPTURED_EVENT);
        }
        let is_over = state
            .events
            .get(&name(event))
            .is_some_and(|event| event.pending == 0);
        if !is_over && state.is_running {
            state.turn_all();
        }
        Ok(is_over)
    }

    unsafe fn copy(&self, target: u64, source: u64, bytes: usize, stream: Handle) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuMemcpyAsync")?;
        for address in [target, source] {
            if !state.is_of_device(address) && !state.is_pinned(address, bytes as u64) {
                state.wrong(format!(
                    "a copy of {bytes} bytes blocks: {address:#x} is not pinned"
                ));
            }
        }
        let copy = Copy {
            target,
            source,
            bytes,
        };
        match state.streams.get_mut(&name(stream)) {
            Some(queue) => queue.push_back(Entry::Copies(vec![copy])),
            None => state.wrong("a copy on a stream that there is not"),
        }
        Ok(())
    }

    unsafe fn copy_batch(&self, copies: &mut CopyList, stream: Handle) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuMemcpyBatchAsync")?;
        if copies.len() == 0 || !state.has_batch {
            state.wrong("a batch of nothing, or for a driver that knows none");
        }
        let copy = |at: usize| Copy {
            target: copies.targets[at],
            source: copies.sources[at],
            bytes: copies.bytes[at],
        };
        let made: Vec<Copy> = (0..copies.len()).rev().map(copy).collect();
        for copy in &made {
            for address in [copy.target, copy.source] {
                if !state.is_of_device(address) && !state.is_pinned(address, copy.bytes as u64) {
                    state.wrong(format!("a batch blocks: {address:#x} is not pinned"));
                }
            }
        }
        match state.streams.get_mut(&name(stream)) {
            Some(queue) => queue.push_back(Entry::Copies(made)),
            None => state.wrong("a batch on a stream that there is not"),
        }
        Ok(())
    }
}
