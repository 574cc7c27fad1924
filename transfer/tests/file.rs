//! Files by the public interface: what is on disk, what is refused, and what errors say.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "what tests share fails like a test"
)]

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, Descriptor, DirectMode, FileEngineMode, FileOptions, HostMemory, MemoryFate, Operation,
    Region, RegionOptions, RequestOptions, Side, TransferError,
};

/// Far beyond what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(60);
const PAGE: u64 = 4096;

fn agent(mode: FileEngineMode) -> Agent {
    let agent = Agent::builder("file-test")
        .memcpy(false)
        .shm(false)
        .build()
        .expect("agent");
    agent.start_file_engine(mode).expect("file engine");
    agent
}

fn memory(agent: &Agent, bytes: u64) -> Region {
    let memory = HostMemory::anonymous(bytes).expect("memory");
    agent
        .register(memory, RegionOptions::default())
        .expect("region")
}

fn bytes(len: u64) -> Vec<u8> {
    (0..len)
        .map(|position| (position * 7 + position / 251) as u8)
        .collect()
}

fn sized(len: u64) -> FileOptions {
    FileOptions {
        create: true,
        len_bytes: Some(len),
        ..FileOptions::default()
    }
}

fn transfer(
    agent: &Agent,
    operation: Operation,
    pairs: &[(Descriptor, Descriptor)],
) -> Result<(), TransferError> {
    let options = RequestOptions::default();
    let request = agent
        .transfer(operation, pairs, Side::Local, options)
        .expect("accepted");
    request.wait(PATIENCE).map(drop)
}

fn kind<T: std::fmt::Debug>(outcome: kvcache_core::Result<T>, text: &str) -> ErrorKind {
    let error = outcome.expect_err("refused");
    assert!(
        error.to_string().contains(text),
        "{error} does not say {text:?}"
    );
    error.kind()
}

/// One request over two files; what the file system then holds is read without us.
#[test]
fn one_request_writes_several_files() {
    let directory = tempfile::tempdir().expect("directory");
    for mode in [FileEngineMode::Auto, FileEngineMode::Blocking] {
        let agent = agent(mode);
        let memory = memory(&agent, 8 * PAGE);
        let content = bytes(8 * PAGE);
        memory.write_at(0, &content).expect("filled");
        let paths = ["one", "two"].map(|name| directory.path().join(format!("{mode:?}-{name}")));
        let files = paths
            .each_ref()
            .map(|path| agent.open_file(path, &sized(5 * PAGE)).expect("opens"));
        let pairs = [
            (
                memory.descriptor(0, 3 * PAGE),
                files[0].descriptor(PAGE, 3 * PAGE),
            ),
            (
                memory.descriptor(3 * PAGE, 5 * PAGE),
                files[1].descriptor(0, 5 * PAGE),
            ),
        ];
        transfer(&agent, Operation::Write, &pairs).expect("written");
        for file in &files {
            file.sync()
                .expect("accepted")
                .wait(PATIENCE)
                .expect("durable");
        }
        let (page, first) = (PAGE as usize, std::fs::read(&paths[0]).expect("reads"));
        assert_eq!(first.len(), 5 * page);
        assert!(
            first[..page]
                .iter()
                .chain(&first[4 * page..])
                .all(|byte| *byte == 0)
        );
        assert_eq!(first[page..4 * page], content[..3 * page]);
        assert_eq!(
            std::fs::read(&paths[1]).expect("reads"),
            content[3 * page..]
        );
    }
}

/// Somebody cuts the file after it was opened.
#[test]
fn a_file_that_ends_early_is_corrupt_with_its_path_and_offset() {
    let directory = tempfile::tempdir().expect("directory");
    for (number, direct) in [DirectMode::Auto, DirectMode::Off].into_iter().enumerate() {
        let path = directory.path().join(format!("cut-{number}"));
        let agent = agent(FileEngineMode::Auto);
        let memory = memory(&agent, 4 * PAGE);
        let options = FileOptions {
            direct,
            ..sized(4 * PAGE)
        };
        let file = agent.open_file(&path, &options).expect("opens");
        let cut = OpenOptions::new().write(true).open(&path).expect("opens");
        cut.set_len(PAGE + 100).expect("cut");
        let pairs = [(memory.descriptor(0, 4 * PAGE), file.descriptor(0, 4 * PAGE))];
        let failed = transfer(&agent, Operation::Read, &pairs).expect_err("cut");
        assert_eq!(failed.kind(), ErrorKind::Corrupt, "{failed}");
        assert_eq!(failed.fate(), MemoryFate::Settled);
        let text = failed.to_string();
        assert!(text.contains(&*path.to_string_lossy()), "{text}");
        assert!(text.contains(&format!("at {}", PAGE + 100)), "{text}");
    }
}

/// Direct I/O alone: an unaligned range is refused, unaligned memory is not.
#[test]
fn demanded_direct_io_bounces_unaligned_memory_and_refuses_unaligned_ranges() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("direct");
    for mode in [FileEngineMode::Auto, FileEngineMode::Blocking] {
        let agent = agent(mode);
        let options = FileOptions {
            direct: DirectMode::On,
            ..sized(1 << 22)
        };
        let file = match agent.open_file(&path, &options) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                eprintln!("SKIPPED: {error}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        assert!(
            file.direct_report()
                .expect("a file")
                .starts_with("direct for memory aligned")
        );
        let memory = memory(&agent, 6 << 20);
        let content = bytes(3 << 20);
        memory.write_at(1, &content).expect("filled");
        let target = file.descriptor(PAGE, 3 << 20);
        let pairs = [(memory.descriptor(1, 3 << 20), target)];
        transfer(&agent, Operation::Write, &pairs).expect("written");
        let pairs = [(memory.descriptor((3 << 20) - 1, 3 << 20), target)];
        transfer(&agent, Operation::Read, &pairs).expect("read");
        let mut found = vec![0; 3 << 20];
        memory.read_at((3 << 20) - 1, &mut found).expect("read");
        assert!(found == content);
        assert!(std::fs::read(&path).expect("reads")[PAGE as usize..][..3 << 20] == content);
        let pairs = [(memory.descriptor(0, PAGE), file.descriptor(1, PAGE))];
        let failed = transfer(&agent, Operation::Read, &pairs).expect_err("unaligned");
        assert_eq!(failed.kind(), ErrorKind::Invalid);
        assert!(
            failed.to_string().contains("direct I/O needs multiples of"),
            "{failed}"
        );
    }
}

/// Everything that can be wrong with a path or its options.
#[test]
fn what_cannot_be_opened_is_named() {
    let directory = tempfile::tempdir().expect("directory");
    let agent = agent(FileEngineMode::Auto);
    let missing = directory.path().join("missing");
    let open = |path: &Path, options: &FileOptions| agent.open_file(path, options);
    let plain = FileOptions::default();
    assert_eq!(kind(open(&missing, &plain), "missing"), ErrorKind::NotFound);
    let directory_itself = directory.path().to_string_lossy().into_owned() + " is a directory";
    assert_eq!(
        kind(open(directory.path(), &plain), &directory_itself),
        ErrorKind::Invalid
    );
    let read_only = FileOptions {
        read_only: true,
        ..FileOptions::default()
    };
    assert_eq!(
        kind(open(directory.path(), &read_only), "is a directory"),
        ErrorKind::Invalid
    );
    assert_eq!(
        kind(open(Path::new("/dev/zero"), &plain), "is a device"),
        ErrorKind::Invalid
    );
    let short = directory.path().join("short");
    std::fs::write(&short, [0; 10]).expect("written");
    let longer = FileOptions {
        len_bytes: Some(11),
        ..read_only
    };
    assert_eq!(
        kind(open(&short, &longer), "has 10 bytes, expected 11"),
        ErrorKind::Invalid
    );
}

/// To open a pipe is to wait for its other end, which may never come.
#[test]
fn a_pipe_is_refused_at_once() {
    let directory = tempfile::tempdir().expect("directory");
    let pipe = directory.path().join("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status();
    assert!(made.expect("mkfifo").success());
    let agent = agent(FileEngineMode::Auto);
    let (told, opened) = mpsc::channel();
    std::thread::spawn(move || {
        let read_only = FileOptions {
            read_only: true,
            ..FileOptions::default()
        };
        told.send(agent.open_file(&pipe, &read_only)).ok();
    });
    let opened = opened.recv_timeout(Duration::from_secs(20));
    let opened = opened.expect("an answer, though nobody writes to the pipe");
    assert_eq!(
        kind(opened, "neither a file nor a directory"),
        ErrorKind::Invalid
    );
}

/// A read-only region, asked for a write.
#[test]
fn a_read_only_file_denies_writes() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("constant");
    std::fs::write(&path, bytes(PAGE)).expect("written");
    let agent = agent(FileEngineMode::Auto);
    let memory = memory(&agent, PAGE);
    let options = FileOptions {
        read_only: true,
        ..FileOptions::default()
    };
    let file = agent.open_file(&path, &options).expect("opens");
    let pairs = [(memory.descriptor(0, PAGE), file.descriptor(0, PAGE))];
    let failed = transfer(&agent, Operation::Write, &pairs).expect_err("read-only");
    assert_eq!(failed.kind(), ErrorKind::Denied);
    transfer(&agent, Operation::Read, &pairs).expect("read");
    let mut found = vec![0; PAGE as usize];
    memory.read_at(0, &mut found).expect("read");
    assert_eq!(found, bytes(PAGE));
}

/// Space is taken at once, as the file system counts it.
#[test]
fn preallocated_files_own_their_space() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().expect("directory");
    let agent = agent(FileEngineMode::Auto);
    let path = directory.path().join("reserved");
    let options = FileOptions {
        preallocate: true,
        ..sized(1 << 20)
    };
    agent.open_file(&path, &options).expect("opens");
    let found = std::fs::metadata(&path).expect("stat");
    assert_eq!(found.len(), 1 << 20);
    assert!(
        found.blocks() * 512 >= 1 << 20,
        "{} sectors",
        found.blocks()
    );
}

/// Memory is no file.
#[test]
fn only_files_can_be_synced() {
    let agent = agent(FileEngineMode::Auto);
    let memory = memory(&agent, PAGE);
    assert_eq!(kind(memory.sync(), "is no file"), ErrorKind::Unsupported);
    assert_eq!(
        kind(memory.direct_report(), "is no file"),
        ErrorKind::Unsupported
    );
}

/// The agent and all its handles go while requests are under way.
#[test]
fn requests_outlive_their_agent() {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("outlived");
    let agent = agent(FileEngineMode::Auto);
    let memory = memory(&agent, 16 << 20);
    memory.write_at(0, &bytes(16 << 20)).expect("filled");
    let file = agent.open_file(&path, &sized(16 << 20)).expect("opens");
    let pairs = [(memory.descriptor(0, 16 << 20), file.descriptor(0, 16 << 20))];
    let request = agent
        .transfer(
            Operation::Write,
            &pairs,
            Side::Local,
            RequestOptions::default(),
        )
        .expect("accepted");
    drop((agent, memory, file));
    request.wait(PATIENCE).expect("written");
    assert!(std::fs::read(&path).expect("reads") == bytes(16 << 20));
}
