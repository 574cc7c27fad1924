use std::time::Duration;

use kvcache_core::{Error, ErrorKind};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::decode::{Decoder, Received, property};
use super::*;

/// Only bounds a failing test; no test measures time.
const PATIENCE: Duration = Duration::from_secs(60);
const MESSAGE_MAX: usize = 1 << 20;

fn greeting() -> Vec<u8> {
    let mut greeting = vec![0; 64];
    (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

fn ready(socket: &str) -> Vec<u8> {
    let mut body = b"\x05READY\x0bSocket-Type".to_vec();
    body.extend((socket.len() as u32).to_be_bytes());
    body.extend(socket.bytes());
    let mut frame = vec![4, body.len() as u8];
    frame.extend(body);
    frame
}

fn long_header(flags: u8, length: u64) -> Vec<u8> {
    let mut header = vec![flags | 2];
    header.extend(length.to_be_bytes());
    header
}

/// A peer that sends these bytes to whoever connects, and keeps the connection open.
async fn peer(sent: Vec<u8>) -> Endpoint {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.write_all(&sent).await;
        let mut sink = [0; 1024];
        while stream.read(&mut sink).await.is_ok_and(|read| read > 0) {}
    });
    format!("tcp://{address}").parse().unwrap()
}

/// What a subscriber makes of a peer that sends these bytes; and how much memory it holds then.
async fn refused(sent: Vec<u8>, deadline: Duration) -> Error {
    let endpoint = peer(sent).await;
    let connected = Connection::subscribe(&endpoint, "", MESSAGE_MAX, deadline).await;
    let error = match connected {
        Err(error) => error,
        Ok(mut connection) => tokio::time::timeout(PATIENCE, connection.recv())
            .await
            .expect("neither refused nor received")
            .expect_err("received"),
    };
    assert!(error.to_string().contains(&endpoint.to_string()), "{error}");
    error
}

/// Each peer breaks one rule; the error names the value, the bound and the endpoint.
#[tokio::test]
async fn what_no_publisher_sends_is_refused_with_value_and_place() {
    let shaken = || [greeting(), ready("PUB")].concat();
    let mut old = greeting();
    old[10] = 1;
    let mut secret = greeting();
    secret[12..17].copy_from_slice(b"CURVE");
    let mut crowd = shaken();
    for _ in 0..1_000_000 {
        crowd.extend([1, 0]);
    }
    let cases: [(Vec<u8>, ErrorKind, &str); 12] = [
        (
            [shaken(), long_header(0, 1 << 40)].concat(),
            ErrorKind::Invalid,
            "1099511627776",
        ),
        (
            [shaken(), long_header(1, u64::MAX)].concat(),
            ErrorKind::Invalid,
            "18446744073709551615",
        ),
        (
            [shaken(), long_header(4, 1 << 20)].concat(),
            ErrorKind::Invalid,
            "bytes of a command",
        ),
        (crowd, ErrorKind::Invalid, "frames of a message"),
        (
            [shaken(), vec![0x40, 0]].concat(),
            ErrorKind::Corrupt,
            "0x40",
        ),
        (
            [shaken(), vec![1, 0, 4, 5]].concat(),
            ErrorKind::Corrupt,
            "middle of a message",
        ),
        (
            [greeting(), vec![0, 1, 7]].concat(),
            ErrorKind::Corrupt,
            "before READY",
        ),
        (
            [greeting(), ready("PULL")].concat(),
            ErrorKind::Invalid,
            "PULL",
        ),
        (
            [greeting(), b"\x04\x08\x05ERROR\x01x".to_vec()].concat(),
            ErrorKind::Denied,
            "\"x\"",
        ),
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            ErrorKind::Corrupt,
            "48, 54, 54, 50",
        ),
        (old, ErrorKind::Version, "ZMTP 1"),
        (secret, ErrorKind::Unsupported, "CURVE"),
    ];
    for (sent, kind, named) in cases {
        let error = refused(sent, PATIENCE).await;
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(named), "{error}");
    }
}

/// Half a greeting, nothing at all, and half a handshake: each ends by the deadline, which the error names.
#[tokio::test]
async fn a_peer_that_does_not_finish_its_handshake_is_left() {
    for sent in [greeting()[..32].to_vec(), Vec::new(), greeting()] {
        let error = refused(sent, Duration::from_millis(20)).await;
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        assert!(error.to_string().contains("20 ms"), "{error}");
    }
}

/// A frame of the longest length is announced and nothing of it sent: nothing is kept for it.
#[test]
fn room_is_made_for_what_has_arrived_and_not_for_what_is_announced() {
    let mut decoder = Decoder::new(1 << 40);
    decoder.space().extend_from_slice(&greeting());
    decoder.space().extend_from_slice(&long_header(0, 1 << 39));
    assert!(matches!(
        decoder.next(),
        Ok(Some(Received::Greeting { minor: 0 }))
    ));
    assert_eq!(decoder.next().unwrap(), None);
    decoder.space();
    assert!(decoder.held() <= 2 * READ_BYTES, "{} bytes", decoder.held());
}

/// Many frames, each within its bound, together above that of a message.
#[test]
fn the_frames_of_a_message_share_one_bound() {
    let mut decoder = Decoder::new(1000);
    decoder.space().extend_from_slice(&greeting());
    for _ in 0..4 {
        decoder.space().extend_from_slice(&[1, 250]);
        decoder.space().extend_from_slice(&[0; 250]);
    }
    decoder.space().extend_from_slice(&[0, 1, 0]);
    decoder.next().unwrap();
    let error = decoder.next().unwrap_err();
    assert!(error.to_string().contains("1001"), "{error}");
}

/// The other end of a connection made by hand: what a subscriber says, and that it answers a ping.
#[tokio::test]
async fn a_subscriber_greets_subscribes_and_answers_pings() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint: Endpoint = format!("tcp://{}", listener.local_addr().unwrap())
        .parse()
        .unwrap();
    let publisher = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        // Byte by byte, as a slow publisher's.
        let mut sent = greeting();
        sent[11] = 1;
        sent.extend(ready("XPUB"));
        sent.extend(b"\x04\x09\x04PING\x00\x00ab");
        sent.extend([1, 1, b'x', 0, 2, b'y', b'z']);
        for byte in sent {
            stream.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        let mut said = vec![0; 106];
        stream.read_exact(&mut said).await.unwrap();
        assert_eq!(&said[..12], b"\xff\0\0\0\0\0\0\0\0\x7f\x03\x01");
        let after = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB\0\x04\x01kv@\x04\x07\x04PONGab";
        assert_eq!(&said[64..], after);
    };
    let subscriber = async {
        let connected = Connection::subscribe(&endpoint, "kv@", MESSAGE_MAX, PATIENCE);
        let mut connection = connected.await.unwrap();
        assert_eq!(connection.recv().await.unwrap(), ["x", "yz"]);
        // What is queued is sent while it waits.
        connection.recv().await.unwrap_err();
    };
    let both = async { tokio::join!(publisher, subscriber) };
    tokio::time::timeout(PATIENCE, both).await.unwrap();
}

/// A publisher that keeps its connection and neither sends nor answers, and one that answers each of many pings.
#[tokio::test]
async fn a_silent_peer_is_gone_only_when_it_does_not_answer_a_ping() {
    let mut sent = greeting();
    sent[11] = 1;
    sent.extend(ready("PUB"));
    let endpoint = peer(sent.clone()).await;
    let silence = Silence {
        ping_after: Duration::from_millis(10),
        pong_within: Duration::from_millis(10),
    };
    let connected = Connection::subscribe(&endpoint, "", MESSAGE_MAX, PATIENCE).await;
    let mut connection = connected.unwrap().with_silence(silence);
    let received = tokio::time::timeout(PATIENCE, connection.recv()).await;
    let error = received.expect("it waits for ever").unwrap_err();
    assert!(error.to_string().contains("ping"), "{error}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&sent).await.unwrap();
        let mut said = [0; 64 + 27 + 3];
        stream.read_exact(&mut said).await.unwrap();
        for _ in 0..5 {
            let mut ping = [0; 9];
            stream.read_exact(&mut ping).await.unwrap();
            assert_eq!(&ping, b"\x04\x07\x04PING\0\0");
            stream.write_all(b"\x04\x05\x04PONG").await.unwrap();
        }
        stream.write_all(b"\0\x01x").await.unwrap();
        let _ = stream.read(&mut said).await;
    });
    let endpoint: Endpoint = format!("tcp://{address}").parse().unwrap();
    let silence = Silence {
        pong_within: PATIENCE,
        ..silence
    };
    let connected = Connection::subscribe(&endpoint, "", MESSAGE_MAX, PATIENCE).await;
    let mut connection = connected.unwrap().with_silence(silence);
    let received = tokio::time::timeout(PATIENCE, connection.recv()).await;
    assert_eq!(received.unwrap().unwrap(), ["x"]);
}

/// Endpoints as configurations have them, and what is none.
#[test]
fn endpoints_are_read_or_refused_by_value() {
    for good in [
        "tcp://127.0.0.1:5557",
        "tcp://[::1]:1",
        "tcp://pod-0.svc:65535",
        "tcp://*:0",
        "ipc:///run/x",
    ] {
        assert_eq!(good.parse::<Endpoint>().unwrap().to_string(), good);
    }
    let long = format!("ipc:///{}", "x".repeat(200));
    for bad in [
        "",
        "udp://h:1",
        "tcp://h",
        "tcp://:1",
        "tcp://h:65536",
        "tcp://a:b:1",
        "tcp://a/b:1",
        "ipc://",
        &long,
    ] {
        let error = bad.parse::<Endpoint>().unwrap_err();
        assert!(error.to_string().contains(&format!("{bad:?}")), "{error}");
    }
}

proptest! {
    /// Any bytes in any pieces: an answer or an error, and never more held than has arrived and its bound.
    #[test]
    fn arbitrary_bytes_are_decoded_or_refused(
        tail in prop::collection::vec(any::<u8>(), 0..2000),
        is_greeted in any::<bool>(),
        piece in 1_usize..300,
    ) {
        let bytes = if is_greeted { [greeting(), tail].concat() } else { tail };
        let mut decoder = Decoder::new(4096);
        'bytes: for piece in bytes.chunks(piece) {
            decoder.space().extend_from_slice(piece);
            loop {
                match decoder.next() {
                    Ok(Some(Received::Message(frames))) => {
                        prop_assert!(frames.len() <= FRAMES_MAX);
                        prop_assert!(frames.iter().map(bytes::Bytes::len).sum::<usize>() <= 4096);
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => break 'bytes,
                }
            }
            prop_assert!(decoder.held() <= 4 * READ_BYTES + 4096);
        }
    }

    /// A real conversation with some bytes changed, cut out or doubled: the handshake, a subscription, a ping and messages
    /// of both lengths.
    #[test]
    fn mutated_conversations_are_decoded_or_refused(
        mutations in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..6),
        piece in 1_usize..300,
    ) {
        let long = vec![7; 300];
        let mut bytes = [greeting(), ready("SUB"), b"\x00\x04\x01kv@".to_vec()].concat();
        bytes.extend(b"\x04\x07\x04PING\x00\x01\x01\x03kv@");
        bytes.extend([1, 8, 0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend(long_header(0, long.len() as u64));
        bytes.extend(&long);
        for (place, byte, what) in mutations {
            let place = place.index(bytes.len());
            match what {
                0 => bytes[place] = byte,
                1 => drop(bytes.remove(place)),
                _ => bytes.insert(place, byte),
            }
        }
        let mut decoder = Decoder::new(4096);
        'bytes: for piece in bytes.chunks(piece) {
            decoder.space().extend_from_slice(piece);
            loop {
                match decoder.next() {
                    Ok(Some(Received::Command { body, .. })) => drop(property(body, b"Socket-Type")),
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => break 'bytes,
                }
            }
            prop_assert!(decoder.held() <= 4 * READ_BYTES + 4096);
        }
    }

    /// A message comes out as it went in, however it is cut.
    #[test]
    fn messages_survive_any_cut(
        lengths in prop::collection::vec(prop_oneof![0_usize..300, 16_000_usize..70_000], 1..FRAMES_MAX),
        piece in 1_usize..100_000,
    ) {
        let mut sent = greeting();
        for (position, length) in lengths.iter().enumerate() {
            let more = u8::from(position + 1 < lengths.len());
            match u8::try_from(*length) {
                Ok(short) => sent.extend([more, short]),
                Err(_) => sent.extend(long_header(more, *length as u64)),
            }
            sent.extend(std::iter::repeat_n(position as u8, *length));
        }
        let mut decoder = Decoder::new(MESSAGE_MAX);
        let mut received = Vec::new();
        for piece in sent.chunks(piece) {
            decoder.space().extend_from_slice(piece);
            while let Some(next) = decoder.next().unwrap() {
                received.push(next);
            }
        }
        prop_assert_eq!(received.len(), 2);
        let Received::Message(frames) = &received[1] else { panic!("{:?}", received[1]) };
        prop_assert_eq!(frames.iter().map(bytes::Bytes::len).collect::<Vec<_>>(), lengths);
        for (position, frame) in frames.iter().enumerate() {
            prop_assert!(frame.iter().all(|byte| *byte == position as u8));
        }
    }
}

/// Opens a connection and says nothing more: what a listener's deadline is for.
#[tokio::test]
async fn a_publisher_that_connects_and_says_nothing_is_left() {
    let listener = Listener::bind(&"tcp://127.0.0.1:0".parse().unwrap())
        .await
        .unwrap();
    let Endpoint::Tcp { host, port } = listener.endpoint().unwrap() else {
        panic!("not tcp");
    };
    let _silent = TcpStream::connect((host.as_str(), port)).await.unwrap();
    let accepted = listener.accept().await.unwrap();
    let within = Duration::from_millis(20);
    let error = Connection::accepted(accepted, "kv@", MESSAGE_MAX, within)
        .await
        .err()
        .unwrap();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
}
