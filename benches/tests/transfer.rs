//! Transfers between processes that are started by hand, as on several hosts, and what is made of their figures. Real
//! processes over loopback, tiny sizes; times are never looked at.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test fails by panicking, and skips aloud"
)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use support::{PATIENCE, bench, find, median, read, rows, text};

/// Runs what must fail; its status and what it says.
fn failure(arguments: &str) -> (Option<i32>, String) {
    let output = bench(arguments).output().unwrap();
    assert!(!output.status.success(), "{arguments}");
    (output.status.code(), text(&output.stderr))
}

/// A target that listens, started as a user does; it ends with this.
struct Listening {
    child: Child,
    _input: ChildStdin,
    address: String,
}

impl Listening {
    fn start(options: &str) -> Self {
        let arguments = "transfer target --listen 127.0.0.1:0 --end-with-input";
        let mut child = bench(&format!("{arguments} {options}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line
            .trim()
            .strip_prefix("listening on ")
            .unwrap()
            .to_owned();
        Self {
            _input: child.stdin.take().unwrap(),
            child,
            address,
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

const TINY: &str = "--total-bytes 256K --iterations 2 --latency-samples 3 --quiet";

/// Two targets, over TCP and shared memory, with the raw reference on the same connection's ends: every block is verified,
/// and the CPU time of both ends is told apart.
#[test]
fn targets_that_listen_are_measured_one_after_the_other() {
    let (one, two) = (Listening::start(""), Listening::start(""));
    let (a, b) = (&one.address, &two.address);
    let rows = rows(&format!(
        "transfer --to {a},{b} --backend tcp,shm --sizes 4K..16K {TINY}"
    ));
    for address in [a, b] {
        for (backend, reference) in [("tcp", "raw-tcp-stream"), ("shm", "mapped-loop")] {
            for way in ["read", "write"] {
                for size in [4096, 8192, 16384] {
                    let case = format!("{address}-{backend}-{way}-{size}");
                    for subject in ["kvfabric", reference] {
                        let verified = median(&rows, subject, &case, "verified_blocks");
                        assert_eq!(verified, f64::from(262_144 / size), "{subject} {case}");
                    }
                    let target = find(&rows, "kvfabric", &case, "cpu_target_s_per_gb");
                    assert!(target.is_some(), "{case}");
                }
            }
        }
    }
}

/// Every combination of what can be swept has a case of its own, and requests made each time move as much.
#[test]
fn batches_threads_and_depths_are_swept() {
    let rows = rows(&format!(
        "transfer --backend shm,tcp --operation write --sizes 4K --batch 8,64 --threads 1,3 \
         --in-flight 1,2 --requests one-shot {TINY}"
    ));
    for backend in ["shm", "tcp"] {
        for batch in [8, 64] {
            for threads in [1, 3] {
                for depth in [1, 2] {
                    let case =
                        format!("{backend}-write-batch{batch}-threads{threads}-depth{depth}-4096");
                    let subjects = match backend {
                        "shm" => ["kvfabric", "mapped-loop", "memcpy"],
                        _ => ["kvfabric", "raw-tcp", "raw-tcp-stream"],
                    };
                    for subject in subjects {
                        assert_eq!(median(&rows, subject, &case, "verified_blocks"), 64.0);
                    }
                }
            }
        }
    }
}

/// The ways that not every system offers: each is measured like the others, or the run ends and says what it lacks.
#[test]
fn ways_that_a_system_may_lack_are_measured_or_explained() {
    for way in ["cma", "ucx"] {
        let arguments = format!("transfer --backend {way} --sizes 4K {TINY}");
        let output = bench(&arguments).output().unwrap();
        if !output.status.success() {
            let said = text(&output.stderr);
            assert!(said.contains(way), "{said}");
            eprintln!("SKIPPED: {said}");
            continue;
        }
        let rows = rows(&arguments);
        for operation in ["read", "write"] {
            let case = format!("{way}-{operation}-4096");
            let value = |metric| median(&rows, "kvfabric", &case, metric);
            assert_eq!(value("bytes"), 2.0 * 262_144.0);
            assert_eq!(value("verified_blocks"), 64.0);
            assert!(value("cpu_target_s_per_gb") >= 0.0);
        }
    }
}

/// A prompt of a model with a window: all pages of all its layers, and when the first layer was there.
#[test]
fn a_models_prompt_is_moved_layer_by_layer() {
    let rows = rows(
        "transfer --backend shm,tcp --operation read --model gpt-oss-20b --layers 4 --windowed-layers 2 \
         --isl 512 --tp 4 --iterations 1 --latency-samples 0 --quiet --no-references",
    );
    for backend in ["shm", "tcp"] {
        let case = format!("{backend}-read-gpt-oss-20b-8192");
        // 32 pages in two layers, 8 in the other two.
        assert_eq!(median(&rows, "kvfabric", &case, "verified_blocks"), 80.0);
        assert!(median(&rows, "kvfabric", &case, "first_layer_us") > 0.0);
    }
    let listed = bench("transfer models --model llama-3.1-70b --tp 4 --isl 8192")
        .output()
        .unwrap();
    let listed = text(&listed.stdout);
    for figure in ["16384", "40960", "80 layers", "671088640"] {
        assert!(listed.contains(figure), "{listed}");
    }
}

/// Three named targets and a matrix, both ways: what each pair moved, and that it was verified.
#[test]
fn named_processes_move_what_a_matrix_says() {
    let targets = [0, 1, 2].map(|_| Listening::start(""));
    let names: Vec<String> = ["a", "b", "c"]
        .iter()
        .zip(&targets)
        .map(|(name, target)| format!("{name}={}", target.address))
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let matrix = folder.path().join("matrix");
    std::fs::write(&matrix, "0 64K 4K # a\n0 0 128K\n1K 0 0\n").unwrap();
    for way in ["write", "read"] {
        let rows = rows(&format!(
            "transfer mesh --peers {} --matrix {} --operation {way} --sizes 16K --iterations 2 --alone --quiet",
            names.join(","),
            matrix.display()
        ));
        let whole = format!("tcp-{way}-matrix-16384");
        let value = |case: &str, metric: &str| median(&rows, "kvfabric", case, metric);
        assert_eq!(
            value(&whole, "verified_bytes"),
            f64::from((64 + 4 + 128 + 1) << 10)
        );
        assert_eq!(value(&whole, "pairs"), 4.0);
        for pair in ["a-to-b", "a-to-c", "b-to-c", "c-to-a"] {
            assert!(value(&format!("tcp-{way}-{pair}-16384"), "share_of_alone") > 0.0);
        }
        assert!(
            find(
                &rows,
                "kvfabric",
                &format!("tcp-{way}-b-to-a-16384"),
                "gb_per_s"
            )
            .is_none()
        );
    }
}

/// Each pattern over four targets that the program starts itself.
#[test]
fn patterns_run_among_targets_started_here() {
    for (pattern, pairs) in [
        ("pairwise", 2.0),
        ("many-to-one", 3.0),
        ("one-to-many", 3.0),
        ("all-to-all", 12.0),
    ] {
        let backend = if pattern == "all-to-all" {
            "shm"
        } else {
            "tcp"
        };
        let rows = rows(&format!(
            "transfer mesh --spawn 4 --pattern {pattern} --backend {backend} --total-bytes 128K --iterations 1 --quiet"
        ));
        let case = format!("{backend}-write-{pattern}-65536");
        let value = |metric| median(&rows, "kvfabric", &case, metric);
        assert_eq!(value("pairs"), pairs);
        assert_eq!(value("verified_bytes"), pairs * 131_072.0);
    }
}

/// One of three targets is killed, and then one is stopped, while a long run is under way: the run ends before its time and
/// names it.
#[test]
fn a_target_that_dies_or_stops_is_named() {
    for signal in [Signal::KILL, Signal::STOP] {
        let targets = [0, 1, 2].map(|_| Listening::start(""));
        let peers: Vec<&str> = targets
            .iter()
            .map(|target| target.address.as_str())
            .collect();
        let mut run = bench(&format!(
            "transfer mesh --peers {} --pattern all-to-all --iterations 1000000 --deadline 3 --quiet",
            peers.join(",")
        ))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
        wait_for_sessions(&targets[1]);
        targets[1].signal(signal);
        let status = wait(&mut run);
        assert_eq!(status, Some(1));
        let said = std::io::read_to_string(run.stderr.take().unwrap()).unwrap();
        let named = format!("no answer any more from {}", targets[1].address);
        assert!(said.contains(&named), "{signal:?}: {said}");
        assert!(
            !said.contains(&format!("from {}", targets[0].address)),
            "{said}"
        );
    }
}

/// Until it has threads for the sessions of a run.
fn wait_for_sessions(target: &Listening) {
    let tasks = format!("/proc/{}/task", target.child.id());
    let until = Instant::now() + PATIENCE;
    let is_serving = || {
        let tasks = std::fs::read_dir(&tasks).unwrap().flatten();
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        names.filter(|name| name.trim() == "session").count() >= 4
    };
    while !is_serving() {
        assert!(Instant::now() < until, "nobody came");
        std::thread::yield_now();
    }
}

fn wait(child: &mut Child) -> Option<i32> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(Instant::now() < until, "it does not end");
        std::thread::yield_now();
    }
}

/// Nobody there, somebody who speaks otherwise, somebody who is silent, and a target that gives less memory than it takes: each
/// error names the target.
#[test]
fn targets_that_are_none_are_named() {
    let one = "--backend tcp --operation write --sizes 4K --iterations 1 --quiet";
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let (_, said) = failure(&format!("transfer --to {nobody} {one}"));
    assert!(said.contains(&nobody.to_string()), "{said}");
    let stranger = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = stranger.local_addr().unwrap();
    let speaking = std::thread::spawn(move || {
        let (mut stream, _) = stranger.accept().unwrap();
        stream.write_all(b"220 mail.example ready\n").unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        stranger
    });
    let (_, said) = failure(&format!("transfer --to {address} {one}"));
    assert!(
        said.contains("220 mail") && said.contains(&address.to_string()),
        "{said}"
    );
    let _silent = speaking.join().unwrap();
    let (_, said) = failure(&format!("transfer --to {address} --deadline 1 {one}"));
    assert!(said.contains("does not answer within 1s"), "{said}");
    let small = Listening::start("--session-bytes 1M");
    let (_, said) = failure(&format!("transfer --to {} {one}", small.address));
    assert!(
        said.contains("--total-bytes") && said.contains(&small.address),
        "{said}"
    );
}

/// Two hosts, each a network namespace, and a wire between them; taken down when dropped.
struct Hosts([String; 2]);

impl Hosts {
    /// None, and a loud line, where namespaces cannot be made.
    fn new() -> Option<Self> {
        let name = |role| format!("kvb-{}-{role}", std::process::id());
        let hosts = Self(["a", "b"].map(name));
        let [a, b] = &hosts.0;
        let steps = [
            format!("netns add {a}"),
            format!("netns add {b}"),
            format!("-n {a} link add eth0 type veth peer name eth0 netns {b}"),
            format!("-n {a} addr add 10.78.0.1/24 dev eth0"),
            format!("-n {b} addr add 10.78.0.2/24 dev eth0"),
            format!("-n {a} link set eth0 up"),
            format!("-n {b} link set eth0 up"),
        ];
        for step in steps {
            let output = Command::new("ip").args(step.split(' ')).output();
            let is_done = output.as_ref().is_ok_and(|output| output.status.success());
            if !is_done {
                eprintln!("SKIPPED: network namespaces cannot be made here: ip {step}: {output:?}");
                return None;
            }
        }
        Some(hosts)
    }

    fn on(&self, host: usize, arguments: &str) -> Command {
        let mut command = Command::new("ip");
        command
            .args([
                "netns",
                "exec",
                &self.0[host],
                env!("CARGO_BIN_EXE_kv-bench"),
            ])
            .args(arguments.split_whitespace());
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in &self.0 {
            // It may not have been made.
            let _ = Command::new("ip").args(["netns", "del", host]).output();
        }
    }
}

/// A target on one host and the initiator on another, which reach each other over a wire only: agents and the raw reference
/// listen where the target was reached.
#[test]
fn hosts_are_measured_over_the_wire_between_them() {
    let Some(hosts) = Hosts::new() else { return };
    let mut target = hosts
        .on(0, "transfer target --listen 0.0.0.0:7700 --end-with-input")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let output = target.stdout.as_mut().unwrap();
    BufReader::new(output).read_line(&mut line).unwrap();
    assert_eq!(line, "listening on 0.0.0.0:7700\n");
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("wire.json");
    let options = format!("transfer --to 10.78.0.1:7700 --backend tcp --sizes 4K,64K {TINY}");
    let mut run = hosts.on(1, &options);
    let output = run.arg("--json").arg(&json).output().unwrap();
    drop(target.stdin.take());
    assert_eq!(wait(&mut target), Some(0));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report = read(&json);
    let rows = report["rows"].as_array().unwrap();
    for subject in ["kvfabric", "raw-tcp", "raw-tcp-stream"] {
        assert_eq!(
            median(rows, subject, "tcp-read-65536", "verified_blocks"),
            4.0
        );
    }
}

/// Rivals whose program is missing, or whose package is: they are left out aloud, and ours is measured.
#[test]
fn rivals_that_are_missing_are_left_out_aloud() {
    let options = format!("transfer --backend tcp,shm --operation read --sizes 4K {TINY}");
    for python in ["python3", "/nowhere/python"] {
        let mut command = bench(&options);
        command.args([
            "--nixl",
            "/nowhere",
            "--mooncake",
            "/nowhere",
            "--python",
            python,
        ]);
        let output = command.output().unwrap();
        let said = text(&output.stderr);
        assert!(output.status.success(), "{said}");
        for rival in [
            "shm-read-4096: nixl",
            "tcp-read-4096: nixl-tcp",
            "tcp-read-4096: mooncake",
        ] {
            assert!(said.contains(&format!("{rival} IS LEFT OUT")), "{said}");
        }
        assert!(text(&output.stdout).contains("shm-read-4096"));
    }
}

/// The same figures as values and as a page; then the run beside itself, changed so that it looks better than it can be.
#[test]
fn figures_are_written_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let (json, csv, html) = (place("a.json"), place("a.csv"), place("a.html"));
    let run = |more: &[&str]| -> Output {
        let mut command = bench(&format!("transfer --backend memcpy --sizes 4K..16K {TINY}"));
        command.args(more).output().unwrap()
    };
    let paths = [&json, &csv, &html].map(|path| path.display().to_string());
    let output = run(&["--json", &paths[0], "--csv", &paths[1], "--html", &paths[2]]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report = read(&json);
    let figures = report["rows"].as_array().unwrap().len();
    let lines = std::fs::read_to_string(&csv).unwrap();
    assert_eq!(lines.lines().count(), figures + 1);
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("memcpy-write: gb_per_s") && page.matches("<circle").count() >= 12);
    assert!(!page.contains("<script") && !page.contains("src="));

    let same = run(&["--compare", &paths[0]]);
    assert!(same.status.success() && text(&same.stdout).contains("figures compared"));
    let mut better = report.clone();
    for row in better["rows"].as_array_mut().unwrap() {
        if row["metric"] == "gb_per_s" {
            row["median"] = Value::from(1e9);
        }
    }
    std::fs::write(&json, better.to_string()).unwrap();
    let share = [
        "--compare",
        &paths[0],
        "--worse-by",
        "50",
        "--compare-only",
        "gb_per_s",
    ];
    let worse = run(&share);
    assert_eq!(worse.status.code(), Some(3), "{}", text(&worse.stdout));
    assert_eq!(
        text(&worse.stdout).matches("WORSE").count(),
        6,
        "{}",
        text(&worse.stdout)
    );
    std::fs::write(&json, "{}").unwrap();
    let (status, said) = failure(&format!("transfer --compare {}", paths[0]));
    assert_eq!(status, Some(2));
    assert!(
        said.contains("--compare") && said.contains("a.json"),
        "{said}"
    );
}

/// All goals on tiny transfers: each is told as met or missed, but for those beside rivals that are not there.
#[test]
fn every_goal_is_measured_and_judged() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("goals.json");
    let mut command =
        bench("transfer goals --total-bytes 1M --iterations 1 --latency-samples 20 --quiet");
    let output = command.arg("--json").arg(&json).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    let report = read(&json);
    let rows = report["rows"].as_array().unwrap();
    let judged = rows.iter().filter(|row| row["metric"] == "is_met").count();
    let verdicts = said
        .lines()
        .filter(|line| line.contains(" met ") || line.contains(" MISSED "));
    assert_eq!(verdicts.count(), judged, "{said}");
    assert_eq!(said.matches("not measured: no ").count(), 12, "{said}");
    assert!(said.contains("12 not measured") && judged > 40, "{said}");
    for (case, metric) in [
        ("notification-tcp", "p50_us"),
        ("first-transfer-shm", "first_transfer_ms"),
        ("lists", "prepare_and_create_ms"),
        ("metadata", "of_1000_regions"),
    ] {
        assert!(median(rows, "kvfabric", case, metric) > 0.0);
    }
    assert!(median(rows, "kvfabric", "idle-agent", "cpu_percent") < 50.0);
}

/// Options that make no sense are refused by name, and nothing is measured.
#[test]
fn bad_options_of_transfers_are_refused_by_name() {
    for (arguments, named) in [
        ("transfer --sizes 8K..4K", "8K..4K"),
        ("transfer --threads 0", "--threads"),
        ("transfer --to 127.0.0.1:1 --backend file", "--to"),
        ("transfer --model gpt-7", "gpt-7"),
        ("transfer --model llama-3.1-8b --sizes 4K", "--model"),
        ("transfer --worse-by 5", "--compare"),
        (
            "transfer --html /nowhere/at/all.html",
            "--html /nowhere/at/all.html",
        ),
        ("transfer target --listen nowhere", "--listen"),
        ("transfer mesh", "--peers"),
        ("transfer mesh --peers a=127.0.0.1:1", "--peers"),
        (
            "transfer mesh --peers a=127.0.0.1:1,a=127.0.0.1:2",
            "a is there twice",
        ),
        ("transfer mesh --spawn 2 --backend file", "--backend file"),
        ("transfer mesh --spawn 3", "even"),
        ("transfer mesh --spawn 2 --matrix /nowhere", "/nowhere"),
    ] {
        let (status, said) = failure(arguments);
        assert!(said.contains(named), "{arguments}: {said}");
        assert!(matches!(status, Some(1 | 2)), "{arguments}: {said}");
    }
}

/// The files below a folder.
fn files(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let below = entries.map(|entry| entry.path());
    below
        .flat_map(|path| match path.is_dir() {
            true => files(&path),
            false => vec![path],
        })
        .collect()
}

/// A store that is named is written to, compared with what must be in it, and left as it was.
#[test]
fn objects_of_a_named_store_are_measured_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}/made", folder.path().display());
    let rows = rows(&format!(
        "transfer --backend object --store {url} --sizes 64K {TINY}"
    ));
    for way in ["read", "write"] {
        let case = format!("object-{way}-65536");
        for subject in ["kvfabric", "memcpy"] {
            let verified = median(&rows, subject, &case, "verified_blocks");
            assert_eq!(verified, 4.0, "{subject} {case}");
        }
    }
    assert_eq!(files(folder.path()), Vec::<std::path::PathBuf>::new());
    let (_, said) = failure("transfer --backend object --store ftp://x --sizes 4K --quiet");
    assert!(said.contains("--store") && said.contains("ftp"), "{said}");
}

/// The same over S3, with credentials from the environment.
#[test]
fn objects_of_an_s3_store_are_measured_and_removed() {
    let Some(program) = std::env::var_os("KVFABRIC_S3_SERVER") else {
        eprintln!("SKIPPED: no s3s-fs in KVFABRIC_S3_SERVER, kv-bench over S3 is not tested");
        return;
    };
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("bucket")).unwrap();
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let mut server = Command::new(program)
        .args(["--access-key", "who", "--secret-key", "proof"])
        .args(["--host", "127.0.0.1", "--port", &port.to_string()])
        .arg(root.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < until, "the server does not come up");
        std::thread::yield_now();
    }
    let arguments = "transfer --backend object --store s3://bucket/bench --sizes 64K";
    let run = |more: &str| {
        bench(&format!("{arguments} {more} {TINY}"))
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"))
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", "who")
            .env("AWS_SECRET_ACCESS_KEY", "proof")
            .output()
            .unwrap()
    };
    let (open, refused) = (run("--store-http"), run(""));
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(open.status.success(), "{}", text(&open.stderr));
    let table = text(&open.stdout);
    for way in ["read", "write"] {
        assert!(table.contains(&format!("object-{way}-65536")), "{table}");
    }
    assert!(!refused.status.success(), "plain HTTP was not allowed");
    assert_eq!(
        files(&root.path().join("bucket")),
        Vec::<std::path::PathBuf>::new()
    );
}

/// Without a GPU the reason is all there is, and the same as that of any backend that is not there; with one every block is compared.
#[test]
fn memory_of_a_gpu_is_measured_or_refused_with_the_reason() {
    let (status, said) = failure("transfer --memory cuda --backend cuda,shm");
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("--memory cuda: shm"), "{said}");
    let few = "--sizes 4K --total-bytes 1M --iterations 1 --latency-samples 1";
    if let Err(reason) = kvfabric_transfer::cuda_probe() {
        eprintln!("SKIPPED copies from and to a GPU: {reason}");
        for arguments in ["--memory cuda", "--backend cuda", "--backend cuda-within"] {
            let (status, said) = failure(&format!("transfer {arguments} {few}"));
            assert_eq!(status, Some(1), "{said}");
            assert!(said.contains(reason.context()), "{said}");
        }
        return;
    }
    let rows = rows(&format!("transfer --memory cuda {few}"));
    for case in ["h2d", "d2h", "d2d"].map(|way| format!("cuda-{way}-scattered-4096")) {
        for subject in ["kvfabric", "cu-memcpy-async"] {
            assert_eq!(median(&rows, subject, &case, "verified_blocks"), 256.0);
        }
    }
}
