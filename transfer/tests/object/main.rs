//! Object stores by the public interface: a local directory always, a real S3 server where there is one.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "what tests share fails like a test"
)]

mod azure;
mod failing;
mod gcs;
mod parts;
mod proxy;
mod server;

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use kvcache_core::{Error, ErrorKind};
use kvfabric_transfer::backend::conformance::{ObjectFixture, run};
use kvfabric_transfer::{
    Agent, HostMemory, MemoryFate, ObjectInfo, ObjectOptions, ObjectWrite, Operation, Region,
    RegionOptions, Request, RequestOptions, Secret, Side, TransferError,
};
use server::{Server, options};

/// Far beyond what a loaded machine needs.
const PATIENCE: Duration = Duration::from_secs(60);
const ACCESS_KEY: &str = "AKIAKVFABRICTEST";
const SECRET_KEY: &str = "very-secret-kvfabric-key";
const BYTES: u64 = 100_000;

fn build(url: &str, options: ObjectOptions) -> kvcache_core::Result<Agent> {
    Agent::builder("object-test")
        .memcpy(false)
        .shm(false)
        .object_store("cold", url, options)
        .build()
}

fn local(directory: &Path) -> Agent {
    let url = format!("file://{}", directory.display());
    build(&url, ObjectOptions::default()).expect("agent")
}

fn memory(agent: &Agent) -> Region {
    memory_of(agent, BYTES)
}

fn memory_of(agent: &Agent, bytes: u64) -> Region {
    let memory = HostMemory::anonymous(bytes).expect("memory");
    agent
        .register(memory, RegionOptions::default())
        .expect("region")
}

fn post(
    agent: &Agent,
    operation: Operation,
    memory: &Region,
    object: &Region,
    ranges: &[(u64, u64, u64)],
) -> Request {
    let pairs: Vec<_> = ranges
        .iter()
        .map(|(at, offset, len)| {
            (
                memory.descriptor(*at, *len),
                object.descriptor(*offset, *len),
            )
        })
        .collect();
    agent
        .transfer(operation, &pairs, Side::Local, RequestOptions::default())
        .expect("accepted")
}

fn transfer(
    agent: &Agent,
    operation: Operation,
    memory: &Region,
    object: &Region,
    ranges: &[(u64, u64, u64)],
) -> Result<(), TransferError> {
    post(agent, operation, memory, object, ranges)
        .wait(PATIENCE)
        .map(drop)
}

const WHOLE: &[(u64, u64, u64)] = &[(0, 0, BYTES)];

/// What S3 accepts and a file system must not be fooled by.
#[test]
fn bad_names_are_refused_with_the_name() {
    let directory = tempfile::tempdir().expect("directory");
    let agent = local(directory.path());
    for key in [
        "",
        "/a",
        "a//b",
        "../a",
        "a/../../b",
        "a/.",
        &"x".repeat(1025),
    ] {
        let error = agent.object("cold", key).expect_err(key);
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(&format!("{key:?}")), "{error}");
    }
    let error = agent.object("warm", "a").expect_err("no such store");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("\"warm\""), "{error}");
}

/// Everything that can be wrong with a store's settings is an error of the builder.
#[test]
fn bad_stores_are_refused_when_the_agent_is_built() {
    let refused = |url: &str, options: ObjectOptions| -> Error {
        let error = build(url, options).expect_err(url);
        assert!(error.to_string().contains("\"cold\""), "{error}");
        error
    };
    let plain = ObjectOptions::default;
    assert_eq!(refused("no url", plain()).kind(), ErrorKind::Invalid);
    assert_eq!(
        refused("gopher://x/y", plain()).kind(),
        ErrorKind::Unsupported
    );
    assert_eq!(refused("s3:///prefix", plain()).kind(), ErrorKind::Invalid);
    assert_eq!(refused("file://host/x", plain()).kind(), ErrorKind::Invalid);
    assert_eq!(refused("file:///dev/null/x", plain()).kind(), ErrorKind::Io);
    let none = ObjectOptions {
        concurrency_max: 0,
        ..plain()
    };
    assert_eq!(refused("file:///tmp", none).kind(), ErrorKind::Invalid);
    let small = ObjectOptions {
        part_bytes: 5 << 19,
        ..plain()
    };
    assert_eq!(refused("file:///tmp", small).kind(), ErrorKind::Invalid);
    let nobody = ObjectOptions {
        authorities: Some("/nowhere/ca.pem".into()),
        ..plain()
    };
    let error = refused("gs://bucket", nobody);
    assert!(error.to_string().contains("/nowhere/ca.pem"), "{error}");
    assert_eq!(refused("az:///prefix", plain()).kind(), ErrorKind::Invalid);
    let leaky = refused("s3://user:hunter2@bucket/x", plain());
    assert!(!leaky.to_string().contains("hunter2"), "{leaky}");
    let directory = tempfile::tempdir().expect("directory");
    let url = format!("file://{}", directory.path().display());
    let twice = Agent::builder("twice")
        .object_store("cold", &url, plain())
        .object_store("cold", &url, plain())
        .build();
    assert_eq!(twice.expect_err("one name").kind(), ErrorKind::Invalid);
}

/// Ranges that leave a gap, overlap or do not start at the front.
#[test]
fn an_object_is_written_whole() {
    let directory = tempfile::tempdir().expect("directory");
    let agent = local(directory.path());
    let memory = memory(&agent);
    let object = agent.object("cold", "whole").expect("object");
    for ranges in [
        &[(0, 1, 10)][..],
        &[(0, 0, 10), (10, 11, 10)],
        &[(0, 0, 10), (10, 9, 10)],
        &[(0, 0, 10), (10, 0, 10)],
    ] {
        let failed =
            transfer(&agent, Operation::Write, &memory, &object, ranges).expect_err("not whole");
        assert_eq!(failed.kind(), ErrorKind::Invalid, "{failed}");
        assert!(
            failed
                .to_string()
                .contains("write whole in object store \"cold\""),
            "{failed}"
        );
    }
    let mut head = agent.object_head("cold", "whole").expect("accepted");
    assert_eq!(
        head.wait(PATIENCE).expect("told"),
        None,
        "nothing was written"
    );
}

/// A name without an object.
#[test]
fn reading_what_is_not_there_names_store_and_key() {
    let directory = tempfile::tempdir().expect("directory");
    let agent = local(directory.path());
    let memory = memory(&agent);
    let object = agent.object("cold", "some/key").expect("object");
    let failed = transfer(&agent, Operation::Read, &memory, &object, WHOLE).expect_err("missing");
    assert_eq!(failed.kind(), ErrorKind::NotFound);
    assert_eq!(failed.fate(), MemoryFate::Settled);
    let text = failed.to_string();
    assert!(
        text.contains("read some/key in object store \"cold\""),
        "{text}"
    );
}

/// The first writer wins where asked for.
fn create_keeps_the_first_object(agent: &Agent) {
    let memory = memory(agent);
    let object = agent
        .object_for("cold", "created", ObjectWrite::Create)
        .expect("object");
    memory.fill_at(0, BYTES, 1).expect("filled");
    transfer(agent, Operation::Write, &memory, &object, WHOLE).expect("created");
    memory.fill_at(0, BYTES, 2).expect("filled");
    let failed =
        transfer(agent, Operation::Write, &memory, &object, WHOLE).expect_err("exists already");
    assert_eq!(failed.kind(), ErrorKind::Denied, "{failed}");
    transfer(agent, Operation::Read, &memory, &object, WHOLE).expect("read");
    let mut last = [0];
    memory.read_at(BYTES - 1, &mut last).expect("read");
    assert_eq!(last, [1]);
}

/// Head, delete and list agree about what is there.
fn names_come_and_go(agent: &Agent) {
    let memory = memory(agent);
    let keys: Vec<String> = (0..7)
        .map(|number| format!("list/{}/{number}", number % 2))
        .collect();
    for (key, bytes) in keys.iter().zip(10..) {
        let object = agent.object("cold", key).expect("object");
        transfer(agent, Operation::Write, &memory, &object, &[(0, 0, bytes)]).expect("written");
    }
    let listed = |prefix: &str| {
        let mut listing = agent.object_list("cold", prefix).expect("listing");
        let mut found = Vec::new();
        loop {
            let page = listing
                .next_page(2)
                .expect("accepted")
                .wait(PATIENCE)
                .expect("page");
            assert!(page.len() <= 2);
            if page.is_empty() {
                found.sort_by(|a: &ObjectInfo, b| a.key.cmp(&b.key));
                return found;
            }
            found.extend(page);
        }
    };
    let found = listed("list");
    assert_eq!(found.len(), 7);
    assert_eq!(
        found[0],
        ObjectInfo {
            key: "list/0/0".to_owned(),
            bytes: 10
        }
    );
    assert_eq!(listed("list/1/").len(), 3);
    assert_eq!(listed("lis").len(), 0, "a prefix is whole parts");
    for _ in 0..2 {
        let mut gone = agent.object_delete("cold", "list/0/0").expect("accepted");
        gone.wait(PATIENCE)
            .expect("deleting what is not there is fine");
    }
    let head = |key| {
        agent
            .object_head("cold", key)
            .expect("accepted")
            .wait(PATIENCE)
    };
    assert_eq!(head("list/0/0").expect("told"), None);
    assert_eq!(
        head("list/1/1").expect("told").map(|info| info.bytes),
        Some(11)
    );
    assert_eq!(listed("list").len(), 6);
}

/// The local directory's half of [`create_keeps_the_first_object`] and [`names_come_and_go`].
#[test]
fn a_directory_creates_lists_and_deletes() {
    let directory = tempfile::tempdir().expect("directory");
    let agent = local(&directory.path().join("made/when/missing"));
    create_keeps_the_first_object(&agent);
    names_come_and_go(&agent);
    let mut listing = agent.object_list("cold", "").expect("listing");
    assert_eq!(
        listing.next_page(0).expect_err("none a page").kind(),
        ErrorKind::Invalid
    );
}

fn without_secrets(text: &str) {
    assert!(!text.contains(SECRET_KEY), "{text}");
    assert!(!text.contains(ACCESS_KEY), "{text}");
}

/// Nobody listens there.
#[test]
fn an_absent_server_is_an_error_without_secrets() {
    let address = {
        let listener = TcpListener::bind("127.0.0.1:0").expect("port");
        listener.local_addr().expect("address")
    };
    let to_nobody = options(address);
    without_secrets(&format!("{to_nobody:?}").replace(ACCESS_KEY, ""));
    let agent = build("s3://bucket/prefix", to_nobody).expect("agent");
    let memory = memory(&agent);
    let object = agent.object("cold", "key").expect("object");
    for operation in [Operation::Write, Operation::Read] {
        let failed = transfer(&agent, operation, &memory, &object, WHOLE).expect_err("absent");
        assert_eq!(failed.kind(), ErrorKind::Io, "{failed}");
        assert!(
            failed.to_string().contains("key in object store \"cold\""),
            "{failed}"
        );
        without_secrets(&failed.to_string());
    }
}

/// The server takes the connection and says nothing.
#[test]
fn a_silent_server_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("port");
    let address = listener.local_addr().expect("address");
    let agent = build("s3://bucket/prefix", options(address)).expect("agent");
    let memory = memory(&agent);
    let object = agent.object("cold", "key").expect("object");
    let request = post(&agent, Operation::Read, &memory, &object, WHOLE);
    // The connection shows that the request is under way.
    let (_connection, _) = listener.accept().expect("connected");
    request.cancel();
    let failed = request.wait(PATIENCE).expect_err("cancelled");
    assert_eq!(failed.kind(), ErrorKind::Cancelled);
    assert!(
        request.wait_drained(PATIENCE),
        "a silent server keeps no memory"
    );
    let quick = ObjectOptions {
        attempt_timeout: Duration::from_millis(50),
        retries_max: 0,
        ..options(address)
    };
    let impatient = build("s3://bucket/prefix", quick).expect("agent");
    let mut head = impatient.object_head("cold", "key").expect("accepted");
    let error = head.wait(PATIENCE).expect_err("silent");
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
}

/// Plain HTTP has to be asked for.
#[test]
fn http_is_refused_unless_allowed() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("port");
    let address = listener.local_addr().expect("address");
    let secure = ObjectOptions {
        allow_http: false,
        ..options(address)
    };
    match build("s3://bucket/prefix", secure) {
        // A system without certificates refuses here already.
        Err(error) => assert_eq!(error.kind(), ErrorKind::Invalid, "{error}"),
        Ok(agent) => {
            let mut head = agent.object_head("cold", "key").expect("accepted");
            let error = head.wait(PATIENCE).expect_err("not HTTPS");
            without_secrets(&error.to_string());
            listener.set_nonblocking(true).expect("socket");
            assert!(listener.accept().is_err(), "nothing was sent in the clear");
        }
    }
}

/// The whole suite and everything else, against a real server.
#[test]
fn s3_conforms() {
    let Some(server) = Server::start() else {
        return;
    };
    let agent = build("s3://bucket/some/prefix", options(server.address)).expect("agent");
    create_keeps_the_first_object(&agent);
    names_come_and_go(&agent);
    let report = run(&ObjectFixture::new(agent, "cold")).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(report.passed.len(), 11);
}

/// The right key with the wrong secret.
#[test]
fn a_wrong_secret_is_denied_and_not_shown() {
    let Some(server) = Server::start() else {
        return;
    };
    let wrong = "another-secret-of-ours";
    let with_wrong = ObjectOptions {
        secret_key: Some(Secret::new(wrong)),
        ..options(server.address)
    };
    let agent = build("s3://bucket/prefix", with_wrong).expect("agent");
    let memory = memory(&agent);
    let object = agent.object("cold", "key").expect("object");
    let failed = transfer(&agent, Operation::Write, &memory, &object, WHOLE).expect_err("denied");
    assert_eq!(failed.kind(), ErrorKind::Denied, "{failed}");
    assert!(!failed.to_string().contains(wrong), "{failed}");
    without_secrets(&failed.to_string());
}
