//! Large objects go in parts, and those that are there are not written again.

use kvcache_core::ErrorKind;
use kvfabric_transfer::{Agent, ObjectOptions, ObjectWrite, Operation, Region};

use super::proxy::{Action, Proxy};
use super::server::{Server, options};
use super::{BYTES, PATIENCE, WHOLE, build, memory, memory_of, post, transfer};

const MIB: u64 = 1 << 20;
/// Three parts, the last one smaller.
const LARGE: u64 = 12 * MIB + 5;
const ALL: &[(u64, u64, u64)] = &[(0, 0, LARGE)];

fn in_parts(options: ObjectOptions) -> ObjectOptions {
    ObjectOptions {
        part_bytes: 5 * MIB,
        parts_in_flight_max: 2,
        ..options
    }
}

/// Memory in which each MiB differs from the others.
fn striped(agent: &Agent) -> Region {
    let memory = memory_of(agent, LARGE);
    for stripe in 0..=12 {
        let len = MIB.min(LARGE - stripe * MIB);
        memory
            .fill_at(stripe * MIB, len, stripe as u8 + 1)
            .expect("filled");
    }
    memory
}

fn is_striped(memory: &Region) {
    for stripe in 0..=12 {
        let len = MIB.min(LARGE - stripe * MIB);
        let mut bytes = vec![0; len as usize];
        memory.read_at(stripe * MIB, &mut bytes).expect("read");
        assert!(
            bytes.iter().all(|byte| *byte == stripe as u8 + 1),
            "stripe {stripe}"
        );
    }
}

/// What was written comes back, whole and in ranges that cross parts.
fn a_large_object_survives(agent: &Agent) {
    let memory = striped(agent);
    let object = agent.object("cold", "large").expect("object");
    transfer(agent, Operation::Write, &memory, &object, ALL).expect("written");
    let back = memory_of(agent, LARGE);
    transfer(agent, Operation::Read, &back, &object, ALL).expect("read");
    is_striped(&back);
    let other = memory_of(agent, LARGE);
    let ranges = [
        (0, 0, MIB),
        (4 * MIB, 4 * MIB, 7 * MIB),
        (MIB, MIB, 3 * MIB),
        (11 * MIB, 11 * MIB, LARGE - 11 * MIB),
    ];
    transfer(agent, Operation::Read, &other, &object, &ranges).expect("read in ranges");
    is_striped(&other);
}

/// With one request at a time parts must not wait for each other.
#[test]
fn a_large_object_goes_in_parts_with_one_request_at_a_time() {
    let directory = tempfile::tempdir().expect("directory");
    let url = format!("file://{}", directory.path().display());
    let one = |options| ObjectOptions {
        concurrency_max: 1,
        ..in_parts(options)
    };
    a_large_object_survives(&build(&url, one(ObjectOptions::default())).expect("agent"));
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::new(server.address);
    let agent = build("s3://bucket/p", one(options(proxy.address()))).expect("agent");
    a_large_object_survives(&agent);
    assert_eq!(proxy.seen("PUT", "partNumber=").len(), 3);
    assert!(
        proxy.seen("GET", "large").len() >= 3,
        "a range for each part"
    );
    assert_eq!(server.parts(), 0, "nothing is left of the upload");
}

/// The connection ends within the second part, with nobody who tries again; then a caller gives up.
#[test]
fn a_cut_upload_leaves_neither_an_object_nor_parts() {
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::new(server.address);
    let fragile = ObjectOptions {
        retries_max: 0,
        // Another part that is on its way may arrive when the upload has been taken back.
        parts_in_flight_max: 1,
        ..in_parts(options(proxy.address()))
    };
    let agent = build("s3://bucket/p", fragile).expect("agent");
    let memory = striped(&agent);
    let object = agent.object("cold", "cut").expect("object");
    let gone = |taken_back| {
        let until = std::time::Instant::now() + PATIENCE;
        while proxy.seen("DELETE", "uploadId=").len() < taken_back || server.parts() > 0 {
            assert!(std::time::Instant::now() < until, "parts are left");
            std::thread::yield_now();
        }
        let mut head = agent.object_head("cold", "cut").expect("accepted");
        assert_eq!(head.wait(PATIENCE).expect("told"), None);
    };
    proxy.rule(|head| match head.is("PUT") && head.asks("partNumber=2") {
        true => Action::CutRequest(MIB as usize, Box::new(|| ())),
        false => Action::Pass,
    });
    let failed = transfer(&agent, Operation::Write, &memory, &object, ALL).expect_err("cut");
    assert_eq!(failed.kind(), ErrorKind::Io, "{failed}");
    gone(1);

    let (tell, told) = std::sync::mpsc::channel();
    let (_hold, held) = std::sync::mpsc::channel::<()>();
    let mut held = Some(held);
    proxy.rule(move |head| {
        let second = head.is("PUT") && head.asks("partNumber=2");
        let Some(held) = second.then(|| held.take()).flatten() else {
            return Action::Pass;
        };
        let tell = tell.clone();
        let wait = move || {
            tell.send(()).expect("the test runs");
            // Ends with the test.
            let _ = held.recv();
        };
        Action::CutRequest(MIB as usize, Box::new(wait))
    });
    let request = post(&agent, Operation::Write, &memory, &object, ALL);
    told.recv_timeout(PATIENCE)
        .expect("the second part is under way");
    request.cancel();
    let failed = request.wait(PATIENCE).expect_err("cancelled");
    assert_eq!(failed.kind(), ErrorKind::Cancelled, "{failed}");
    assert!(request.wait_drained(PATIENCE));
    gone(2);
}

/// The object of the first writer stays where the second one has the same to say, and no bytes are sent for that.
#[test]
fn what_is_there_is_not_written_again() {
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::new(server.address);
    let agent = build("s3://bucket/p", in_parts(options(proxy.address()))).expect("agent");
    for (key, bytes) in [("small", BYTES), ("large", LARGE)] {
        let memory = memory_of(&agent, LARGE);
        let keep = agent
            .object_for("cold", key, ObjectWrite::Keep)
            .expect("object");
        let first = |memory: &Region| {
            let mut byte = [0];
            let read = transfer(&agent, Operation::Read, memory, &keep, &[(0, 0, 1)]);
            read.expect("read");
            memory.read_at(0, &mut byte).expect("read");
            byte[0]
        };
        let write = |bytes| {
            let ranges = [(0, 0, bytes)];
            transfer(&agent, Operation::Write, &memory, &keep, &ranges).expect("written");
        };
        memory.fill_at(0, LARGE, 1).expect("filled");
        write(bytes);
        let sent = proxy.seen("PUT", key).len();
        memory.fill_at(0, LARGE, 2).expect("filled");
        write(bytes);
        assert_eq!(
            proxy.seen("PUT", key).len(),
            sent,
            "nothing is sent for {key}"
        );
        assert_eq!(first(&memory), 1);
        // One of another length cannot be the same.
        memory.fill_at(0, LARGE, 3).expect("filled");
        write(bytes - 1);
        assert_eq!(first(&memory), 3);
    }
}

/// Another writes between our look and our write.
#[test]
fn the_faster_of_two_writers_stays() {
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::new(server.address);
    let slow = build("s3://bucket/p", options(proxy.address())).expect("agent");
    let fast = build("s3://bucket/p", options(server.address)).expect("agent");
    for (key, write) in [("keep", ObjectWrite::Keep), ("create", ObjectWrite::Create)] {
        let faster = memory(&fast);
        faster.fill_at(0, BYTES, 7).expect("filled");
        let (other, object) = (fast.clone(), fast.object("cold", key).expect("object"));
        let mut once = true;
        proxy.rule(move |head| {
            if std::mem::take(&mut once) && head.is("PUT") {
                transfer(&other, Operation::Write, &faster, &object, WHOLE).expect("faster");
            } else if head.is("HEAD") {
                once = true;
            }
            Action::Pass
        });
        let memory = memory(&slow);
        let object = slow.object_for("cold", key, write).expect("object");
        let written = transfer(&slow, Operation::Write, &memory, &object, WHOLE);
        match write {
            ObjectWrite::Keep => written.expect("the same is there"),
            _ => assert_eq!(written.expect_err("there").kind(), ErrorKind::Denied),
        }
        transfer(&slow, Operation::Read, &memory, &object, WHOLE).expect("read");
        let mut byte = [0];
        memory.read_at(BYTES - 1, &mut byte).expect("read");
        assert_eq!(byte, [7], "{key}");
    }
}

/// Some stores answer a condition with "not implemented".
#[test]
fn a_store_without_conditional_writes_is_written_to_and_says_so_where_it_matters() {
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::new(server.address);
    proxy.rule(|head| match head.has("if-none-match: *") {
        true => Action::Answer(
            "HTTP/1.1 501 Not Implemented\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        ),
        false => Action::Pass,
    });
    let agent = build("s3://bucket/p", options(proxy.address())).expect("agent");
    let memory = memory(&agent);
    for key in ["first", "second"] {
        let object = agent
            .object_for("cold", key, ObjectWrite::Keep)
            .expect("object");
        transfer(&agent, Operation::Write, &memory, &object, WHOLE).expect("written");
        transfer(&agent, Operation::Read, &memory, &object, WHOLE).expect("read");
    }
    assert_eq!(
        proxy.seen("PUT", "first").len(),
        2,
        "with a condition, without"
    );
    assert_eq!(proxy.seen("PUT", "second").len(), 1, "it is known by now");
    let object = agent
        .object_for("cold", "third", ObjectWrite::Create)
        .expect("object");
    let failed = transfer(&agent, Operation::Write, &memory, &object, WHOLE);
    let failed = failed.expect_err("cannot be promised");
    assert_eq!(failed.kind(), ErrorKind::Unsupported, "{failed}");
}

/// Two ranges of one object must not come from two objects.
#[test]
fn an_object_that_is_replaced_while_it_is_read_is_not_believed() {
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::new(server.address);
    let agent = build("s3://bucket/p", in_parts(options(proxy.address()))).expect("agent");
    let other = build("s3://bucket/p", options(server.address)).expect("agent");
    let memory = striped(&agent);
    let object = agent.object("cold", "changing").expect("object");
    transfer(&agent, Operation::Write, &memory, &object, ALL).expect("written");
    let replacement = memory_of(&other, LARGE);
    let target = other.object("cold", "changing").expect("object");
    let mut reads = 0;
    proxy.rule(move |head| {
        reads += u8::from(head.is("GET"));
        if reads == 2 {
            transfer(&other, Operation::Write, &replacement, &target, ALL).expect("replaced");
            reads += 1;
        }
        Action::Pass
    });
    let failed = transfer(&agent, Operation::Read, &memory, &object, ALL).expect_err("torn");
    assert_eq!(failed.kind(), ErrorKind::Corrupt, "{failed}");
    assert!(failed.to_string().contains("replaced"), "{failed}");
}
