//! Every backend that runs on any Linux machine, against the one suite.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "what tests share fails like a test, and the other process speaks by printing"
)]

#[path = "support/apart.rs"]
mod apart;
#[path = "support/child.rs"]
#[expect(dead_code, reason = "tests of two processes use all of it")]
mod child;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use kvfabric_transfer::backend::conformance::{
    FileFixture, Fixture, ObjectFixture, PeerFixture, Report, run,
};
use kvfabric_transfer::backend::sim::{ExchangeConfig, LinkProfile, SimNetwork};
use kvfabric_transfer::{
    Agent, AgentBuilder, DirectMode, FileEngineMode, FileOptions, ObjectOptions, TlsOptions,
    UcxOptions, VerbsConnect, VerbsOptions,
};

/// How many cases the suite has.
const CASES: usize = 14;

fn check(fixture: &dyn Fixture, skipped: usize) -> Report {
    let report = run(fixture).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(report.passed.len() + report.skipped.len(), CASES);
    assert_eq!(
        report.skipped.len(),
        skipped,
        "skipped: {:?}",
        report.skipped
    );
    report
}

fn alone(name: &str) -> AgentBuilder {
    Agent::builder(name).memcpy(false).shm(false)
}

fn pair(backend: &'static str, builder: impl Fn(&str) -> AgentBuilder) -> PeerFixture {
    let agent = builder("conformance-a").build().expect("agent");
    let peer = builder("conformance-b").build().expect("agent");
    PeerFixture::new(backend, agent, peer)
}

/// Two agents of this process.
#[test]
fn memcpy_conforms() {
    check(&pair("memcpy", |name| alone(name).memcpy(true)), 0);
}

/// Two agents of this process that map each other's memory.
#[test]
fn shm_conforms() {
    check(&pair("shm", |name| alone(name).shm(true)), 0);
}

/// Two agents of this process that read and write each other's private memory with system calls.
#[test]
fn cma_conforms() {
    check(&pair("cma", |name| alone(name).cma(true)).private(), 0);
}

/// Shared memory is reached that way as well.
#[test]
fn cma_over_shared_memory_conforms() {
    check(&pair("cma", |name| alone(name).cma(true)), 0);
}

/// Two agents of this process over loopback.
#[test]
fn tcp_conforms() {
    let listen = "127.0.0.1:0".parse().expect("address");
    check(&pair("tcp", |name| alone(name).tcp(Some(listen))), 0);
}

/// The same over two addresses and five connections, over which requests above 1 MiB are striped.
#[test]
fn tcp_over_several_connections_conforms() {
    let listen = "127.0.0.1:0".parse().expect("address");
    let rail = "127.0.0.2:0".parse().expect("address");
    let build = |name: &str| {
        alone(name)
            .tcp(Some(listen))
            .tcp_rails([rail])
            .tcp_connections(5)
    };
    check(&pair("tcp", build), 0);
}

/// The same, encrypted, over one connection and over three.
#[test]
fn tcp_over_tls_conforms() {
    let listen = "127.0.0.1:0".parse().expect("address");
    let tls = TlsOptions {
        authorities: include_bytes!("tls/own-ca.pem").to_vec(),
        certificates: include_bytes!("tls/member.pem").to_vec(),
        key: include_bytes!("tls/member.key").to_vec(),
    };
    for connections in [1, 3] {
        let build = |name: &str| {
            alone(name)
                .tcp(Some(listen))
                .tcp_connections(connections)
                .tcp_tls(Some(tls.clone()))
        };
        check(&pair("tcp", build), 0);
    }
}

/// How the other side is told of RDMA whose queue pairs are connected by rdma_cm.
const BY_RDMA_CM: &str = "verbs by rdma_cm";

fn by(connect: VerbsConnect) -> VerbsOptions {
    VerbsOptions {
        connect,
        ..VerbsOptions::default()
    }
}

/// An agent that reaches others over this backend alone.
fn over(backend: &str, name: &str, own: IpAddr) -> AgentBuilder {
    // In an emulated machine that is busy otherwise, a connection or a region takes seconds.
    let builder = alone(name).connect_within(Duration::from_secs(30));
    match backend {
        "shm" => builder.shm(true),
        "cma" => builder.cma(true),
        "tcp" => builder.tcp(Some(SocketAddr::new(own, 0))),
        "ucx" => builder.ucx(Some(UcxOptions::default())),
        "verbs" => builder.verbs(Some(by(VerbsConnect::Exchange))),
        BY_RDMA_CM => builder.verbs(Some(by(VerbsConnect::RdmaCm))),
        other => panic!("no backend {other:?}"),
    }
}

/// The other side, for processes of this machine (its role is `here`) and of others (the address to listen at).
#[test]
fn body_of_the_other_side() {
    let Ok(role) = std::env::var(child::ROLE) else {
        return;
    };
    let address = match role.as_str() {
        "here" => "127.0.0.1:0",
        address => address,
    };
    let listener = TcpListener::bind(address).expect("listen");
    let own = listener.local_addr().expect("address");
    println!("LISTENS {own}");
    apart::serve(&listener, |backend| {
        let built = over(backend, "conformance-b", own.ip()).build();
        built.expect("agent")
    });
}

/// Two processes of this machine.
fn between_processes(backend: &'static str) {
    let mut other = child::Again::start("body_of_the_other_side", "here");
    let address = other.expect("LISTENS ");
    let own = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let agent = over(backend, "conformance-a", own).build().expect("agent");
    check(&apart::Apart::connect(backend, backend, agent, &address), 0);
}

#[test]
fn shm_between_processes_conforms() {
    between_processes("shm");
}

#[test]
fn cma_between_processes_conforms() {
    between_processes("cma");
}

#[test]
fn tcp_between_processes_conforms() {
    between_processes("tcp");
}

#[test]
fn ucx_between_processes_conforms() {
    between_processes("ucx");
}

/// Two machines, of which the other one runs [`body_of_the_other_side`]; `make test-rdma` has them.
fn between_machines(backend: &'static str) {
    between_machines_by(backend, backend);
}

fn between_machines_by(backend: &'static str, told: &str) {
    let found = |name: &str| std::env::var(name).ok();
    let (Some(other), Some(own)) = (found("KVFABRIC_OTHER_SIDE"), found("KVFABRIC_OWN_ADDRESS"))
    else {
        eprintln!("SKIPPED: {told} between two machines needs another machine");
        return;
    };
    let own = own.parse().expect("an address");
    let agent = over(told, "conformance-a", own).build().expect("agent");
    check(&apart::Apart::connect(backend, told, agent, &other), 0);
}

#[test]
fn verbs_by_rdma_cm_between_machines_conforms() {
    between_machines_by("verbs", BY_RDMA_CM);
}

#[test]
fn ucx_between_machines_conforms() {
    between_machines("ucx");
}

#[test]
fn verbs_between_machines_conforms() {
    between_machines("verbs");
}

/// Over UCX. What it needs to connect depends on its transports: with queue pairs, in an emulated machine, seconds.
fn over_ucx(settings: &[(&str, &str)]) {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    let options = UcxOptions {
        settings: settings.iter().map(owned).collect(),
    };
    let build = |name: &str| {
        let builder = alone(name).ucx(Some(options.clone()));
        builder.connect_within(Duration::from_secs(30))
    };
    check(&pair("ucx", build), 0);
}

/// Two agents of this process over UCX, by whatever it chooses here.
#[test]
fn ucx_conforms() {
    over_ucx(&[]);
}

/// The same with TCP alone, where the peer's side of UCX copies what is written.
#[test]
fn ucx_over_tcp_conforms() {
    over_ucx(&[("TLS", "tcp,self")]);
}

/// Two agents of this process over RDMA, where there is a device; `make test-rdma` has one.
#[test]
fn verbs_conforms() {
    over_verbs(VerbsConnect::Exchange);
}

/// The same, with queue pairs that are connected by rdma_cm.
#[test]
fn verbs_by_rdma_cm_conforms() {
    over_verbs(VerbsConnect::RdmaCm);
}

fn over_verbs(connect: VerbsConnect) {
    let options = by(connect);
    // An emulated machine that is busy otherwise takes seconds to hand out a region.
    let build = |name: &str| {
        let builder = alone(name).verbs(Some(options.clone()));
        builder.connect_within(Duration::from_secs(30))
    };
    match build("probe").build() {
        Ok(_) => {
            check(&pair("verbs", build), 0);
        }
        Err(error) => {
            assert!(std::env::var_os("KVFABRIC_RDMA").is_none(), "{error}");
            eprintln!("SKIPPED: {error}");
        }
    }
}

fn files(mode: FileEngineMode, direct: DirectMode) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let agent = alone("conformance-file").build().expect("agent");
    let report = agent.start_file_engine(mode).expect("file engine");
    if mode != FileEngineMode::Blocking && !report.starts_with("io_uring") {
        eprintln!("SKIPPED in part: files run on {report}");
    }
    let options = FileOptions {
        direct,
        ..FileOptions::default()
    };
    check(
        &FileFixture::new(agent, directory.path().to_owned(), options),
        3,
    );
}

/// As an agent opens files by default: io_uring, direct where alignment allows.
#[test]
fn file_conforms() {
    files(FileEngineMode::Auto, DirectMode::Auto);
}

/// Everything goes through the page cache.
#[test]
fn buffered_file_conforms() {
    files(FileEngineMode::Auto, DirectMode::Off);
}

/// The engine of kernels that refuse io_uring.
#[test]
fn file_on_blocking_threads_conforms() {
    files(FileEngineMode::Blocking, DirectMode::Auto);
}

/// A directory as an object store.
#[test]
fn object_in_a_directory_conforms() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let url = format!("file://{}/new/store", directory.path().display());
    let agent = alone("conformance-object")
        .object_store("local", &url, ObjectOptions::default())
        .build()
        .expect("agent");
    check(&ObjectFixture::new(agent, "local"), 3);
}

fn simulated(profile: LinkProfile) {
    let network = SimNetwork::new(42, ExchangeConfig::over(profile)).expect("network");
    check(&pair("sim", |name| alone(name).simulated(&network)), 0);
}

/// Two agents on a faultless simulated network.
#[test]
fn sim_conforms() {
    simulated(LinkProfile::perfect());
}

/// Two agents on a simulated network that loses, repeats and reorders datagrams.
#[test]
fn lossy_sim_conforms() {
    simulated(LinkProfile::lossy());
}
