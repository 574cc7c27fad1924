//! What an engine does beside us: streams of its own, and what it computes on them.

use std::collections::VecDeque;
use std::sync::Arc;

use kvcache_core::Result;

use super::super::engine::CudaStream;
use super::super::event::CudaPoint;
use super::super::gpu::Gpu;
use super::work::Entry;
use super::{EngineStream, Event, Fake, State};

/// The first context of an engine that is not a device's primary one.
const OTHER_CONTEXT: u64 = 1 << 10;

impl Fake {
    /// A stream in the device's primary context.
    pub(crate) fn engine_stream(&self, ordinal: i32) -> u64 {
        self.lock().engine_stream(ordinal, ordinal as u64 + 1)
    }

    /// A stream in another context of the device.
    pub(crate) fn engine_stream_elsewhere(&self, ordinal: i32) -> u64 {
        let context = OTHER_CONTEXT + ordinal as u64;
        self.lock().engine_stream(ordinal, context)
    }

    /// A stream as we use it.
    pub(crate) fn stream_of(gpu: &Arc<Gpu>, stream: u64) -> Result<CudaStream> {
        // SAFETY: only this driver is asked about it, which looks whether there is such a stream.
        unsafe { CudaStream::on(gpu, stream) }
    }

    /// A point as we use it.
    pub(crate) fn point_of(gpu: &Arc<Gpu>, event: u64) -> Result<CudaPoint> {
        // SAFETY: as above, of an event.
        unsafe { CudaPoint::of(gpu, event) }
    }

    /// The engine is about to write bytes to its memory.
    pub(crate) fn engine_writes(&self, stream: u64, address: u64, bytes: &[u8]) {
        self.lock()
            .push(stream, Entry::Write(address, bytes.to_vec()));
    }

    /// The engine's stream does nothing of what it is given from now on, until [`Fake::engine_goes_on`] with the result.
    pub(crate) fn engine_holds(&self, stream: u64) -> u64 {
        let mut state = self.lock();
        let hold = state.handle();
        state.push(stream, Entry::Hold(hold));
        hold
    }

    pub(crate) fn engine_goes_on(&self, hold: u64) {
        self.lock().released.insert(hold);
    }

    /// A graph captures what the stream is given, or not any more.
    pub(crate) fn engine_captures(&self, stream: u64, is_captured: bool) {
        let mut state = self.lock();
        state.engine_streams.get_mut(&stream).unwrap().is_captured = is_captured;
    }

    /// An event of the engine, recorded behind what the stream has been given.
    pub(crate) fn engine_event(&self, stream: u64) -> u64 {
        let mut state = self.lock();
        let (event, device) = (state.handle(), state.stream_devices[&stream]);
        let made = Event {
            recorded: 0,
            pending: 0,
            device,
        };
        state.events.insert(event, made);
        state.record(event, stream);
        event
    }

    pub(crate) fn engine_records(&self, event: u64, stream: u64) {
        self.lock().record(event, stream);
    }

    /// The event was last recorded into a graph.
    pub(crate) fn engine_captures_event(&self, event: u64) {
        self.lock().captured_events.insert(event);
    }

    pub(crate) fn engine_drops_event(&self, event: u64) {
        self.lock().events.remove(&event).unwrap();
    }

    /// What an engine's stream has not done.
    pub(crate) fn engine_queued(&self, stream: u64) -> usize {
        self.lock().streams[&stream].len()
    }
}

impl State {
    fn engine_stream(&mut self, device: i32, context: u64) -> u64 {
        let stream = self.handle();
        self.contexts.insert(context, device);
        self.stream_devices.insert(stream, device);
        let made = EngineStream {
            context,
            is_captured: false,
        };
        self.engine_streams.insert(stream, made);
        self.streams.insert(stream, VecDeque::new());
        stream
    }

    fn push(&mut self, stream: u64, entry: Entry) {
        self.streams.get_mut(&stream).unwrap().push_back(entry);
    }

    pub(super) fn is_captured(&self, stream: u64) -> bool {
        let engines = self.engine_streams.get(&stream);
        engines.is_some_and(|engine| engine.is_captured)
    }

    /// What a stream has to do: default streams come into being with what they are given.
    pub(super) fn queue_of(&mut self, stream: u64) -> Option<&mut VecDeque<Entry>> {
        if stream <= 2 {
            let made = EngineStream {
                context: 1,
                is_captured: false,
            };
            self.engine_streams.entry(stream).or_insert(made);
            return Some(self.streams.entry(stream).or_default());
        }
        self.streams.get_mut(&stream)
    }

    pub(super) fn record(&mut self, event: u64, stream: u64) {
        if self.is_captured(stream) {
            self.wrong("an event is recorded into a graph");
        }
        let on = self.stream_devices.get(&stream).copied();
        match self.events.get_mut(&event) {
            Some(event) => {
                event.recorded += 1;
                event.pending += 1;
                if on.is_some_and(|device| device != event.device) {
                    self.wrong("an event is recorded on another device's stream");
                }
            }
            None => self.wrong("an event is recorded that there is not"),
        }
        match self.queue_of(stream) {
            Some(queue) => queue.push_back(Entry::Record(event)),
            None => self.wrong("an event is recorded on a stream that there is not"),
        }
    }

    /// Whether an event's record is still to be done by a stream of an engine, or by one that was given up with that to do.
    pub(super) fn is_awaited_by_engine(&self, event: u64) -> bool {
        let has = |queue: &VecDeque<Entry>| {
            let is_it = |entry: &Entry| matches!(entry, Entry::Record(it) if *it == event);
            queue.iter().any(is_it)
        };
        let engines = self.engine_streams.keys();
        let mut engines = engines.filter_map(|stream| self.streams.get(stream));
        engines.any(has) || self.orphans.iter().any(has)
    }
}
