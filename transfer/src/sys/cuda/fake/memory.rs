//! Device memory of the stand-in: a file in memory, so that another process's stand-in can have the same.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::Fake;
use crate::sys::memory::HostMemory;

const PAGE: u64 = 4096;

/// Behind the content: how often other processes have it open, whether its owner has freed it, and a word to know it by.
const OPEN: u64 = 0;
const FREED: u64 = 8;
const KNOWN_BY: u64 = 16;
/// The last process that opened it: one that is dead has nothing open.
const OPENER: u64 = 24;
const MARK: u64 = 0x6b76_6661_6b65_0001;

/// The content of an allocation, or of a piece that can be mapped.
pub(super) struct Backing {
    memory: HostMemory,
    bytes: u64,
}

impl Backing {
    pub(super) fn new(bytes: u64) -> Self {
        let memory = HostMemory::shared(bytes.next_multiple_of(PAGE) + PAGE).unwrap();
        let made = Self { memory, bytes };
        made.memory.mapping().fill(0, bytes, 0xcd).unwrap();
        made.set(KNOWN_BY, MARK);
        made
    }

    /// That of another process, or of this one once more; none if the file is something else.
    pub(super) fn of(file: OwnedFd, bytes: u64) -> Option<Self> {
        let memory = HostMemory::of_file(file).ok()?;
        let fits = memory.bytes() == bytes.next_multiple_of(PAGE) + PAGE;
        let made = Self { memory, bytes };
        (fits && made.word(KNOWN_BY) == MARK).then_some(made)
    }

    pub(super) fn file(&self) -> OwnedFd {
        let file = self.memory.shared_file().unwrap();
        file.as_fd().try_clone_to_owned().unwrap()
    }

    /// Where it lies in this process.
    pub(super) fn address(&self) -> u64 {
        self.memory.mapping().address()
    }

    /// Its descriptor in this process.
    pub(super) fn number(&self) -> i32 {
        self.memory.shared_file().unwrap().as_raw_fd()
    }

    pub(super) fn len(&self) -> u64 {
        self.bytes
    }

    pub(super) fn get(&self, at: usize, bytes: usize) -> Vec<u8> {
        assert!(
            at as u64 + bytes as u64 <= self.bytes,
            "outside of the memory"
        );
        let mut content = vec![0; bytes];
        self.memory.mapping().read(at as u64, &mut content).unwrap();
        content
    }

    pub(super) fn put(&self, at: usize, content: &[u8]) {
        assert!(
            at as u64 + content.len() as u64 <= self.bytes,
            "outside of the memory"
        );
        self.memory.mapping().write(at as u64, content).unwrap();
    }

    fn word(&self, word: u64) -> u64 {
        let at = self.memory.bytes() - PAGE + word;
        self.memory.mapping().load_u64(at).unwrap()
    }

    fn set(&self, word: u64, value: u64) {
        let at = self.memory.bytes() - PAGE + word;
        self.memory.mapping().store_u64(at, value).unwrap();
    }

    pub(super) fn is_freed(&self) -> bool {
        self.word(FREED) != 0
    }

    /// Its owner frees it. Whether others have it open.
    pub(super) fn free(&self) -> bool {
        self.set(FREED, 1);
        let opener = std::path::PathBuf::from(format!("/proc/{}", self.word(OPENER)));
        self.word(OPEN) != 0 && opener.exists()
    }

    pub(super) fn open(&self) {
        self.set(OPEN, self.word(OPEN) + 1);
        self.set(OPENER, u64::from(std::process::id()));
    }

    pub(super) fn close(&self) {
        self.set(OPEN, self.word(OPEN) - 1);
    }
}

impl Fake {
    /// As [`Fake::read`], of memory that was mapped in pieces.
    pub(crate) fn read_across(&self, address: u64, bytes: u64) -> Vec<u8> {
        let mut content = Vec::new();
        self.each_piece(address, bytes, |piece, at, len| {
            content.extend(piece.get(at, len));
        });
        content
    }

    /// As [`Fake::write`], of memory that was mapped in pieces.
    pub(crate) fn write_across(&self, address: u64, bytes: &[u8]) {
        let mut rest = bytes;
        self.each_piece(address, bytes.len() as u64, |piece, at, len| {
            let (head, tail) = rest.split_at(len);
            piece.put(at, head);
            rest = tail;
        });
    }

    fn each_piece(&self, address: u64, bytes: u64, mut each: impl FnMut(&Backing, usize, usize)) {
        let (state, mut at, end) = (self.lock(), address, address + bytes);
        while at < end {
            let (start, memory) = state.memory.range(..=at).next_back().unwrap();
            let len = end.min(start + memory.backing.len()) - at;
            each(&memory.backing, (at - start) as usize, len as usize);
            at += len;
        }
    }
}
