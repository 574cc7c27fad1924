//! Addresses that are one tenant's: whoever calls there sees, names and registers nothing of others; over real gRPC.
#![cfg(test)]

mod rig;

use kvcache_core::Tier;
use kvfabric_indexer::config::TenantConfig;
use kvfabric_indexer::publisher::Publisher;
use kvfabric_indexer::server::Running;
use kvfabric_proto::v1;
use kvfabric_proto::v1::index_client::IndexClient as Grpc;
use kvfabric_proto::v1::lookup_reply::Outcome;
use rig::*;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

const TENANTS: [&str; 2] = ["acme", "globex"];

/// Two tenants with an address and an engine each, whose engines hold the same prompt.
struct Both {
    server: Running,
    engines: Vec<Publisher>,
    /// The engines' registrations last as long.
    _kept: Vec<tokio::sync::mpsc::Sender<v1::RegisterRequest>>,
    _tokenizer: tempfile::NamedTempFile,
}

impl Both {
    async fn start() -> Self {
        let file = tokenizer_file();
        let mut config = config();
        config.tokenizers.push(tokenizer(&file));
        for name in TENANTS {
            let rules = TenantConfig {
                pods: vec![format!("{name}-")],
                grpc_listen: Some("127.0.0.1:0".parse().unwrap()),
                ..TenantConfig::default()
            };
            config.tenants.insert(name.to_owned(), rules);
        }
        let server = start(config).await;
        let (mut engines, mut kept) = (Vec::new(), Vec::new());
        for name in TENANTS {
            let pod = format!("{name}-0");
            let engine = engine(&pod);
            engine.publish_engine(vec![stored(&[1, 2], None, &TOKENS, Tier::Device)]);
            // Each at its own address.
            let mut at = at(&server, name).await;
            let request = wire_registration(&pod, &engine);
            let (sender, mut answers) = register_raw(&mut at, request).await.unwrap();
            while !answers.message().await.unwrap().unwrap().ready {}
            kept.push(sender);
            engines.push(engine);
        }
        Self {
            server,
            engines,
            _kept: kept,
            _tokenizer: file,
        }
    }
}

/// A caller at a tenant's address.
async fn at(server: &Running, tenant: &str) -> Grpc<Channel> {
    let address = server.tenant_addresses()[tenant];
    Grpc::connect(format!("http://{address}")).await.unwrap()
}

fn asked(tenant: &str) -> v1::LookupRequest {
    let tokens = TOKENS.iter().flat_map(|token| token.to_le_bytes());
    v1::LookupRequest {
        model: "m".to_owned(),
        tenant: tenant.to_owned(),
        prompt: Some(v1::lookup_request::Prompt::Tokens(
            tokens.collect::<Vec<u8>>().into(),
        )),
        ..v1::LookupRequest::default()
    }
}

fn pods(answer: &v1::LookupResponse) -> Vec<&str> {
    let pods = answer.pods.iter();
    pods.map(|found| found.pod.as_str()).collect()
}

/// The call was refused because the address is acme's, and says whose what it asked for is.
fn assert_denied(status: &Status, other: &str) {
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    let said = status.message();
    assert!(said.contains("acme") && said.contains(other), "{said}");
}

/// Lookups of every kind, routings and llm-d's scores: without a name, with one's own, and with another tenant's.
#[tokio::test]
async fn a_caller_at_a_tenants_address_sees_its_own_and_may_name_no_other() {
    let both = Both::start().await;
    let mut acme = at(&both.server, "acme").await;
    for own in ["", "acme"] {
        let answer = acme.lookup(asked(own)).await.unwrap().into_inner();
        assert_eq!(pods(&answer), ["acme-0"]);
        assert_eq!(answer.positions.len(), 1);
    }
    for other in ["globex", "default", "nobody"] {
        assert_denied(&acme.lookup(asked(other)).await.unwrap_err(), other);
    }
    let questions = vec![asked("globex"), asked("")];
    let batch = v1::LookupBatchRequest { questions };
    let replies = acme.lookup_batch(batch).await.unwrap().into_inner().replies;
    let Some(Outcome::Failure(failure)) = &replies[0].outcome else {
        panic!("{replies:?}");
    };
    assert_eq!(failure.code, Code::PermissionDenied as u32);
    assert!(failure.message.contains("globex") && failure.message.contains("acme"));
    assert!(
        matches!(&replies[1].outcome, Some(Outcome::Answer(answer)) if pods(answer) == ["acme-0"])
    );
    let questions = tokio_stream::iter([asked("globex"), asked("acme")]);
    let mut replies = acme.lookup_stream(questions).await.unwrap().into_inner();
    let first = replies.message().await.unwrap().unwrap();
    assert!(
        matches!(first.outcome, Some(Outcome::Failure(_))),
        "{first:?}"
    );
    let second = replies.message().await.unwrap().unwrap();
    assert!(matches!(&second.outcome, Some(Outcome::Answer(answer)) if pods(answer) == ["acme-0"]));

    let routing = |tenant: &str, pod: &str| v1::RecordRoutingRequest {
        model: "m".to_owned(),
        tenant: tenant.to_owned(),
        pod: pod.to_owned(),
        prompt: Some(v1::record_routing_request::Prompt::Tokens(
            vec![0_u8; 64].into(),
        )),
        ..v1::RecordRoutingRequest::default()
    };
    let refused = acme.record_routing(routing("globex", "globex-0")).await;
    assert_denied(&refused.unwrap_err(), "globex");
    let unknown = acme
        .record_routing(routing("", "globex-0"))
        .await
        .unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    acme.record_routing(routing("", "acme-0")).await.unwrap();

    let scores = scores_of(both.server.tenant_addresses()["acme"], prompt_text())
        .await
        .unwrap();
    assert_eq!(scores, [("acme-0".to_owned(), 2.0)]);
    // At the address of all, anybody may name any tenant.
    let mut any = raw(&both.server).await;
    for name in TENANTS {
        let answer = any.lookup(asked(name)).await.unwrap().into_inner();
        assert_eq!(pods(&answer), [format!("{name}-0")]);
    }
    assert_eq!(both.engines.len(), 2);
}

/// What others have is neither listed nor waited for, and cannot be had as a whole.
#[tokio::test]
async fn a_caller_at_a_tenants_address_learns_nothing_of_others() {
    let both = Both::start().await;
    let mut acme = at(&both.server, "acme").await;
    let status = acme
        .status(v1::StatusRequest {})
        .await
        .unwrap()
        .into_inner();
    let known: Vec<_> = status.pods.iter().map(|pod| pod.pod.as_str()).collect();
    let tenants: Vec<_> = status
        .tenants
        .iter()
        .map(|held| held.tenant.as_str())
        .collect();
    assert_eq!((known, tenants), (vec!["acme-0"], vec!["acme"]));
    assert_eq!(
        (status.blocks, status.entries, status.events_applied),
        (2, 2, 0)
    );
    let all = raw(&both.server).await.status(v1::StatusRequest {}).await;
    let all = all.unwrap().into_inner();
    assert_eq!((all.pods.len(), all.entries, all.events_applied), (2, 4, 2));

    let snapshot = v1::SnapshotRequest {
        protocol_version: kvfabric_proto::PROTOCOL_VERSION,
        format: 2,
    };
    assert_denied(&acme.snapshot(snapshot).await.unwrap_err(), "snapshot");
    let position = v1::SourcePosition {
        source: "globex-0/engine".to_owned(),
        epoch: 0,
        next_sequence: 0,
    };
    let mut waiting = Request::new(v1::LookupRequest {
        min_position: vec![position.clone()],
        ..asked("")
    });
    waiting.set_timeout(std::time::Duration::from_millis(500));
    let status = acme.lookup(waiting).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(!status.message().contains("connected"), "{status}");
    // Whoever may see it has it at once.
    let waiting = v1::LookupRequest {
        min_position: vec![position],
        ..asked("globex")
    };
    at(&both.server, "globex")
        .await
        .lookup(waiting)
        .await
        .unwrap();
}

/// A pod of another tenant, by its name, and one of one's own.
#[tokio::test]
async fn a_caller_at_a_tenants_address_registers_its_own_pods_only() {
    let both = Both::start().await;
    let mut acme = at(&both.server, "acme").await;
    let engine = engine("acme-1");
    for name in ["globex-0", "globex-1"] {
        let refused = register_raw(&mut acme, wire_registration(name, &engine)).await;
        assert_denied(&refused.unwrap_err(), name);
    }
    let unclaimed = register_raw(&mut acme, wire_registration("elsewhere", &engine)).await;
    assert_denied(&unclaimed.unwrap_err(), "default");
    let mine = register_raw(&mut acme, wire_registration("acme-1", &engine)).await;
    let (_kept, mut answers) = mine.unwrap();
    while !answers.message().await.unwrap().unwrap().ready {}
    let status = acme
        .status(v1::StatusRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(status.pods.len(), 2);
    // The other's pod is still there, and still its own.
    let mut globex = at(&both.server, "globex").await;
    let answer = globex.lookup(asked("")).await.unwrap().into_inner();
    assert_eq!(pods(&answer), ["globex-0"]);
}
