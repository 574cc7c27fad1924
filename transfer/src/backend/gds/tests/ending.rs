//! Requests that end otherwise than by being done: when their memory is called free, and that no byte lands after that.

use super::*;
use crate::outcome::MemoryFate;

const BYTES: usize = 64 << 20;

/// An error of the file system ends the request, with its place; the next one goes the same way. One of cuFile's own ends the use of
/// cuFile for that file.
#[test]
fn an_error_ends_the_request() {
    for (ending, kind, words, next) in [
        (
            Ending::Errno(libc::EIO),
            ErrorKind::Io,
            "bytes: Input/output error",
            "gds",
        ),
        (
            Ending::Errno(libc::ENOSPC),
            ErrorKind::NoSpace,
            "No space left",
            "gds",
        ),
        (
            Ending::Raw(-(libc::EIO as isize)),
            ErrorKind::Io,
            "Input/output error",
            "gds",
        ),
        (
            Ending::Raw(-5010),
            ErrorKind::Io,
            "nvidia-fs refuses it (CU_FILE_NVFS_DRIVER_ERROR, 5010)",
            "staged",
        ),
        (
            Ending::Raw(-5009),
            ErrorKind::Unsupported,
            "not with this GPU",
            "staged",
        ),
        (
            Ending::Raw(i32::MAX as isize),
            ErrorKind::Internal,
            "says that it moved",
            "staged",
        ),
    ] {
        // With one thread the fourth call is the last one of the request.
        let threads = if next == "gds" { 1 } else { 4 };
        let bed = Bed::with(Storage::Direct, threads);
        let (device, _) = bed.device(0, &pattern(1, BYTES));
        let file = bed.file("blocks", &vec![0; BYTES]);
        let pair = [(whole(&device), whole(&file))];
        bed.cufile.spoil(3, ending);
        let request = bed.posted(Write, &pair);
        let failed = request.wait(PATIENCE).unwrap_err();
        assert_eq!(failed.kind(), kind, "{failed}");
        let text = failed.to_string();
        assert!(
            text.starts_with("gds: ") && text.contains("blocks at ") && text.contains(words),
            "{text}"
        );
        assert!(request.wait_drained(PATIENCE));
        // What had not been begun was not.
        let calls = bed.cufile.calls();
        assert!(calls == 4 || threads > 1 && calls < 16, "{calls}");
        if next == "staged" {
            let refused = bed.estimate(Write, pair[0]).refused;
            assert!(refused[0].1.contains(words), "{refused:?}");
            // The request that is there says so, too, and stays as it is.
            let again = request.post().unwrap_err();
            assert!(again.to_string().contains(words), "{again}");
        }
        bed.moved_by(next, Write, &pair);
        assert!(std::fs::read(bed.path("blocks")).unwrap() == pattern(1, BYTES));
        drop((device, file));
        drop(request);
        bed.end();
    }
}

/// What passes is tried again.
#[test]
fn interrupted_calls_are_made_again() {
    let bed = Bed::new();
    let (device, address) = bed.device(0, &vec![0; 1 << 20]);
    let file = bed.file("blocks", &pattern(2, 1 << 20));
    bed.cufile.spoil(0, Ending::Errno(libc::EINTR));
    bed.cufile.spoil(1, Ending::Raw(-(libc::EAGAIN as isize)));
    bed.cufile.spoil(2, Ending::Short(5000));
    bed.moved_by("gds", Read, &[(whole(&device), whole(&file))]);
    assert!(bed.fake.read(address, 1 << 20) == pattern(2, 1 << 20));
    assert_eq!(bed.cufile.calls(), 4);
}

/// The file is cut off below the request, within a page and at one.
#[test]
fn a_file_that_ends_early_is_corrupt() {
    for end in [5_000_000, 8 << 20] {
        let bed = Bed::new();
        let (device, address) = bed.device(0, &pattern(1, BYTES));
        let file = bed.file("blocks", &pattern(2, BYTES));
        let shortened = std::fs::File::options()
            .write(true)
            .open(bed.path("blocks"));
        shortened.unwrap().set_len(end).unwrap();
        let failed = bed.posted(Read, &[(whole(&device), whole(&file))]);
        let failed = failed.wait(PATIENCE).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::Corrupt, "{failed}");
        assert!(
            failed.to_string().contains("the file ends there"),
            "{failed}"
        );
        // Behind the end nothing was made up.
        let behind = (end as usize).next_multiple_of(4096);
        let moved = bed.fake.read(address, BYTES as u64);
        assert!(moved[behind..] == pattern(1, BYTES)[behind..]);
        let head = (device.descriptor(0, 4096), file.descriptor(0, 4096));
        bed.moved_by("gds", Read, &[head]);
    }
    let bed = Bed::new();
    let (device, _) = bed.device(0, &pattern(1, 8192));
    let file = bed.file("blocks", &[0; 8192]);
    bed.cufile.spoil(0, Ending::Raw(0));
    let failed = bed.posted(Write, &[(whole(&device), whole(&file))]);
    let failed = failed.wait(PATIENCE).unwrap_err();
    assert!(
        failed.to_string().contains("nothing was written"),
        "{failed}"
    );
}

/// Its name is gone, and its region; what was begun goes on, and the file is cuFile's for as long.
#[test]
fn a_file_that_goes_stays_until_the_request_is_over() {
    let bed = Bed::new();
    let (device, address) = bed.device(0, &vec![0; BYTES]);
    let file = bed.file("blocks", &pattern(3, BYTES));
    bed.cufile.hold();
    let request = bed.posted(Read, &[(whole(&device), whole(&file))]);
    bed.cufile.await_calls(4);
    std::fs::remove_file(bed.path("blocks")).unwrap();
    let gone = file.deregister();
    drop(file);
    assert_eq!(
        gone.wait(Duration::ZERO).unwrap_err().kind(),
        ErrorKind::Busy
    );
    assert_eq!(bed.cufile.registered().0, 1);
    bed.cufile.release();
    request.wait(PATIENCE).unwrap();
    gone.wait(PATIENCE).unwrap();
    assert!(bed.fake.read(address, BYTES as u64) == pattern(3, BYTES));
    drop((request, device, gone));
    bed.end();
}

#[test]
fn a_file_for_reading_is_not_written() {
    let bed = Bed::new();
    let (device, _) = bed.device(0, &pattern(1, 4096));
    std::fs::write(bed.path("blocks"), [0; 4096]).unwrap();
    let options = FileOptions {
        read_only: true,
        ..FileOptions::default()
    };
    let file = bed.opened("blocks", &options);
    let pair = [(whole(&device), whole(&file))];
    let said = bed
        .request(Write, &pair, RequestOptions::default())
        .unwrap_err();
    assert_eq!(said.kind(), ErrorKind::Denied);
    bed.moved_by("gds", Read, &pair);
}

/// Given up while calls are under way, by its caller and by its deadline: nothing is free, and no further call is begun. When the calls
/// return it is settled, and no byte lands after that. One that only waits ends at once, though all threads are held.
#[test]
fn a_request_that_is_given_up_ends_with_its_calls() {
    for deadline in [None, Some(Duration::from_millis(50))] {
        let bed = Bed::new();
        let (device, address) = bed.device(0, &vec![0; BYTES]);
        let file = bed.file("blocks", &pattern(4, BYTES));
        // Each would have to be made again for the rest.
        bed.cufile.set_most(1 << 20);
        bed.cufile.hold();
        let options = RequestOptions {
            deadline,
            ..RequestOptions::default()
        };
        let pair = [(whole(&device), whole(&file))];
        let request = bed.request(Read, &pair, options).unwrap();
        request.post().unwrap();
        bed.cufile.await_calls(4);
        let behind = bed.posted(Read, &pair);
        let kind = match deadline {
            None => {
                request.cancel();
                ErrorKind::Cancelled
            }
            Some(_) => ErrorKind::Timeout,
        };
        let failed = request.wait(PATIENCE).unwrap_err();
        assert_eq!((failed.kind(), failed.fate()), (kind, MemoryFate::InFlight));
        behind.cancel();
        assert!(
            behind.wait_drained(PATIENCE),
            "it waits for threads that are held"
        );
        assert!(!request.wait_drained(Duration::ZERO));
        let gone = device.deregister();
        assert_eq!(
            gone.wait(Duration::ZERO).unwrap_err().kind(),
            ErrorKind::Busy
        );
        assert_eq!(bed.cufile.registered(), (1, 1));
        bed.cufile.release();
        assert!(request.wait_drained(PATIENCE));
        gone.wait(PATIENCE).unwrap();
        assert_eq!(bed.cufile.registered(), (1, 0));
        assert_eq!(bed.cufile.calls(), 4);
        // It is the engine's again.
        bed.fake.write(address, &vec![9; BYTES]);
        bed.fake.check();
        bed.cufile.check();
        assert!(bed.fake.read(address, BYTES as u64) == vec![9; BYTES]);
        drop((request, behind, device, file, gone));
        bed.end();
    }
}

/// One call fails while others are under way: the caller hears of it, and that its memory is not free yet.
#[test]
fn a_failure_is_told_before_the_other_calls_return() {
    let bed = Bed::new();
    let (device, _) = bed.device(0, &vec![0; BYTES]);
    let file = bed.file("blocks", &pattern(5, BYTES));
    let small = bed.file("small", &pattern(6, 4096));
    // Its own call is answered with an error at once, while those of the large one are held.
    bed.cufile.hold();
    let rest = file.descriptor(0, 12 << 20);
    let pairs = [
        (device.descriptor(0, 12 << 20), rest),
        (device.descriptor(16 << 20, 4096), whole(&small)),
    ];
    let request = bed.posted(Read, &pairs);
    bed.cufile.await_calls(4);
    bed.cufile.fail_one(-5030);
    let failed = request.wait(PATIENCE).unwrap_err();
    assert_eq!(failed.fate(), MemoryFate::InFlight, "{failed}");
    assert!(
        failed.to_string().contains("CU_FILE_INTERNAL_ERROR"),
        "{failed}"
    );
    assert!(!request.wait_drained(Duration::ZERO));
    bed.cufile.release();
    assert!(request.wait_drained(PATIENCE));
    bed.cufile.check();
}

/// Memory that its engine has freed is told of when a request is made; what lies there later is not taken for it.
#[test]
fn memory_that_is_freed_while_it_is_registered_is_refused() {
    let bed = Bed::new();
    let (device, address) = bed.device(0, &pattern(1, 1 << 20));
    let file = bed.file("blocks", &vec![0; 1 << 20]);
    let pair = [(whole(&device), whole(&file))];
    bed.moved_by("gds", Write, &pair);
    bed.fake.describe(address, |facts| facts.buffer += 1000);
    let said = bed
        .request(Write, &pair, RequestOptions::default())
        .unwrap_err();
    assert_eq!(said.kind(), ErrorKind::Invalid);
    assert!(
        said.to_string()
            .contains("was freed while it was registered"),
        "{said}"
    );
    let other = bed.lent(0, address, 1 << 20);
    let calls = bed.cufile.calls();
    let pair = (whole(&other), whole(&file));
    let estimate = bed.estimate(Write, pair);
    assert_eq!(estimate.backend, "staged");
    let reason = &estimate.refused[0].1;
    assert!(reason.contains("was freed while cuFile had it"), "{reason}");
    assert_eq!(bed.cufile.calls(), calls);
    // With the region of what was freed goes what cuFile had of it.
    device.deregister().wait(PATIENCE).unwrap();
    bed.moved_by("gds", Write, &[pair]);
}

/// The agent goes while requests wait and are under way: each ends, and nothing is left.
#[test]
fn an_agent_that_goes_ends_what_waits() {
    let bed = Bed::with(Storage::Direct, 1);
    let (device, _) = bed.device(0, &vec![0; BYTES]);
    let file = bed.file("blocks", &pattern(7, BYTES));
    let pair = [(whole(&device), whole(&file))];
    bed.cufile.hold();
    let requests: Vec<_> = (0..3).map(|_| bed.posted(Read, &pair)).collect();
    bed.cufile.await_calls(1);
    requests.iter().for_each(Request::cancel);
    bed.cufile.release();
    for request in &requests {
        assert!(request.wait_drained(PATIENCE));
    }
    assert_eq!(bed.cufile.calls(), 1);
    drop((requests, device, file));
    bed.end();
}
