//! A real server behind a network that fails it, and one that dies.

use std::sync::Mutex;
use std::time::Duration;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{
    Agent, MemoryFate, ObjectChecksum, ObjectOptions, Operation, Region, RequestOptions, Side,
};

use super::proxy::{Action, Proxy};
use super::server::{Server, options};
use super::{BYTES, PATIENCE, WHOLE, build, memory, transfer};

const BUSY: &str =
    "HTTP/1.1 503 Slow Down\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";

/// A written object, and memory to read it into.
fn written(agent: &Agent, key: &str) -> (Region, Region) {
    let source = memory(agent);
    source.fill_at(0, BYTES, 9).expect("filled");
    let object = agent.object("cold", key).expect("object");
    transfer(agent, Operation::Write, &source, &object, WHOLE).expect("written");
    (memory(agent), object)
}

fn is_whole(memory: &Region) {
    let mut bytes = vec![0; BYTES as usize];
    memory.read_at(0, &mut bytes).expect("read");
    assert!(bytes.iter().all(|byte| *byte == 9));
}

fn is_absent(agent: &Agent, key: &str) {
    let mut head = agent.object_head("cold", key).expect("accepted");
    assert_eq!(head.wait(PATIENCE).expect("told"), None);
}

/// It asks to be left alone for a second, each time.
#[test]
fn a_busy_server_is_asked_again_when_it_wants_to_be() {
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::new(server.address);
    let mut left = 1;
    proxy.rule(move |head| {
        if head.is("PUT") && left > 0 {
            left -= 1;
            return Action::Answer(BUSY);
        }
        Action::Pass
    });
    let agent = build("s3://bucket/p", options(proxy.address())).expect("agent");
    let (memory, object) = written(&agent, "key");
    let tries = proxy.seen("PUT", "key");
    assert_eq!(tries.len(), 2);
    let pause = tries[1].duration_since(tries[0]);
    assert!(pause >= Duration::from_secs(1), "{pause:?} later");
    transfer(&agent, Operation::Read, &memory, &object, WHOLE).expect("read");
    is_whole(&memory);

    // There is an end to it.
    proxy.rule(|_| Action::Answer("HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\n\r\n"));
    let few = ObjectOptions {
        retries_max: 2,
        ..options(proxy.address())
    };
    let agent = build("s3://bucket/p", few).expect("agent");
    let object = agent.object("cold", "other").expect("object");
    let memory = super::memory(&agent);
    let failed = transfer(&agent, Operation::Write, &memory, &object, WHOLE).expect_err("busy");
    assert_eq!(failed.kind(), ErrorKind::Io, "{failed}");
    assert_eq!(proxy.seen("PUT", "other").len(), 3);
}

/// Bytes come a few at a time: a reader with patience gets them all, one without has his memory back.
#[test]
fn a_slow_server_delays_nobody_beyond_the_deadline() {
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::new(server.address);
    let agent = build("s3://bucket/p", options(proxy.address())).expect("agent");
    let (memory, object) = written(&agent, "slow");
    proxy.rule(|_| Action::Trickle(9_973, Duration::from_millis(2)));
    transfer(&agent, Operation::Read, &memory, &object, WHOLE).expect("in its time");
    is_whole(&memory);
    proxy.rule(|_| Action::Trickle(1, Duration::from_millis(20)));
    let options = RequestOptions {
        deadline: Some(Duration::from_millis(500)),
        ..RequestOptions::default()
    };
    let pair = (memory.descriptor(0, BYTES), object.descriptor(0, BYTES));
    let request = agent.transfer(Operation::Read, &[pair], Side::Local, options);
    let request = request.expect("accepted");
    let failed = request.wait(PATIENCE).expect_err("too slow");
    assert_eq!(failed.kind(), ErrorKind::Timeout, "{failed}");
    assert!(
        request.wait_drained(PATIENCE),
        "a slow server keeps no memory"
    );
}

/// Killed when half of an object has been sent to it.
#[test]
fn a_server_that_dies_in_a_write_has_no_half_of_an_object() {
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::new(server.address);
    let kill = Mutex::new(Some(server.killer()));
    proxy.rule(move |head| {
        let kill = kill
            .lock()
            .expect("killer")
            .take()
            .filter(|_| head.is("PUT"));
        kill.map_or(Action::Pass, |kill| {
            Action::CutRequest(BYTES as usize / 2, kill)
        })
    });
    let agent = build("s3://bucket/p", options(proxy.address())).expect("agent");
    let source = memory(&agent);
    let object = agent.object("cold", "torn").expect("object");
    let failed = transfer(&agent, Operation::Write, &source, &object, WHOLE).expect_err("dead");
    assert_eq!(failed.kind(), ErrorKind::Io, "{failed}");
    assert_eq!(failed.fate(), MemoryFate::Settled);
    let again = server.again();
    proxy.redirect()(again.address);
    is_absent(&agent, "torn");
    let (memory, object) = written(&agent, "torn");
    transfer(&agent, Operation::Read, &memory, &object, WHOLE).expect("read");
    is_whole(&memory);
}

/// Killed when half of an object has come: a server that is there again soon goes on where it was.
#[test]
fn a_server_that_dies_in_a_read_may_come_back() {
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::new(server.address);
    let agent = build("s3://bucket/p", options(proxy.address())).expect("agent");
    let (memory, object) = written(&agent, "half");
    let (kill, redirect) = (server.killer(), proxy.redirect());
    let (tell, told) = std::sync::mpsc::channel();
    let start = {
        let again = std::sync::Arc::new(server);
        move || {
            kill();
            let next = again.again();
            redirect(next.address);
            tell.send(next).expect("the test runs");
        }
    };
    let start = Mutex::new(Some(start));
    proxy.rule(move |_| match start.lock().expect("once").take() {
        Some(start) => Action::CutAnswer(BYTES as usize / 2, Box::new(start)),
        None => Action::Pass,
    });
    transfer(&agent, Operation::Read, &memory, &object, WHOLE).expect("gone on with");
    is_whole(&memory);
    assert_eq!(proxy.seen("GET", "half").len(), 2);

    let next = told.recv_timeout(PATIENCE).expect("started");
    let kill = Mutex::new(Some(next.killer()));
    proxy.rule(move |_| match kill.lock().expect("killer").take() {
        Some(kill) => Action::CutAnswer(BYTES as usize / 2, kill),
        None => Action::Pass,
    });
    let failed = transfer(&agent, Operation::Read, &memory, &object, WHOLE).expect_err("dead");
    assert_eq!(failed.kind(), ErrorKind::Io, "{failed}");
    assert_eq!(failed.fate(), MemoryFate::Settled);
}

/// The store is told what is to arrive.
#[test]
fn a_byte_changed_on_the_way_is_refused_by_the_store() {
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::new(server.address);
    for checksum in [
        ObjectChecksum::Off,
        ObjectChecksum::Sha256,
        ObjectChecksum::Crc64Nvme,
    ] {
        let checked = ObjectOptions {
            checksum,
            ..options(proxy.address())
        };
        let agent = build("s3://bucket/p", checked).expect("agent");
        let header = match checksum {
            ObjectChecksum::Off => "x-amz-content-sha256: ",
            ObjectChecksum::Sha256 => "x-amz-checksum-sha256: ",
            ObjectChecksum::Crc64Nvme => "x-amz-checksum-crc64nvme: ",
        };
        let (tell, told) = std::sync::mpsc::channel();
        proxy.rule(move |head| match head.is("PUT") {
            true => {
                tell.send(head.has(header)).expect("the test runs");
                Action::Damage
            }
            false => Action::Pass,
        });
        let source = memory(&agent);
        let object = agent.object("cold", "damaged").expect("object");
        transfer(&agent, Operation::Write, &source, &object, WHOLE).expect_err("refused");
        assert!(told.recv_timeout(PATIENCE).expect("seen"), "{header}");
        proxy.rule(|_| Action::Pass);
        let (memory, object) = written(&agent, "sound");
        transfer(&agent, Operation::Read, &memory, &object, WHOLE).expect("read");
        is_whole(&memory);
    }
}

/// A store of one's own, whose authority the system does not know.
#[test]
fn a_private_authority_is_believed_when_it_is_named() {
    let Some(server) = Server::start() else {
        return;
    };
    let proxy = Proxy::with_tls(server.address);
    let port = proxy.address().port();
    let tls = |host: &str, authorities: Option<&str>| {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls");
        ObjectOptions {
            endpoint: Some(format!("https://{host}:{port}")),
            authorities: authorities.map(|name| folder.join(name)),
            allow_http: false,
            retries_max: 0,
            ..options(proxy.address())
        }
    };
    let agent = build("s3://bucket/p", tls("localhost", Some("store-ca.pem"))).expect("agent");
    let (memory, object) = written(&agent, "secret");
    transfer(&agent, Operation::Read, &memory, &object, WHOLE).expect("read");
    is_whole(&memory);
    for (host, authorities) in [
        ("localhost", None),
        ("localhost", Some("other-ca.pem")),
        // Not a name of the certificate.
        ("127.0.0.1", Some("store-ca.pem")),
    ] {
        let seen = proxy.seen("", "").len();
        // Where the system trusts nobody, that is said at once.
        let Ok(agent) = build("s3://bucket/p", tls(host, authorities)) else {
            continue;
        };
        let memory = super::memory(&agent);
        let object = agent.object("cold", "secret").expect("object");
        let failed = transfer(&agent, Operation::Read, &memory, &object, WHOLE);
        let failed = failed.expect_err("not to be believed");
        assert_eq!(failed.kind(), ErrorKind::Io, "{failed}");
        assert_eq!(proxy.seen("", "").len(), seen, "nothing was asked of it");
    }
    // A key is no certificate.
    let none = build("s3://bucket/p", tls("localhost", Some("store.key")));
    assert_eq!(none.expect_err("no PEM of use").kind(), ErrorKind::Invalid);
}
