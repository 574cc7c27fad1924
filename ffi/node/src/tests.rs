//! A node opened from its configuration, with and without an index, and what it refuses.

use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use kvfabric_tiers::BlockMemory;
use kvfabric_transfer::{HostMemory, Operation, Priority, RegionOptions, RequestOptions, Side};

use super::*;

mod hbm;

const SECONDS: Duration = Duration::from_secs(20);

fn minimal() -> Vec<(String, String)> {
    [
        ("pod", "pod-0"),
        ("model", "m"),
        ("model_identity", &"ab".repeat(32)),
        ("block_bytes", "4096"),
        ("block_tokens", "4"),
        ("host.bytes", "65536"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

fn with(key: &str, value: &str) -> Vec<(String, String)> {
    let mut settings = minimal();
    settings.push((key.to_owned(), value.to_owned()));
    settings
}

/// Each wrong setting alone, and the words that its complaint must have.
#[test]
fn a_wrong_setting_is_refused_with_its_name() {
    for (key, value, words) in [
        ("colour", "blue", "colour"),
        ("host.byte", "1", "byte"),
        ("model_identity", "xyz", "model_identity is \"xyz\""),
        ("block_tokens", "0", "0"),
        ("block_bytes", "0", "block_bytes is 0"),
        ("host.bytes", "1", "host_bytes is 1"),
        ("key_scheme", "md5", "md5"),
        ("pod", "two words", "two words"),
        ("shard.tensor_rank", "1", "shard"),
        ("shard.layers", "0", "layers is 0"),
        ("peer_listen", "nowhere", "nowhere"),
        ("engine.hash", "sha256", "name"),
        ("shard.first_layer", "4294967295", "layers is 1"),
        ("peer_listen", "0.0.0.0:0", "peer_listen is 0.0.0.0:0"),
        ("hbm.bytes", "4095", "hbm.bytes is 4095"),
        ("hbm.bytes", "8192", "fabric.cuda"),
    ] {
        let error = NodeConfig::load(None, &with(key, value)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{key}={value}: {error}");
        assert!(error.to_string().contains(words), "{key}={value}: {error}");
    }
}

/// The setting, and what the tiers are given: they ask the index before every fetch.
#[test]
fn what_a_question_to_the_index_may_take_is_what_the_tiers_wait() {
    let mut settings = with("index.address", "http://127.0.0.1:1");
    settings.push(("index.lookup_deadline_ms".into(), "1234".into()));
    let config = NodeConfig::load(None, &settings).unwrap();
    let waits = config.cache_config().unwrap().locate_timeout;
    assert_eq!(waits, Duration::from_millis(1234));
}

/// UCX as it comes, and told to use what it does not have: the setting gets there, and its refusal back.
#[tokio::test]
async fn a_node_reaches_others_over_ucx_as_it_is_told() {
    let mut settings = with("fabric.ucx", "true");
    let node = Node::open(NodeConfig::load(None, &settings).unwrap());
    node.await.unwrap().shutdown(SECONDS).await.unwrap();
    settings.push(("fabric.ucx_settings.RNDV_THRESH".into(), "much".into()));
    let refused = Node::open(NodeConfig::load(None, &settings).unwrap()).await;
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(
        error.to_string().contains("RNDV_THRESH = \"much\""),
        "{error}"
    );
}

/// With a GPU the node's agent takes its memory; without one the node does not start, and says why.
#[tokio::test]
async fn a_node_uses_cuda_as_it_is_told() {
    let settings = with("fabric.cuda", "true");
    let opened = Node::open(NodeConfig::load(None, &settings).unwrap()).await;
    match kvfabric_transfer::cuda_probe() {
        Ok(_) => opened.unwrap().shutdown(SECONDS).await.unwrap(),
        Err(reason) => {
            let error = opened.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(reason.context()), "{error}");
        }
    }
}

/// What is set is in force at the node's agent, and what cannot be is refused by its name.
#[test]
fn a_node_moves_bytes_as_fast_and_as_its_configuration_says() {
    let fabric = "[fabric]\nprefer = [\"tcp\"]\ntcp_congestion = \"reno\"\nbytes_per_second = 1024\n\
                  background_bytes_per_second = 512\n";
    let load = |more: &[(&str, &str)]| {
        let mut settings = minimal();
        let more = more.iter();
        settings.extend(more.map(|&(key, value)| (key.to_owned(), value.to_owned())));
        parts::agent(&NodeConfig::from_toml(fabric, &settings).unwrap())
    };
    let agent = load(&[]).unwrap();
    let memory = || HostMemory::anonymous(1 << 20).unwrap();
    let region = || agent.register(memory(), RegionOptions::default()).unwrap();
    let (from, to) = (region(), region());
    let list = |region: &kvfabric_transfer::Region| {
        let descriptors = [region.descriptor(0, 1 << 20)];
        agent.prepare(Side::Local, &descriptors).unwrap()
    };
    let (from, to) = (list(&from), list(&to));
    for (priority, seconds) in [(Priority::Normal, 1024), (Priority::Background, 2048)] {
        let options = RequestOptions {
            priority,
            ..RequestOptions::default()
        };
        let request = agent.request(Operation::Read, &to, &from, options).unwrap();
        let expected = request.estimate().unwrap().expected;
        assert_eq!(expected.as_secs(), seconds, "{priority:?}");
    }
    for (key, value, words) in [
        ("fabric.bytes_per_second", "0", "fabric.bytes_per_second"),
        ("fabric.cuda_storage", "direct", "fabric.cuda_storage"),
        (
            "fabric.background_bytes_per_second",
            "0",
            "fabric.background",
        ),
        ("fabric.tcp_listen", "off", "preferred backend is \"tcp\""),
        ("fabric.tcp_congestion", "none such", "none such"),
        ("fabric.look_us", "1001", "1001000"),
        ("fabric.connect_within_ms", "0", "connect within"),
        ("fabric.connect_within_ms", "60001", "60001000000"),
    ] {
        let error = load(&[(key, value)]).unwrap_err().to_string();
        assert!(error.contains(words), "{key}={value}: {error}");
    }
}

/// Where a certificate for tests is.
fn certificate(name: &str) -> String {
    format!(
        "{}/../../transfer/tests/tls/{name}",
        env!("CARGO_MANIFEST_DIR")
    )
}

/// Two pods with certificates over three connections to two addresses, one without a certificate, and settings that cannot be.
#[test]
fn pods_speak_tls_over_as_many_connections_as_they_are_told() {
    let agent = |pod: &str, tls: bool, more: &[(&str, String)]| {
        let mut settings = minimal();
        let mut set = |key: &str, value: &str| settings.push((key.to_owned(), value.to_owned()));
        set("pod", pod);
        set("fabric.tcp_connections", "3");
        if tls {
            set("fabric.tls.authorities", &certificate("own-ca.pem"));
            set("fabric.tls.certificates", &certificate("member.pem"));
            set("fabric.tls.key", &certificate("member.key"));
        }
        more.iter().for_each(|(key, value)| set(key, value));
        let rails = "[fabric]\nprefer = [\"tcp\"]\ntcp_rails = [\"127.0.0.2:0\"]\n";
        parts::agent(&NodeConfig::from_toml(rails, &settings)?)
    };
    let (one, other) = (agent("initiator", true, &[]), agent("target", true, &[]));
    let (one, other) = (one.unwrap(), other.unwrap());
    let way = one.path_to(&one.load_peer(&other.metadata()).unwrap());
    assert_eq!(way.backend, Some("tcp"), "{way:?}");
    assert_eq!(way.connections.len(), 3, "{way:?}");
    let to_second = way.connections.iter();
    let to_second = to_second.filter(|connection| connection.to.ip().to_string() == "127.0.0.2");
    assert!((1..3).contains(&to_second.count()), "{way:?}");

    let plain = agent("plain", false, &[]).unwrap();
    let way = plain.path_to(&plain.load_peer(&other.metadata()).unwrap());
    assert_eq!(way.backend, Some("memcpy"), "{way:?}");
    let refusal = way.refused.iter().find(|(name, _)| *name == "tcp");
    assert!(refusal.unwrap().1.contains("speaks TLS only"), "{way:?}");

    for (key, value, words) in [
        ("fabric.tls.key", certificate("none.key"), "none.key"),
        ("fabric.tls.key", certificate("stranger.key"), "TLS"),
        (
            "fabric.tls.authorities",
            certificate("member.key"),
            "TLS authorities",
        ),
        ("fabric.tcp_connections", "0".to_owned(), "connections"),
        ("fabric.tcp_connections", "17".to_owned(), "connections"),
    ] {
        let error = agent("initiator", true, &[(key, value)]).unwrap_err();
        assert!(error.to_string().contains(words), "{key}: {error}");
    }
}

/// A file, with one key overridden by a flag.
#[test]
fn flags_override_the_file() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    write!(
        file,
        "pod = \"pod-7\"\nmodel = \"m\"\nmodel_identity = \"{}\"\nblock_bytes = 4096\nblock_tokens = 16\n\
         [host]\nbytes = 1048576\n[disk]\npath = \"nvme\"\nbytes = 2097152\nsegment_bytes = 65536\ndirect = \"off\"\n\
         engine = \"threads\"\n",
        "cd".repeat(32)
    )
    .unwrap();
    let override_ = [("host.bytes".to_owned(), "2097152".to_owned())];
    let config = NodeConfig::load(Some(file.path()), &override_).unwrap();
    assert_eq!(
        (config.pod.as_str(), config.host.bytes),
        ("pod-7", 2_097_152)
    );
    let disk = config.disk.unwrap();
    assert_eq!(disk.direct, config::DirectSetting::Off);
    assert_eq!(disk.engine, config::DiskEngineSetting::Threads);
}

/// Both listeners switched off by their word, and a name of digits that stays a name.
#[test]
fn listeners_can_be_off_and_names_stay_text() {
    let mut settings = with("peer_listen", "off");
    settings.push(("fabric.tcp_listen".to_owned(), "off".to_owned()));
    settings.push(("pod".to_owned(), "007".to_owned()));
    let config = NodeConfig::load(None, &settings).unwrap();
    assert_eq!((config.peer_listen, config.fabric.tcp_listen), (None, None));
    assert_eq!(config.pod, "007");
}

/// A file that is not there, and one with a key that nobody knows.
#[test]
fn a_bad_file_is_refused_with_its_name() {
    let error = NodeConfig::load(Some(Path::new("no/such.toml")), &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("no/such.toml"), "{error}");
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "pods = 3").unwrap();
    let error = NodeConfig::load(Some(file.path()), &minimal()).unwrap_err();
    assert!(error.to_string().contains("pods"), "{error}");
}

/// Stores through one node without an index, and fetches from its own tiers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_alone_keeps_and_returns_blocks() {
    let node = Node::open(NodeConfig::load(None, &minimal()).unwrap())
        .await
        .unwrap();
    let memory = HostMemory::anonymous(4 * 4096).unwrap();
    let engine = node
        .agent()
        .register(memory, RegionOptions::default())
        .unwrap();
    engine.write_at(0, &[7; 4096]).unwrap();
    engine.write_at(4096, &[8; 4096]).unwrap();
    let infos = node
        .describe(&Namespace::default(), &[1, 2, 3, 4, 5, 6, 7, 8, 9])
        .unwrap();
    assert_eq!(infos.len(), 2, "the ninth token fills no block");
    let stored = infos.iter().zip(0..).map(|(info, slot)| StoreBlock {
        info: *info,
        memory: engine.descriptor(slot * 4096, 4096).into(),
    });
    let report = node.store(stored.collect(), SECONDS).await.unwrap();
    assert_eq!(report.stored, 2);
    let fetched = infos.iter().zip(2..).map(|(info, slot)| FetchBlock {
        info: *info,
        memory: engine.descriptor(slot * 4096, 4096).into(),
    });
    let report = node
        .fetch(fetched.collect(), Located::default(), SECONDS)
        .await
        .unwrap();
    assert_eq!(report.sources, [Source::Host, Source::Host]);
    let mut bytes = [0; 4096];
    engine.read_at(3 * 4096, &mut bytes).unwrap();
    assert_eq!(bytes, [8; 4096]);
    let error = node.lookup(Lookup::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    node.shutdown(SECONDS).await.unwrap();
}

/// The longest duration there is, where a clock would overflow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadline_beyond_what_clocks_hold_is_a_distant_one() {
    let node = Node::open(NodeConfig::load(None, &minimal()).unwrap())
        .await
        .unwrap();
    let memory = HostMemory::anonymous(4096).unwrap();
    let engine = node
        .agent()
        .register(memory, RegionOptions::default())
        .unwrap();
    let info = node.describe(&Namespace::default(), &[1, 2, 3, 4]).unwrap()[0];
    let memory: BlockMemory = engine.descriptor(0, 4096).into();
    let stored = vec![StoreBlock {
        info,
        memory: memory.clone(),
    }];
    let report = node.store(stored, Duration::MAX).await.unwrap();
    assert_eq!(report.stored, 1);
    let fetched = vec![FetchBlock { info, memory }];
    let hints = Located::default();
    let report = node.fetch(fetched, hints, Duration::MAX).await.unwrap();
    assert_eq!(report.sources, [Source::Host]);
    node.shutdown(Duration::MAX).await.unwrap();
    let error = node.held(vec![info.key]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}

/// The same tokens under another adapter or salt are other blocks, in the tiers and in the index.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn namespaces_share_no_block() {
    let node = Node::open(NodeConfig::load(None, &minimal()).unwrap())
        .await
        .unwrap();
    let tokens = [1, 2, 3, 4];
    let of = |lora, cache_salt| {
        node.describe(&Namespace { lora, cache_salt }, &tokens)
            .unwrap()
            .remove(0)
    };
    let all = [
        of("", ""),
        of("a", ""),
        of("b", ""),
        of("", "a"),
        of("a", "a"),
    ];
    for (position, one) in all.iter().enumerate() {
        for other in &all[position + 1..] {
            assert_ne!(one.key, other.key);
            assert_ne!(one.index_key, other.index_key);
        }
    }
    assert_eq!(of("", ""), all[0]);
}

/// The metrics endpoint of a running node names the tiers' counters and the backends'.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_served_and_a_port_in_use_is_named() {
    let settings = with("metrics_listen", "127.0.0.1:0");
    let node = Node::open(NodeConfig::load(None, &settings).unwrap())
        .await
        .unwrap();
    let address: SocketAddr = node.metrics_address().unwrap();
    let text = tokio::task::spawn_blocking(move || scrape(address))
        .await
        .unwrap();
    for name in [
        "kvfabric_node_host_vacant 16",
        "kvfabric_node_stored 0",
        "# EOF",
    ] {
        assert!(text.contains(name), "{name} is missing:\n{text}");
    }
    let settings = with("metrics_listen", &address.to_string());
    let error = Node::open(NodeConfig::load(None, &settings).unwrap())
        .await
        .unwrap_err();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

fn scrape(address: SocketAddr) -> String {
    use std::io::Read;
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SECONDS)).unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// Two nodes and a real index: what one stores, the other finds and reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_find_each_others_blocks_through_an_index() {
    let index = kvfabric_indexer::server::serve(kvfabric_indexer::config::ServerConfig {
        grpc_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        block_size: 4,
        ..Default::default()
    })
    .await
    .unwrap();
    let open = async |pod: &str| {
        let mut settings = with("index.address", &format!("http://{}", index.grpc_address()));
        settings.push(("pod".to_owned(), pod.to_owned()));
        Node::open(NodeConfig::load(None, &settings).unwrap())
            .await
            .unwrap()
    };
    let (holder, reader) = (open("holder").await, open("reader").await);
    let register = |node: &Node| {
        let memory = HostMemory::anonymous(4096).unwrap();
        node.agent()
            .register(memory, RegionOptions::default())
            .unwrap()
    };
    let (source, target) = (register(&holder), register(&reader));
    source.write_at(0, &[9; 4096]).unwrap();
    let tokens = [1, 2, 3, 4];
    let info = holder.describe(&Namespace::default(), &tokens).unwrap()[0];
    let block = StoreBlock {
        info,
        memory: source.descriptor(0, 4096).into(),
    };
    holder.store(vec![block], SECONDS).await.unwrap();

    let lookup = Lookup {
        tokens: &tokens,
        min_position: holder.positions(),
        ..Default::default()
    };
    let answer = reader.lookup(lookup).await.unwrap();
    assert_eq!(answer.pods.len(), 1);
    assert_eq!(
        (answer.pods[0].pod.as_str(), answer.pods[0].depth),
        ("holder", 1)
    );

    // Without hints the reader asks the index by itself, and learns the holder's address from it.
    let block = FetchBlock {
        info,
        memory: target.descriptor(0, 4096).into(),
    };
    let report = reader
        .fetch(vec![block], Located::default(), SECONDS)
        .await
        .unwrap();
    assert_eq!(
        report.sources,
        [Source::Peer {
            pod: holder.pod().clone(),
            tier: Tier::Host
        }]
    );
    let mut bytes = [0; 4096];
    target.read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, [9; 4096]);
    holder.shutdown(SECONDS).await.unwrap();
    reader.shutdown(SECONDS).await.unwrap();
    index.shutdown(SECONDS).await.unwrap();
}

fn with_engine(pod: &str, settings: &[(&str, &str)]) -> Vec<(String, String)> {
    let engine = [
        ("engine.name", "test/1"),
        ("engine.hash", "sha256"),
        ("pod", pod),
    ];
    let added = engine.iter().chain(settings);
    let added = added.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    minimal().into_iter().chain(added).collect()
}

/// Each wrong setting of the engine alone.
#[test]
fn an_engine_that_cannot_name_blocks_is_refused() {
    for (key, value, words) in [
        ("engine.hash", "xxhash", "only sha256 and sha256_cbor"),
        ("engine.name", "", "engine: name"),
        (
            "engine.events_replay",
            "tcp://127.0.0.1:1",
            "without events",
        ),
        ("engine.events_kind", "node", "events_kind"),
        ("engine.events_kind", "telegraph", "telegraph"),
    ] {
        let error = NodeConfig::load(None, &with_engine("p", &[(key, value)])).unwrap_err();
        assert!(error.to_string().contains(words), "{key}={value}: {error}");
    }
}

/// The same configuration as text, as a value, and as settings.
#[test]
fn a_configuration_may_be_text_or_a_value() {
    let toml = format!(
        "pod = \"p\"\nmodel = \"m\"\nmodel_identity = \"{}\"\nblock_bytes = 4096\nblock_tokens = 4\n[host]\nbytes = 8192",
        "ab".repeat(32)
    );
    let value = serde_json::json!({
        "pod": "p", "model": "m", "model_identity": "ab".repeat(32), "block_bytes": 4096,
        "block_tokens": 4, "host": {"bytes": 8192},
    });
    let larger = [("host.bytes".to_owned(), "65536".to_owned())];
    for config in [
        NodeConfig::from_toml(&toml, &larger).unwrap(),
        NodeConfig::from_value(&value, &larger).unwrap(),
    ] {
        assert_eq!((config.pod.as_str(), config.host.bytes), ("p", 65_536));
    }
    let error = NodeConfig::from_toml("pod = [", &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let error = NodeConfig::from_value(&serde_json::json!({"pods": 1}), &minimal()).unwrap_err();
    assert!(error.to_string().contains("pods"), "{error}");
}

/// A worker's node stores what a scheduler named; the scheduler, which has no node, asks it how deep it holds that, and lets
/// go of what was pinned.
#[test]
fn a_scheduler_finds_by_names_what_a_worker_has_stored() {
    let config = NodeConfig::load(None, &with_engine("worker", &[])).unwrap();
    let identity = config.identity().unwrap();
    let worker = AttachedNode::open(config).unwrap();
    let memory = HostMemory::anonymous(4 * 4096).unwrap();
    let agent = worker.node().agent();
    let region = agent.register(memory, RegionOptions::default()).unwrap();
    let segment = Segment {
        region: region.id(),
        offset: 0,
        stride: 4096,
        len: 4096,
    };
    let pages = worker.node().pages(vec![segment], 4).unwrap();
    let size = TokensPerBlock::try_from(4).unwrap();
    let mut chain = names::NameChain::new(&IndexScheme::default(), "m", size, "", "");
    chain
        .extend(&[7; 12], &[&[1; 32], &[2; 32], &[3; 32]])
        .unwrap();
    let first_two = names::Names::parse(&chain.pack(0..2).unwrap()).unwrap();
    let prefix = worker.node().prefix_of(&first_two, None).unwrap();
    let stored = worker.store(&prefix, 0, &pages, &[3, 1], SECONDS).unwrap();
    assert_eq!(stored.wait(SECONDS).unwrap().unwrap().stored, 2);

    let scheduler =
        PeerConnection::connect(&worker.node().peer_address().unwrap().to_string()).unwrap();
    let locate = |blocks| scheduler.locate(&chain.pack(blocks).unwrap(), SECONDS);
    assert_eq!(locate(0..3).wait(SECONDS).unwrap().unwrap().depth, 2);
    assert_eq!(locate(1..3).wait(SECONDS).unwrap().unwrap().depth, 1);
    assert_eq!(locate(2..3).wait(SECONDS).unwrap().unwrap().depth, 0);
    let garbage = scheduler.locate(b"not names", SECONDS);
    assert!(garbage.wait(SECONDS).unwrap().is_err());

    let pinned = worker.pin(&prefix, 1, SECONDS, None).unwrap();
    let pinned = *pinned.wait(SECONDS).unwrap().unwrap();
    assert_eq!(pinned.depth, 1);
    assert_eq!(worker.clear().wait(SECONDS).unwrap().unwrap().kept, 1);
    let stranger = scheduler.unpin(pinned.id, [0; 32], SECONDS);
    let error = stranger.wait(SECONDS).unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    scheduler
        .unpin(pinned.id, identity, SECONDS)
        .wait(SECONDS)
        .unwrap()
        .unwrap();
    assert_eq!(worker.clear().wait(SECONDS).unwrap().unwrap().removed, 1);
    worker.shutdown(SECONDS).wait(SECONDS).unwrap().unwrap();
}

/// Hints about a whole prefix, for a fetch that leaves out its first blocks.
#[test]
fn a_fetch_from_the_middle_reports_by_its_own_positions() {
    let node = AttachedNode::open(NodeConfig::load(None, &minimal()).unwrap()).unwrap();
    let memory = HostMemory::anonymous(4 * 4096).unwrap();
    let region = node
        .node()
        .agent()
        .register(memory, RegionOptions::default())
        .unwrap();
    let segment = Segment {
        region: region.id(),
        offset: 0,
        stride: 4096,
        len: 4096,
    };
    let pages = node.node().pages(vec![segment], 4).unwrap();
    let mut prefix = node.node().prefix(&Namespace::default()).unwrap();
    // Tokens in pieces that do not end where blocks do.
    for tokens in [&[1, 2, 3][..], &[4, 5], &[6, 7, 8, 9, 10, 11, 12], &[13]] {
        prefix.extend(tokens).unwrap();
    }
    let whole = node
        .node()
        .describe(&Namespace::default(), &(1..=13).collect::<Vec<_>>())
        .unwrap();
    assert_eq!(prefix.infos(), whole);
    region.write_at(4096, &[5; 4096]).unwrap();
    let stored = node.store(&prefix, 1, &pages, &[1], SECONDS).unwrap();
    stored.wait(SECONDS).unwrap().unwrap();
    let fetched = node
        .fetch(&prefix, 1, &pages, &[2, 3], Located::default(), SECONDS)
        .unwrap();
    let fetched = fetched.wait(SECONDS).unwrap().unwrap();
    assert_eq!(
        (fetched.depth(), &fetched.sources[..]),
        (1, &[Source::Host, Source::Miss][..])
    );
    let mut bytes = [0; 4096];
    region.read_at(2 * 4096, &mut bytes).unwrap();
    assert_eq!(bytes, [5; 4096]);
    let outside = node.fetch(&prefix, 2, &pages, &[0, 1], Located::default(), SECONDS);
    assert_eq!(outside.map(drop).unwrap_err().kind(), ErrorKind::Invalid);
    node.shutdown(SECONDS).wait(SECONDS).unwrap().unwrap();
}
