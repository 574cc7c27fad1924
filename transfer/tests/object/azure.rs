//! Azure's interface, against its own emulator (Azurite), where one is installed.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::Instant;

use kvcache_core::ErrorKind;
use kvfabric_transfer::backend::conformance::{ObjectFixture, run};
use kvfabric_transfer::{ObjectOptions, ObjectWrite, Operation, Secret};

use super::{
    PATIENCE, WHOLE, build, create_keeps_the_first_object, memory, memory_of, names_come_and_go,
    transfer,
};

/// The account of every Azurite.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// Lets anybody make containers there, until 2120: signed with that key.
const MAY_CREATE: &str = "sv=2018-11-09&ss=b&srt=sco&sp=rwdlac&se=2120-01-01T00%3A00%3A00Z&spr=https%2Chttp\
     &sig=AOgomzxybvGad6PhP95ncmscPEVdUaD60zirsVwo%2F3s%3D";

/// A store is not made by us, but expected to be there.
fn make_container(address: std::net::SocketAddr) {
    let mut stream = TcpStream::connect(address).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("socket");
    write!(
        stream,
        "PUT /{ACCOUNT}/container?restype=container&{MAY_CREATE} HTTP/1.1\r\nhost: {address}\r\n\
         x-ms-version: 2021-08-06\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    )
    .expect("asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
}

struct Emulator(std::process::Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The whole suite, large objects in blocks, conditional writes, and a wrong key.
#[test]
fn azure_conforms() {
    let Some(program) = std::env::var_os("KVFABRIC_AZURE_SERVER") else {
        eprintln!("SKIPPED: no azurite-blob in KVFABRIC_AZURE_SERVER, Azure is not tested");
        return;
    };
    let folder = tempfile::tempdir().expect("directory");
    let address = {
        let listener = TcpListener::bind("127.0.0.1:0").expect("port");
        listener.local_addr().expect("address")
    };
    let child = Command::new(program)
        .args([
            "--silent",
            "--disableTelemetry",
            "--skipApiVersionCheck",
            "--blobHost",
            "127.0.0.1",
        ])
        .args(["--blobPort", &address.port().to_string(), "--location"])
        .arg(folder.path())
        .stdout(Stdio::null())
        .spawn()
        .expect("the server starts");
    let _emulator = Emulator(child);
    let until = Instant::now() + PATIENCE;
    while TcpStream::connect(address).is_err() {
        assert!(Instant::now() < until, "the server does not come up");
        std::thread::yield_now();
    }
    make_container(address);
    let options = ObjectOptions {
        endpoint: Some(format!("http://{address}/{ACCOUNT}")),
        access_key: Some(ACCOUNT.to_owned()),
        secret_key: Some(Secret::new(KEY)),
        allow_http: true,
        part_bytes: 5 << 20,
        ..ObjectOptions::default()
    };
    let agent = build("az://container/some/prefix", options.clone()).expect("agent");
    create_keeps_the_first_object(&agent);
    names_come_and_go(&agent);
    let large = memory_of(&agent, 12 << 20);
    large.fill_at(0, 12 << 20, 5).expect("filled");
    let keep = agent
        .object_for("cold", "large", ObjectWrite::Keep)
        .expect("object");
    let all = [(0, 0, 12 << 20)];
    transfer(&agent, Operation::Write, &large, &keep, &all).expect("written");
    large.fill_at(0, 12 << 20, 6).expect("filled");
    transfer(&agent, Operation::Write, &large, &keep, &all).expect("there");
    transfer(&agent, Operation::Read, &large, &keep, &all).expect("read");
    let mut last = [0];
    large.read_at((12 << 20) - 1, &mut last).expect("read");
    assert_eq!(last, [5]);
    let report = run(&ObjectFixture::new(agent, "cold")).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(report.passed.len(), 11);

    let wrong = "bm90IHRoZSBrZXk=";
    let with_wrong = ObjectOptions {
        secret_key: Some(Secret::new(wrong)),
        ..options
    };
    let agent = build("az://container/p", with_wrong).expect("agent");
    let object = agent.object("cold", "key").expect("object");
    let failed = transfer(&agent, Operation::Write, &memory(&agent), &object, WHOLE);
    let failed = failed.expect_err("denied");
    assert_eq!(failed.kind(), ErrorKind::Denied, "{failed}");
    assert!(!failed.to_string().contains(wrong), "{failed}");
}
