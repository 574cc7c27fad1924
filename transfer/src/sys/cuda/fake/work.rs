//! What is queued, and how it is done.

use std::collections::VecDeque;

use super::kernels::Launch;
use super::{Event, Of, State};

/// One entry of a stream.
pub(super) enum Entry {
    /// Of one call, in the order in which they are done.
    Copies(Vec<Copy>),
    Record(u64),
    /// Until an event's record with this number is done.
    Wait(u64, u64),
    /// Until a test lets it go on.
    Hold(u64),
    /// An engine's kernel: writes bytes to an address.
    Write(u64, Vec<u8>),
    /// A kernel of a module.
    Launch(u64, Launch),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Copy {
    pub(super) target: u64,
    pub(super) source: u64,
    pub(super) bytes: usize,
}

/// Whose an address is.
enum Owner {
    /// Device memory: where each piece begins, and which part of it.
    Device(Vec<(u64, usize, usize)>),
    Host,
}

impl State {
    /// Does the next entry of every stream, also of those that were destroyed.
    pub(super) fn turn_all(&mut self) {
        let streams: Vec<u64> = self.streams.keys().copied().collect();
        for stream in streams {
            self.turn(stream);
        }
        for mut orphan in std::mem::take(&mut self.orphans) {
            self.turn_first(&mut orphan);
            if !orphan.is_empty() {
                self.orphans.push(orphan);
            }
        }
    }

    pub(super) fn turn(&mut self, stream: u64) {
        if let Some(mut queue) = self.streams.remove(&stream) {
            self.turn_first(&mut queue);
            self.streams.insert(stream, queue);
        }
    }

    fn turn_first(&mut self, queue: &mut VecDeque<Entry>) {
        let waits = match queue.front() {
            Some(Entry::Wait(event, record)) => self
                .event(*event)
                .is_some_and(|event| event.recorded - event.pending < *record),
            Some(Entry::Hold(hold)) => !self.released.contains(hold),
            _ => false,
        };
        if !waits && let Some(entry) = queue.pop_front() {
            self.make(entry);
        }
    }

    fn event(&mut self, event: u64) -> Option<&mut Event> {
        let past = self.past_events.get_mut(&event);
        self.events.get_mut(&event).or(past)
    }

    fn make(&mut self, entry: Entry) {
        match entry {
            Entry::Copies(copies) => copies.into_iter().for_each(|copy| self.copy_now(copy)),
            Entry::Launch(module, _) if !self.modules.contains(&module) => {
                self.wrong("a kernel's module was unloaded before it ran");
            }
            Entry::Launch(_, launch) => self.run(launch),
            Entry::Wait(..) | Entry::Hold(_) => {}
            Entry::Write(address, bytes) => self.write(address, &bytes),
            Entry::Record(event) => match self.event(event) {
                Some(event) => event.pending -= 1,
                None => self.wrong(format!("event {event} was destroyed before it was over")),
            },
        }
    }

    fn owner(&mut self, address: u64, bytes: usize) -> Option<Owner> {
        if !self.is_of_device(address) {
            if !self.is_pinned(address, bytes as u64) {
                self.wrong(format!(
                    "{bytes} bytes of host memory at {address:#x} are not pinned"
                ));
            }
            return Some(Owner::Host);
        }
        let (mut at, end, mut parts) = (address, address + bytes as u64, Vec::new());
        while at < end {
            // Memory that was mapped side by side is one range of addresses.
            let found = self.memory.range(..=at).next_back();
            let found = found.filter(|(start, memory)| {
                at < **start + memory.backing.len() && memory.of != Of::Barred
            });
            let Some((&start, memory)) = found else {
                self.wrong(format!(
                    "{bytes} bytes at {address:#x} are in no device memory"
                ));
                return None;
            };
            let len = end.min(start + memory.backing.len()) - at;
            parts.push((start, (at - start) as usize, len as usize));
            at += len;
        }
        Some(Owner::Device(parts))
    }

    pub(super) fn copy_now(&mut self, copy: Copy) {
        let Copy {
            target,
            source,
            bytes,
        } = copy;
        let (Some(from), Some(to)) = (self.owner(source, bytes), self.owner(target, bytes)) else {
            return;
        };
        let content = match from {
            Owner::Device(parts) => {
                let part = |(start, at, len)| self.memory[&start].backing.get(at, len);
                parts.into_iter().flat_map(part).collect()
            }
            Owner::Host => {
                let mut content = vec![0; bytes];
                let source = std::ptr::with_exposed_provenance::<u8>(source as usize);
                // SAFETY: whoever queued the copy keeps the range readable until it is made; that is what is tested. The bytes
                // go to memory of this function.
                unsafe { std::ptr::copy(source, content.as_mut_ptr(), bytes) };
                content
            }
        };
        match to {
            Owner::Device(parts) => {
                let mut rest = &content[..];
                for (start, at, len) in parts {
                    let (head, tail) = rest.split_at(len);
                    self.memory[&start].backing.put(at, head);
                    rest = tail;
                }
            }
            Owner::Host => {
                let target = std::ptr::with_exposed_provenance_mut::<u8>(target as usize);
                // SAFETY: as above; the range is writable.
                unsafe { std::ptr::copy(content.as_ptr(), target, bytes) };
            }
        }
    }
}
