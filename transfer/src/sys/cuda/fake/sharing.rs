//! The calls about memory of other processes and other devices, as their documentation has them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::super::calls::{Answer, Code, Device, Handle, PointerFacts};
use super::super::sharing::{IPC_NAME_BYTES, MappingFacts, PieceHandle, SharingCalls};
use super::memory::Backing;
use super::work::{Copy, Entry};
use super::{Allocation, Fake, GAP, INVALID_CONTEXT, Of, name};

/// A name of the stand-in: its process, the descriptor there, and the bytes; then this.
const TAIL: [u8; IPC_NAME_BYTES - 24] = [0x5a; IPC_NAME_BYTES - 24];

fn file_of(process: u64, number: u64) -> Option<OwnedFd> {
    let path = format!("/proc/{process}/fd/{number}");
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path);
    file.ok().map(OwnedFd::from)
}

impl SharingCalls for Fake {
    fn mapping_facts(&self, address: u64) -> Answer<MappingFacts> {
        let mut state = self.lock();
        state.begin_in("mapping facts")?;
        let found = state.memory.range(..=address).next_back();
        match found {
            Some((&start, memory))
                if !memory.facts.is_legacy && address < start + memory.backing.len() =>
            {
                Ok(MappingFacts {
                    start,
                    bytes: memory.backing.len(),
                    is_shareable: memory.of != Of::Pool,
                })
            }
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn can_access(&self, device: Device, other: Device) -> Answer<bool> {
        let mut state = self.lock();
        state.begin("cuDeviceCanAccessPeer")?;
        Ok(device != other && state.is_linked)
    }

    unsafe fn name_memory(&self, start: u64) -> Answer<[u8; IPC_NAME_BYTES]> {
        let mut state = self.lock();
        state.begin_in("cuIpcGetMemHandle")?;
        let memory = match state.memory.get(&start) {
            Some(memory) if memory.facts.is_legacy && memory.of == Of::Own => memory,
            _ => return Err(Code::INVALID_VALUE),
        };
        let mut made = [0; IPC_NAME_BYTES];
        let (own, file) = (
            u64::from(std::process::id()),
            memory.backing.number() as u64,
        );
        made[..8].copy_from_slice(&own.to_ne_bytes());
        made[8..16].copy_from_slice(&file.to_ne_bytes());
        made[16..24].copy_from_slice(&memory.backing.len().to_ne_bytes());
        made[24..].copy_from_slice(&TAIL);
        Ok(made)
    }

    unsafe fn open_memory(&self, wanted: &[u8; IPC_NAME_BYTES]) -> Answer<u64> {
        let mut state = self.lock();
        let device = state.begin_in("cuIpcOpenMemHandle")?;
        let word = |at: usize| u64::from_ne_bytes(wanted[at..at + 8].try_into().unwrap());
        let (process, file, bytes) = (word(0), word(8), word(16));
        if process == u64::from(std::process::id()) && !state.is_forced {
            state.wrong("a process opens its own allocation");
            return Err(INVALID_CONTEXT);
        }
        if let Some((start, count)) = state.opened.get_mut(wanted) {
            *count += 1;
            return Ok(*start);
        }
        let backing = file_of(process, file).and_then(|file| Backing::of(file, bytes));
        let Some(backing) = backing.filter(|found| wanted[24..] == TAIL && !found.is_freed())
        else {
            return Err(Code::INVALID_HANDLE);
        };
        backing.open();
        let start = state.place(device, backing, Of::Other);
        state.opened.insert(*wanted, (start, 1));
        Ok(start)
    }

    unsafe fn close_memory(&self, start: u64) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuIpcCloseMemHandle")?;
        let found = state.opened.iter_mut().find(|(_, (at, _))| *at == start);
        let Some((&wanted, (_, count))) = found else {
            state.wrong("memory is closed that is not open");
            return Err(Code::INVALID_VALUE);
        };
        *count -= 1;
        if *count == 0 {
            state.opened.remove(&wanted);
            let memory = state.memory.remove(&start);
            memory.unwrap().backing.close();
        }
        Ok(())
    }

    unsafe fn retain_piece(&self, address: u64) -> Answer<PieceHandle> {
        let mut state = self.lock();
        state.begin_in("cuMemRetainAllocationHandle")?;
        let file = match state.memory.get(&address) {
            Some(memory) if !memory.facts.is_legacy => {
                (memory.backing.file(), memory.backing.len())
            }
            _ => return Err(Code::INVALID_VALUE),
        };
        let made = state.handle();
        state.pieces.insert(made, file);
        Ok(PieceHandle(made))
    }

    unsafe fn release_piece(&self, piece: PieceHandle) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuMemRelease")?;
        if state.pieces.remove(&piece.0).is_none() {
            state.wrong("a piece is released twice");
        }
        Ok(())
    }

    unsafe fn export_piece(&self, piece: PieceHandle) -> Answer<OwnedFd> {
        let mut state = self.lock();
        state.begin_in("cuMemExportToShareableHandle")?;
        match state.pieces.get(&piece.0) {
            Some((file, _)) => Ok(file.try_clone().unwrap()),
            None => Err(Code::INVALID_VALUE),
        }
    }

    unsafe fn import_piece(&self, file: BorrowedFd<'_>) -> Answer<PieceHandle> {
        let mut state = self.lock();
        state.begin_in("cuMemImportFromShareableHandle")?;
        let file = file.as_fd().try_clone_to_owned().unwrap();
        let size = rustix::fs::fstat(&file).map_or(0, |found| found.st_size as u64);
        let bytes = size.saturating_sub(4096);
        if Backing::of(file.try_clone().unwrap(), bytes).is_none() {
            return Err(Code::INVALID_VALUE);
        }
        let made = state.handle();
        state.pieces.insert(made, (file, bytes));
        Ok(PieceHandle(made))
    }

    unsafe fn reserve(&self, bytes: u64) -> Answer<u64> {
        let mut state = self.lock();
        state.begin_in("cuMemAddressReserve")?;
        if bytes == 0 || !bytes.is_multiple_of(4096) {
            return Err(Code::INVALID_VALUE);
        }
        let start = state.next_address;
        state.next_address += bytes.next_multiple_of(GAP) + GAP;
        state.reserved.insert(start, bytes);
        Ok(start)
    }

    unsafe fn unreserve(&self, start: u64, bytes: u64) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuMemAddressFree")?;
        if state.memory.range(start..start + bytes).next().is_some() {
            state.wrong("addresses are given back with memory mapped there");
        }
        match state.reserved.remove(&start) {
            Some(reserved) if reserved == bytes => Ok(()),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    unsafe fn map_piece(&self, start: u64, bytes: u64, piece: PieceHandle) -> Answer<()> {
        let mut state = self.lock();
        let device = state.begin_in("cuMemMap")?;
        let range = state.reserved.range(..=start).next_back();
        let fits = range.is_some_and(|(at, len)| start + bytes <= at + len);
        if !fits || state.memory.range(start..start + bytes).next().is_some() {
            state.wrong("memory is mapped where nothing is reserved, or over other memory");
            return Err(Code::INVALID_VALUE);
        }
        let found = match state.pieces.get(&piece.0) {
            Some((file, len)) if *len == bytes => Backing::of(file.try_clone().unwrap(), bytes),
            _ => None,
        };
        let Some(backing) = found else {
            return Err(Code::INVALID_VALUE);
        };
        let facts = PointerFacts {
            memory_type: PointerFacts::DEVICE,
            is_managed: false,
            ordinal: device,
            start,
            bytes,
            buffer: state.handle(),
            is_legacy: false,
        };
        let of = Of::Barred;
        state
            .memory
            .insert(start, Allocation { backing, facts, of });
        Ok(())
    }

    unsafe fn unmap(&self, start: u64, bytes: u64) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuMemUnmap")?;
        match state.memory.remove(&start) {
            Some(memory) if memory.backing.len() == bytes => Ok(()),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    unsafe fn allow_access(&self, start: u64, bytes: u64, ordinal: i32) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuMemSetAccess")?;
        let mut at = start;
        while at < start + bytes {
            match state.memory.get_mut(&at) {
                Some(memory) if memory.facts.ordinal == ordinal => {
                    memory.of = Of::Other;
                    at += memory.backing.len();
                }
                _ => return Err(Code::INVALID_VALUE),
            }
        }
        Ok(())
    }

    unsafe fn reach(&self, other: Handle) -> Answer<()> {
        let mut state = self.lock();
        let device = state.begin_in("cuCtxEnablePeerAccess")?;
        let other = name(other) as i32 - 1;
        match state.linked.insert((device, other)) {
            true if state.is_linked => Ok(()),
            true => Err(Code::PEER_ACCESS_UNSUPPORTED),
            false => Err(Code::PEER_ACCESS_ALREADY_ENABLED),
        }
    }

    unsafe fn copy_across(
        &self,
        to: (Handle, u64),
        from: (Handle, u64),
        bytes: usize,
        stream: Handle,
    ) -> Answer<()> {
        let mut state = self.lock();
        state.begin_in("cuMemcpyPeerAsync")?;
        for (context, address) in [to, from] {
            if state.device_of(address) != Some(name(context) as i32 - 1) {
                state.wrong(format!(
                    "{address:#x} is not memory of the context that is named"
                ));
            }
        }
        let copy = Copy {
            target: to.1,
            source: from.1,
            bytes,
        };
        match state.streams.get_mut(&name(stream)) {
            Some(queue) => queue.push_back(Entry::Copies(vec![copy])),
            None => state.wrong("a copy on a stream that there is not"),
        }
        Ok(())
    }
}
