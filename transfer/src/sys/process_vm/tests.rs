//! Calls on this very process and on numbers that are no process: bounds, rights, and who is believed.

use super::*;

const WORD: [u8; NONCE_BYTES] = [7; NONCE_BYTES];

fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

/// A process met by the word at the start of `memory`, and the rest of the memory as a window.
fn met(memory: &Mapping, writable: bool) -> (PeerProcess, Window) {
    memory.write(0, &WORD).unwrap();
    let process = PeerProcess::meet(own_pid(), memory.address(), WORD).unwrap();
    let window = Window {
        address: memory.address() + 4096,
        bytes: memory.len() - 4096,
        writable,
    };
    (process, window)
}

/// More ranges than one call carries, there and back; what lies between them is left alone.
#[test]
fn ranges_are_moved_in_order_and_nothing_else_is() {
    const COUNT: u64 = 1300;
    let peer = Mapping::anonymous(1 << 20).unwrap();
    let own = Mapping::anonymous(1 << 20).unwrap();
    let (process, window) = met(&peer, true);
    own.write(0, &vec![1; 1 << 20]).unwrap();
    for operation in [Operation::Write, Operation::Read] {
        let mut batch = Batch::new(operation, COUNT as usize);
        let mut at = 0;
        while at < COUNT {
            batch.clear();
            let first = at;
            while at < COUNT && !batch.is_full() {
                batch.push(&own, at * 100, &window, at * 64, 16).unwrap();
                at += 1;
            }
            assert_eq!(batch.bytes(), (at - first) * 16);
            assert_eq!(process.run(&mut batch).unwrap(), batch.bytes());
        }
        let mut found = vec![0; (COUNT * 64) as usize];
        peer.read(4096, &mut found).unwrap();
        for step in found.chunks(64) {
            assert_eq!(step[..16], [1; 16]);
            assert_eq!(step[16..], [0; 48]);
        }
        own.write(0, &vec![0; 1 << 20]).unwrap();
    }
}

/// Read into zeroes just before, so the bytes that are there came from the peer.
#[test]
fn reading_brings_the_peer_s_bytes() {
    let peer = Mapping::anonymous(3 << 20).unwrap();
    let own = Mapping::anonymous(3 << 20).unwrap();
    let (process, window) = met(&peer, false);
    let data: Vec<u8> = (0..2 << 20).map(|n| (n % 251) as u8).collect();
    peer.write(4096 + 3, &data).unwrap();
    let mut batch = Batch::new(Operation::Read, 1);
    batch.push(&own, 5, &window, 3, 2 << 20).unwrap();
    assert_eq!(process.run(&mut batch).unwrap(), 2 << 20);
    let mut found = vec![0; 2 << 20];
    own.read(5, &mut found).unwrap();
    assert!(found == data);
}

/// A window ends where it ends, for numbers of every size, and is written only if it may be.
#[test]
fn a_window_is_not_left_and_not_written_without_leave() {
    let peer = Mapping::anonymous(3 * 4096).unwrap();
    let own = Mapping::anonymous(4 * 4096).unwrap();
    let (_, window) = met(&peer, false);
    let mut batch = Batch::new(Operation::Read, 4);
    batch.push(&own, 0, &window, 0, 8192).unwrap();
    for (offset, len) in [
        (0, 8193),
        (1, 8192),
        (8192, 1),
        (u64::MAX, 2),
        (u64::MAX - 1, 1),
    ] {
        let error = batch.push(&own, 0, &window, offset, len).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{offset}+{len}");
    }
    let error = batch.push(&own, 4 * 4096, &window, 0, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let mut batch = Batch::new(Operation::Write, 1);
    let error = batch.push(&own, 0, &window, 0, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert_eq!(batch.bytes(), 0);
    let lie = Window {
        address: u64::MAX - 10,
        bytes: 4096,
        writable: false,
    };
    let mut batch = Batch::new(Operation::Read, 1);
    let error = batch.push(&own, 0, &lie, 0, 4096).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

/// Another word, no memory at the address, and a number that no process has.
#[test]
fn a_process_without_the_word_is_not_met() {
    let memory = Mapping::anonymous(4096).unwrap();
    memory.write(0, &WORD).unwrap();
    let other = [8; NONCE_BYTES];
    let meet = |pid, at, word| PeerProcess::meet(pid, at, word).err().unwrap();
    let error = meet(own_pid(), memory.address(), other);
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let error = meet(own_pid(), 8, WORD);
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let error = meet(i32::MAX, memory.address(), WORD);
    assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
}

/// The word changes after the meeting, as it would if another program took the process over: nothing is believed, and
/// nothing more is written.
#[test]
fn a_process_that_lost_the_word_is_not_believed() {
    let peer = Mapping::anonymous(8192).unwrap();
    let own = Mapping::anonymous(4096).unwrap();
    let (process, window) = met(&peer, true);
    peer.write(0, &[9; NONCE_BYTES]).unwrap();
    own.fill(0, 4096, 1).unwrap();
    for operation in [Operation::Write, Operation::Read] {
        let mut batch = Batch::new(operation, 1);
        batch.push(&own, 0, &window, 0, 4096).unwrap();
        let error = process.run(&mut batch).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
    assert_eq!(peer.load_u64(4096).unwrap(), 0);
}

/// The window's second page is not mapped: what comes before it is moved, and then nothing.
#[test]
fn memory_that_is_not_there_stops_the_call() {
    let own = Mapping::anonymous(3 * 4096).unwrap();
    let page = Mapping::anonymous(4096).unwrap();
    let (process, _) = met(&page, false);
    for operation in [Operation::Read, Operation::Write] {
        // The last page of a mapping, and the first address after all of user space.
        let gone = Window {
            address: 1 << 47,
            bytes: 4096,
            writable: true,
        };
        let there = Window {
            address: page.address() + 1024,
            ..gone
        };
        let mut batch = Batch::new(operation, 2);
        batch.push(&own, 0, &there, 0, 512).unwrap();
        batch.push(&own, 512, &gone, 0, 512).unwrap();
        assert_eq!(process.run(&mut batch).unwrap(), 512, "{operation:?}");
        let mut batch = Batch::new(operation, 1);
        batch.push(&own, 512, &gone, 0, 512).unwrap();
        assert_eq!(process.run(&mut batch).unwrap(), 0, "{operation:?}");
    }
}
