//! What Google Cloud Storage is asked for. No emulator that could be had speaks the interface that our client uses (ranges, and
//! writes on condition), so the answers are the test's own: this says nothing of the service.

use std::sync::mpsc;

use kvfabric_transfer::{ObjectOptions, ObjectWrite, Operation, Secret};

use super::proxy::{Action, Proxy};
use super::{PATIENCE, build, memory, transfer};

const MISSING: &str = "HTTP/1.1 404 Not Found\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
const TAKEN: &str =
    "HTTP/1.1 200 OK\r\nconnection: close\r\netag: \"1\"\r\ncontent-length: 0\r\n\r\n";
const PART: &str = "HTTP/1.1 206 Partial Content\r\nconnection: close\r\netag: \"1\"\r\n\
     last-modified: Wed, 01 Jan 2025 00:00:00 GMT\r\ncontent-range: bytes 2-4/9\r\n\
     content-length: 3\r\n\r\nabc";

/// Bucket, prefix and key in the path, a token with each request, a write on condition, a range.
#[test]
fn a_bucket_of_google_is_asked_with_token_condition_and_range() {
    // Nothing is passed on.
    let nobody = "127.0.0.1:9".parse().expect("address");
    let proxy = Proxy::new(nobody);
    let (tell, told) = mpsc::channel();
    proxy.rule(move |head| {
        let has = |line| head.has(line);
        let facts = (
            head.line().to_owned(),
            has("authorization: bearer sesame\r\n"),
            has("x-goog-if-generation-match: 0\r\n"),
            has("range: bytes=2-4\r\n"),
        );
        tell.send(facts).expect("the test runs");
        Action::Answer(match head.is("PUT") {
            true => TAKEN,
            false if head.is("GET") => PART,
            false => MISSING,
        })
    });
    let options = ObjectOptions {
        endpoint: Some(format!("http://{}/", proxy.address())),
        session_token: Some(Secret::new("sesame")),
        allow_http: true,
        ..ObjectOptions::default()
    };
    let agent = build("gs://bucket/some/prefix", options).expect("agent");
    let memory = memory(&agent);
    let object = agent
        .object_for("cold", "key", ObjectWrite::Keep)
        .expect("object");
    transfer(&agent, Operation::Write, &memory, &object, &[(0, 0, 9)]).expect("written");
    transfer(&agent, Operation::Read, &memory, &object, &[(5, 2, 3)]).expect("read");
    let mut bytes = [0; 3];
    memory.read_at(5, &mut bytes).expect("read");
    assert_eq!(&bytes, b"abc");
    let seen = || told.recv_timeout(PATIENCE).expect("asked");
    let line = |method| format!("{method} /bucket/some%2Fprefix%2Fkey");
    assert_eq!(seen(), (line("HEAD"), true, false, false));
    assert_eq!(seen(), (line("PUT"), true, true, false));
    assert_eq!(seen(), (line("GET"), true, false, true));
}
