//! What is queued, and how it is done.

use super::State;
use super::kernels::Launch;

/// One entry of a stream.
pub(super) enum Entry {
    /// Of one call, in the order in which they are done.
    Copies(Vec<Copy>),
    Record(u64),
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
    /// The device memory that begins there.
    Device(u64),
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
            if let Some(entry) = orphan.pop_front() {
                self.make(entry);
                self.orphans.push(orphan);
            }
        }
    }

    pub(super) fn turn(&mut self, stream: u64) {
        let entry = self
            .streams
            .get_mut(&stream)
            .and_then(|queue| queue.pop_front());
        if let Some(entry) = entry {
            self.make(entry);
        }
    }

    fn make(&mut self, entry: Entry) {
        match entry {
            Entry::Copies(copies) => copies.into_iter().for_each(|copy| self.copy_now(copy)),
            Entry::Launch(module, _) if !self.modules.contains(&module) => {
                self.wrong("a kernel's module was unloaded before it ran");
            }
            Entry::Launch(_, launch) => self.run(launch),
            Entry::Record(event) => match self.events.get_mut(&event) {
                Some(event) => event.pending -= 1,
                None => self.wrong(format!("event {event} was destroyed before it was over")),
            },
        }
    }

    fn owner(&mut self, address: u64, bytes: usize) -> Option<Owner> {
        if address < super::FIRST {
            if !self.is_pinned(address, bytes as u64) {
                self.wrong(format!(
                    "{bytes} bytes of host memory at {address:#x} are not pinned"
                ));
            }
            return Some(Owner::Host);
        }
        let found = self.memory.range(..=address).next_back();
        let found = found.filter(|(start, memory)| {
            address + bytes as u64 <= **start + memory.bytes.len() as u64
        });
        let start = found.map(|(start, _)| *start);
        if start.is_none() {
            self.wrong(format!(
                "{bytes} bytes at {address:#x} are in no device memory"
            ));
        }
        start.map(Owner::Device)
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
            Owner::Device(start) => {
                let at = (source - start) as usize;
                self.memory[&start].bytes[at..at + bytes].to_vec()
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
            Owner::Device(start) => {
                let at = (target - start) as usize;
                if let Some(memory) = self.memory.get_mut(&start) {
                    memory.bytes[at..at + bytes].copy_from_slice(&content);
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
