//! Two processes, each with the stand-in, whose device memory is the same files. The other one is this program, started again to run
//! one function: it is told what to do by lines, and answers by lines.
#![allow(clippy::print_stdout, reason = "the other process speaks by printing")]

use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::*;
use crate::region::RegionId;

const OTHER: &str = "KVFABRIC_TEST_CUDA_OTHER";
const NAME: &str = "backend::cuda::tests::processes::the_other_process";
const BYTES: u64 = 300_000;
const PIECE: u64 = 32 << 10;
const OPEN: RegionOptions = RegionOptions {
    remote_read: true,
    remote_write: true,
};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = |at| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(digits).collect()
}

/// The other process. Killed when dropped.
struct Other {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Other {
    fn start(told: &[u8]) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([NAME, "--exact", "--nocapture"])
            .env(OTHER, hex(told))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            to: child.stdin.take().unwrap(),
            from: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// What it says after a word; it ends by itself if this process does.
    fn said(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            let read = self.from.read_line(&mut line).unwrap();
            assert!(read > 0, "the other process has ended before {word}");
            // The first line begins with the name of the test.
            if let Some((_, rest)) = line.trim_end().split_once(&format!("{word}=")) {
                return rest.to_owned();
            }
        }
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.to, "{line}").unwrap();
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An engine's memory of a device, in one allocation and in pieces, exported.
struct Owner {
    bed: Bed,
    regions: Vec<(Region, u64)>,
}

impl Owner {
    fn new() -> Self {
        let bed = Bed::new();
        let count = BYTES.div_ceil(PIECE) + 1;
        let starts = [
            bed.fake.engine_memory(0, BYTES + 4096),
            bed.fake.engine_mappings(0, &vec![PIECE; count as usize]),
        ];
        let lent = |start: u64| {
            let memory = bed.fake.lend(&bed.cuda, 0, start + 256, BYTES).unwrap();
            bed.fake
                .write_across(start + 256, &pattern(8, BYTES as usize));
            let region = bed.agent.register_device_with(memory, OPEN).unwrap();
            (region, start + 256)
        };
        let regions = starts.map(lent).into();
        Self { bed, regions }
    }

    fn content(&self, at: usize) -> Vec<u8> {
        self.bed.fake.read_across(self.regions[at].1, BYTES)
    }
}

/// The body of the other process; in the process that runs all tests there is nothing to do.
#[test]
fn the_other_process() {
    let Ok(told) = std::env::var(OTHER) else {
        return;
    };
    match told.is_empty() {
        true => own(),
        false => use_memory(&unhex(&told)),
    }
}

/// Exports memory, and does as it is told.
fn own() {
    let owner = Owner::new();
    let ids: Vec<String> = owner
        .regions
        .iter()
        .map(|(region, _)| region.id().0.to_string())
        .collect();
    println!("REGIONS={}", ids.join(","));
    println!("METADATA={}", hex(&owner.bed.agent.metadata()));
    for line in std::io::stdin().lines() {
        match line.unwrap().as_str() {
            "sum" => {
                let sum = |at| blake3::hash(&owner.content(at)).to_hex().to_string();
                println!("SUMS={},{}", sum(0), sum(1));
            }
            "deregister" => {
                for (region, _) in &owner.regions {
                    region.deregister().wait(PATIENCE).unwrap();
                }
                owner.bed.fake.engine_frees(owner.regions[0].1 - 256);
                owner.bed.fake.check();
                println!("GONE=1");
            }
            other => panic!("{other}"),
        }
    }
}

/// Reads what a peer exports, and keeps it open.
fn use_memory(metadata: &[u8]) {
    let bed = Bed::new();
    let peer = bed.agent.load_peer(metadata).unwrap();
    let host = bed.host(&vec![0; BYTES as usize]);
    for (region, bytes) in peer.regions() {
        let far = Descriptor {
            region,
            offset: 0,
            len: bytes,
        };
        let pairs = [(host.descriptor(0, bytes), far)];
        let options = RequestOptions::default();
        let request = bed
            .agent
            .transfer(Read, &pairs, Side::Peer(&peer), options)
            .unwrap();
        request.wait(PATIENCE).unwrap();
        println!("READ={}", blake3::hash(&content(&host)).to_hex());
    }
    println!("HOLDS=1");
    std::io::stdin().lines().for_each(drop);
}

fn far(region: u64, offset: u64, len: u64) -> Descriptor {
    let region = RegionId(region);
    Descriptor {
        region,
        offset,
        len,
    }
}

/// Another process's memory is read into host memory and written from memory of the own device, and the other one finds it there.
/// When it takes its regions back, this one lets go; when it dies, requests fail for that.
#[test]
fn another_process_has_its_memory_read_written_and_given_back() {
    for dies in [false, true] {
        let bed = Bed::new();
        let mut other = Other::start(&[]);
        let regions: Vec<u64> = other
            .said("REGIONS")
            .split(',')
            .map(|id| id.parse().unwrap())
            .collect();
        let peer = bed
            .agent
            .load_peer(&unhex(&other.said("METADATA")))
            .unwrap();
        let (own, at) = bed.device(BYTES);
        let host = bed.host(&vec![0; BYTES as usize]);
        let go = |operation, pair| -> kvcache_core::Result<()> {
            let options = RequestOptions::default();
            let request = bed
                .agent
                .transfer(operation, &[pair], Side::Peer(&peer), options)?;
            let done = request.wait(PATIENCE)?;
            assert_eq!(done.backend, "cuda");
            Ok(())
        };
        let mut wanted = Vec::new();
        for (number, &region) in regions.iter().enumerate() {
            go(Read, (host.descriptor(0, BYTES), far(region, 0, BYTES))).unwrap();
            assert!(content(&host) == pattern(8, BYTES as usize), "{number}");
            bed.fake.write(at, &pattern(number as u8, BYTES as usize));
            go(
                Write,
                (own.descriptor(100, 200_000), far(region, 99_000, 200_000)),
            )
            .unwrap();
            let mut content = pattern(8, BYTES as usize);
            content[99_000..299_000]
                .copy_from_slice(&pattern(number as u8, BYTES as usize)[100..200_100]);
            wanted.push(blake3::hash(&content).to_hex().to_string());
        }
        other.tell("sum");
        assert_eq!(other.said("SUMS"), wanted.join(","));
        assert_eq!(bed.fake.opened(), (1, 1));
        let report = bed.agent.path_to(&peer);
        assert_eq!(report.backend, Some("cuda"), "{report:?}");
        assert!(report.why.contains("opened from process"), "{report:?}");
        match dies {
            false => {
                other.tell("deregister");
                other.said("GONE");
            }
            true => other.kill(),
        }
        until(|| bed.fake.opened() == (0, 0));
        for &region in &regions {
            let error = go(Read, (host.descriptor(0, 64), far(region, 0, 64))).unwrap_err();
            let expected = if dies {
                ErrorKind::PeerLost
            } else {
                ErrorKind::Denied
            };
            assert_eq!(error.kind(), expected, "{error}");
        }
        bed.fake.engine_frees(at);
        drop((own, host, peer));
        bed.end();
    }
}

/// A process that has memory open dies: only then is it given back.
#[test]
fn memory_is_given_back_when_the_process_that_has_it_open_is_dead() {
    let owner = Owner::new();
    let mut other = Other::start(&owner.bed.agent.metadata());
    let expected = blake3::hash(&pattern(8, BYTES as usize))
        .to_hex()
        .to_string();
    for _ in 0..2 {
        assert_eq!(other.said("READ"), expected);
    }
    other.said("HOLDS");
    // It answers as long as it lives, so it is stopped, until all of its threads stand still.
    let pid = rustix::process::Pid::from_child(&other.child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let stopped = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::UNTRACED);
    assert!(stopped.unwrap().unwrap().1.stopped());
    let gone: Vec<_> = owner
        .regions
        .iter()
        .map(|(region, _)| region.deregister())
        .collect();
    for gone in &gone {
        let error = gone.wait(Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    }
    other.kill();
    for gone in &gone {
        gone.wait(PATIENCE).unwrap();
    }
    owner.bed.fake.engine_frees(owner.regions[0].1 - 256);
    owner.bed.fake.check();
}
