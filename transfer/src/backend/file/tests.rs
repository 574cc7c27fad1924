use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use proptest::prelude::*;

use super::answer::Answer;
use super::inbox::Inbox;
use super::job::{FileJob, FileOperation, Piece, Waiter};
use super::open::{DirectMode, FileOptions, OpenFile};
use super::plan::calls;
use super::{FileBackend, FileEngineMode, Priority};
use crate::backend::Refusal;

/// Far beyond what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(60);

struct Asker {
    outcome: mpsc::Sender<Result<()>>,
    abandoned: Arc<AtomicBool>,
}

impl Waiter for Asker {
    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    fn settle(self: Box<Self>, outcome: Result<()>) {
        // A test that is over does not listen any more.
        let _ = self.outcome.send(outcome);
    }

    fn refuse(self: Box<Self>, error: Error) -> Refusal {
        Refusal(error)
    }
}

struct Asked {
    outcome: mpsc::Receiver<Result<()>>,
    abandoned: Arc<AtomicBool>,
}

impl Asked {
    fn outcome(&self) -> Result<()> {
        self.outcome
            .recv_timeout(PATIENCE)
            .expect("the engine answers")
    }
}

fn job(operation: FileOperation, file: &Arc<OpenFile>, pieces: Vec<Piece>) -> (FileJob, Asked) {
    let (sender, outcome) = mpsc::channel();
    let abandoned = Arc::new(AtomicBool::new(false));
    let waiter = Box::new(Asker {
        outcome: sender,
        abandoned: Arc::clone(&abandoned),
    });
    let job = FileJob {
        operation,
        files: vec![Arc::clone(file)],
        memory: Arc::from([]),
        pieces,
        priority: Priority::Normal,
        waiter,
    };
    (job, Asked { outcome, abandoned })
}

/// The caller keeps `memory` until the job is settled.
fn pieces(memory: &mut [u8], offset: u64) -> Vec<Piece> {
    vec![Piece {
        file: 0,
        local: 0,
        base: memory.as_mut_ptr(),
        len: memory.len(),
        offset,
    }]
}

fn handle(file: File, len: u64) -> Arc<OpenFile> {
    let options = FileOptions {
        direct: DirectMode::Off,
        ..FileOptions::default()
    };
    Arc::new(OpenFile::with_handle(file, Path::new("/test/file"), len, &options).expect("opens"))
}

fn engines() -> Vec<FileBackend> {
    let mut engines = vec![FileBackend::start(FileEngineMode::Blocking).expect("threads")];
    match FileBackend::start(FileEngineMode::Uring) {
        Ok(engine) => engines.push(engine),
        Err(error) => eprintln!("SKIPPED the io_uring half of this test: {error}"),
    }
    engines
}

/// `/dev/full` answers every write as a full disk does.
#[test]
fn a_full_disk_is_no_space() {
    for engine in engines() {
        let full = OpenOptions::new()
            .write(true)
            .open("/dev/full")
            .expect("opens");
        let file = handle(full, 1 << 20);
        let mut memory = vec![7; 8192];
        let (job, asked) = job(FileOperation::Write, &file, pieces(&mut memory, 4096));
        assert!(engine.submit(job).is_ok());
        let error = asked.outcome().expect_err("the disk is full");
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        assert!(error.to_string().contains("/test/file at 4096"), "{error}");
    }
}

/// The kernel holds a read of an empty pipe until it is withdrawn; then nothing lands in its memory any more.
#[test]
fn an_abandoned_read_is_settled_when_the_kernel_lets_go_of_it() {
    let Ok(engine) = FileBackend::start(FileEngineMode::Uring) else {
        eprintln!("SKIPPED: no io_uring here");
        return;
    };
    let (reader, mut writer) = std::io::pipe().expect("pipe");
    let file = handle(File::from(OwnedFd::from(reader)), 1 << 20);
    let mut memory = vec![7; 4096];
    let (waiting, asked) = job(FileOperation::Read, &file, pieces(&mut memory, 0));
    assert!(engine.submit(waiting).is_ok());
    // A second job that is done shows that the first one has reached the kernel, for they are taken in order.
    let zero = handle(File::open("/dev/zero").expect("opens"), 1 << 20);
    let mut zeros = vec![7; 4096];
    let (second, done) = job(FileOperation::Read, &zero, pieces(&mut zeros, 0));
    assert!(engine.submit(second).is_ok());
    done.outcome().expect("zeros");
    assert!(
        asked.outcome.try_recv().is_err(),
        "a read of an empty pipe is not over"
    );
    asked.abandoned.store(true, Ordering::Release);
    crate::backend::Backend::reap(&engine);
    let error = asked.outcome().expect_err("withdrawn");
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    writer.write_all(&[1; 4096]).expect("the pipe takes a page");
    assert_eq!(
        memory,
        vec![7; 4096],
        "a settled read does not touch its memory"
    );
}

/// The last handle of the engine goes while the kernel holds a read.
#[test]
fn closing_the_engine_settles_what_is_under_way() {
    let Ok(engine) = FileBackend::start(FileEngineMode::Uring) else {
        eprintln!("SKIPPED: no io_uring here");
        return;
    };
    let (reader, _writer) = std::io::pipe().expect("pipe");
    let file = handle(File::from(OwnedFd::from(reader)), 1 << 20);
    let mut memory = vec![7; 4096];
    let (waiting, asked) = job(FileOperation::Read, &file, pieces(&mut memory, 0));
    assert!(engine.submit(waiting).is_ok());
    drop(engine);
    let error = asked.outcome().expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert!(error.to_string().contains("closed"), "{error}");
}

/// Nothing takes the jobs of this inbox: whoever gives his up gets it back at once, and a closed one takes no more.
#[test]
fn an_inbox_hands_back_what_was_given_up_and_is_never_full() {
    let inbox = Inbox::default();
    let file = handle(File::open("/dev/zero").expect("opens"), 1);
    let asked: Vec<Asked> = (0..20_000)
        .map(|_| {
            let (job, asked) = job(FileOperation::Sync, &file, Vec::new());
            assert!(inbox.submit(job).is_ok());
            asked
        })
        .collect();
    for given_up in &asked[..3] {
        given_up.abandoned.store(true, Ordering::Release);
    }
    inbox.reap();
    inbox.settle_given_up();
    for given_up in &asked[..3] {
        let error = given_up.outcome().expect_err("given up");
        assert_eq!(error.kind(), ErrorKind::Cancelled);
    }
    asked[9].abandoned.store(true, Ordering::Release);
    inbox.reap();
    let first = inbox.wait().expect("many wait");
    assert!(first.waiter.is_abandoned(), "it goes before the others");
    inbox.close("over");
    let refused = inbox.submit(job(FileOperation::Sync, &file, Vec::new()).0);
    assert_eq!(
        refused.err().map(|(_, error)| error.kind()),
        Some(ErrorKind::Poisoned)
    );
    assert_eq!(
        std::iter::from_fn(|| inbox.wait()).count(),
        asked.len() - 4,
        "those that wait are still found"
    );
}

/// The asking end outlives the answering one.
#[test]
fn a_lost_reply_is_an_error_and_not_a_hang() {
    let (reply, mut answer) = Answer::<()>::channel();
    assert_eq!(
        answer.wait(Duration::ZERO).map_err(|e| e.kind()),
        Err(ErrorKind::Timeout)
    );
    drop(reply);
    assert_eq!(
        answer.wait(PATIENCE).map_err(|e| e.kind()),
        Err(ErrorKind::Internal)
    );
}

proptest! {
    /// The kernel answers each call with any number of bytes; what it is told next is compared with a list of every
    /// byte's address and offset.
    #[test]
    fn short_answers_are_continued_exactly(
        lens in prop::collection::vec(1_usize..5000, 1..20),
        gaps in prop::collection::vec(any::<bool>(), 20),
        answers in prop::collection::vec(1_i32..4000, 1..50),
    ) {
        let file = handle(File::open("/dev/null").expect("opens"), 1 << 30);
        let total: usize = lens.iter().sum();
        let mut memory = vec![0_u8; total + lens.len()];
        let (mut at, mut offset) = (0, 0_u64);
        let mut all = Vec::new();
        let mut expected = Vec::new();
        for (len, gap) in lens.iter().zip(&gaps) {
            let base = memory[at..].as_mut_ptr();
            all.push(Piece { file: 0, local: 0, base, len: *len, offset });
            expected.extend((0..*len).map(|byte| (base as usize + byte, offset + byte as u64)));
            // Sometimes the next piece continues in memory and in the file, sometimes not.
            at += len + usize::from(*gap);
            offset += *len as u64 + u64::from(*gap) * 10;
        }
        let (job, _asked) = job(FileOperation::Read, &file, all);
        let mut answers = answers.iter().cycle();
        let mut moved = Vec::new();
        for mut call in calls(&job).expect("in range") {
            loop {
                let left: usize = call.vectors.iter().map(|vector| vector.iov_len).sum();
                let answer = (*answers.next().expect("endless")).min(left as i32);
                let bytes = call.vectors.iter().flat_map(|vector| {
                    (0..vector.iov_len).map(|byte| vector.iov_base as usize + byte)
                });
                moved.extend(bytes.zip(call.offset..).take(answer as usize));
                prop_assert!(!call.advance(-libc::EINTR).expect("interrupted"));
                if call.advance(answer).expect("moved") {
                    break;
                }
            }
        }
        prop_assert_eq!(moved, expected);
    }
}
