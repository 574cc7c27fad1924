//! Peers of a publisher that mean harm, or are only slow, over real sockets.

use std::time::Duration;

use kvcache_core::PodName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use zeromq::{Socket, SocketRecv, SubSocket};

use super::*;

/// Only bounds a failing test; no test measures time.
const PATIENCE: Duration = Duration::from_secs(60);

fn publisher(bytes_max: usize) -> Publisher {
    let mut config = PublisherConfig::new(PodName::new("pod-0").unwrap(), "m", Stream::Engine);
    (config.replay_bytes_max, config.queue_bytes_max) = (64 << 20, bytes_max);
    Publisher::bind(config).unwrap()
}

fn handshake(socket: &str) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    (bytes[0], bytes[9], bytes[10], bytes[11]) = (0xff, 0x7f, 3, 1);
    bytes[12..16].copy_from_slice(b"NULL");
    let mut ready = b"\x05READY\x0bSocket-Type".to_vec();
    ready.extend((socket.len() as u32).to_be_bytes());
    ready.extend(socket.bytes());
    bytes.extend([4, ready.len() as u8]);
    bytes.extend(ready);
    bytes
}

fn frame(flags: u8, body: &[u8]) -> Vec<u8> {
    [&[flags, body.len() as u8], body].concat()
}

/// Connects and sends these bytes.
async fn peer(endpoint: &str, sent: &[u8]) -> TcpStream {
    let address = endpoint.strip_prefix("tcp://").unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(sent).await.unwrap();
    stream
}

/// Reads until the publisher closes the connection; how many bytes came.
async fn closed(mut stream: TcpStream) -> usize {
    let mut sink = vec![0; 1 << 16];
    let mut came = 0;
    let reading = async {
        // A reset is an end as well: what was sent last was not read.
        while let Ok(read @ 1..) = stream.read(&mut sink).await {
            came += read;
        }
    };
    let ended = timeout(PATIENCE, reading).await;
    ended.expect("the publisher did not close the connection");
    came
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

/// Each peer breaks one rule, at both sockets: it is disconnected, no room is made for what it announced, and a subscriber
/// and a requester that keep the rules are served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_reader_sends_is_refused_at_once() {
    let publisher = publisher(1 << 20);
    let announced = |flags: u8, length: u64| [&[flags][..], &length.to_be_bytes()].concat();
    let before = resident_bytes();
    for (endpoint, socket) in [
        (publisher.endpoint(), "SUB"),
        (publisher.replay_endpoint(), "DEALER"),
    ] {
        let shaken = handshake(socket);
        let wrong = [
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            handshake("PULL"),
            [&shaken[..], &announced(2, 1 << 40)].concat(),
            [&shaken[..], &announced(3, u64::MAX)].concat(),
            [&shaken[..], &announced(2, 1 << 32)].concat(),
            [&shaken[..], &[1, 0].repeat(1000)].concat(),
            [&shaken[..], &[0x40, 0]].concat(),
        ];
        for sent in wrong {
            closed(peer(endpoint, &sent).await).await;
        }
    }
    // A gigabyte would be one of the announced frames.
    assert!(resident_bytes() < before + (256 << 20));

    let mut subscriber = SubSocket::new();
    subscriber.subscribe("kv@").await.unwrap();
    subscriber.connect(publisher.endpoint()).await.unwrap();
    let serving = async {
        loop {
            publisher.publish_payload(vec![1]);
            let wait = Duration::from_millis(20);
            if timeout(wait, subscriber.recv()).await.is_ok() {
                return;
            }
        }
    };
    timeout(PATIENCE, serving).await.unwrap();
}

/// One subscriber reads everything, another nothing: the second is disconnected, and the first misses no batch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_that_stops_costs_the_others_nothing() {
    let publisher = publisher(1 << 20);
    let mut subscriber = SubSocket::new();
    subscriber.subscribe("kv@").await.unwrap();
    subscriber.connect(publisher.endpoint()).await.unwrap();
    let shaken = handshake("SUB");
    let subscribed = [&shaken[..], &frame(4, b"\x09SUBSCRIBEkv@")].concat();
    let stopped = peer(publisher.endpoint(), &subscribed).await;
    let disconnects = publisher.shared.disconnected.subscribe();
    let mut seen: Option<u64> = None;
    let reading = async {
        while *disconnects.borrow() == 0 {
            publisher.publish_payload(vec![1; 64 << 10]);
            let wait = match seen {
                None => Duration::from_millis(20),
                Some(_) => PATIENCE,
            };
            let Ok(message) = timeout(wait, subscriber.recv()).await else {
                assert_eq!(seen, None, "a batch did not come");
                continue;
            };
            let frames = message.unwrap().into_vec();
            let number = u64::from_be_bytes(frames[1].as_ref().try_into().unwrap());
            assert!(
                seen.is_none_or(|seen| number == seen + 1),
                "{seen:?}, then {number}"
            );
            seen = Some(number);
        }
    };
    timeout(PATIENCE, reading).await.unwrap();
    assert_eq!(publisher.stats().disconnects, 1);
    drop(stopped);
}

/// One message more than a peer may have unanswered, in one piece.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_only_asks_is_disconnected() {
    let publisher = publisher(1 << 20);
    for _ in 0..100 {
        publisher.publish_payload(vec![1; 1 << 20]);
    }
    let request = [frame(1, b""), frame(0, &0_u64.to_be_bytes())].concat();
    let sent = [&handshake("DEALER")[..], &request.repeat(40)].concat();
    let came = closed(peer(publisher.replay_endpoint(), &sent).await).await;
    // Not even the first answer, which is 64 MiB long, was sent to the end.
    assert!(came < 32 << 20, "{came} bytes came");
}

/// Several stopped requesters do not keep another one from its answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requesters_that_stop_keep_nobody_from_an_answer() {
    let publisher = publisher(1 << 20);
    for _ in 0..60 {
        publisher.publish_payload(vec![1; 1 << 20]);
    }
    let ask = |start: u64| {
        let request = [frame(1, b""), frame(0, &start.to_be_bytes())].concat();
        [&handshake("DEALER")[..], &request].concat()
    };
    let mut stopped = Vec::new();
    for _ in 0..8 {
        stopped.push(peer(publisher.replay_endpoint(), &ask(0)).await);
    }
    let mut honest = peer(publisher.replay_endpoint(), &ask(59)).await;
    let mut came = Vec::new();
    let reading = async {
        while !came.ends_with(&[0xff, 0xff, 0xff, 0xff, 0, 0]) {
            let mut some = vec![0; 1 << 16];
            let read = honest.read(&mut some).await.unwrap();
            assert!(read > 0, "disconnected");
            came.extend_from_slice(&some[..read]);
        }
    };
    timeout(PATIENCE, reading).await.unwrap();
    assert!(came.len() > 1 << 20);
}
