//! A real server with a bound for its memory and two tenants: what it gives up, what it still answers, who sees what.
#![cfg(test)]

mod rig;

use kvcache_core::{ErrorKind, Tier};
use kvfabric_indexer::client::{IndexClient, Prompt, SourceKind, SourcePosition};
use kvfabric_indexer::config::TenantConfig;
use kvfabric_indexer::index::BYTES_MIN;
use kvfabric_indexer::publisher::Publisher;
use kvfabric_indexer::server::ServerConfig;
use kvfabric_proto::v1;
use rig::*;

/// Prompts of two blocks, which share nothing: several times what the least bound has room for.
const PROMPTS: u32 = 48_000;
/// Events of a batch.
const BATCH: u32 = 500;

fn tokens(prompt: u32) -> Vec<u32> {
    vec![prompt, 1, 2, 3, 4, 5, 6, prompt]
}

/// A server whose default tenant has the least bound, and another one as much.
fn config_with_tenant() -> ServerConfig {
    let acme = TenantConfig {
        max_bytes: Some(BYTES_MIN.to_string()),
        pods: vec!["acme-".to_owned()],
        models: Vec::new(),
        ..TenantConfig::default()
    };
    ServerConfig {
        metrics_listen: Some("127.0.0.1:0".parse().unwrap()),
        max_bytes: Some("32MiB".to_owned()),
        tenants: [("acme".to_owned(), acme)].into(),
        ..config()
    }
}

/// The value of a series; 0 when it is not there.
fn value(page: &str, series: &str) -> u64 {
    let line = page.lines().find_map(|line| line.strip_prefix(series));
    line.map_or(0, |rest| rest.trim().parse().unwrap())
}

async fn ask(
    raw: &mut kvfabric_proto::v1::index_client::IndexClient<tonic::transport::Channel>,
    tenant: &str,
    prompt: u32,
) -> Result<v1::LookupResponse, tonic::Status> {
    let bytes = tokens(prompt)
        .iter()
        .flat_map(|token| token.to_le_bytes())
        .collect();
    let question = v1::LookupRequest {
        tenant: tenant.to_owned(),
        model: "m".to_owned(),
        prompt: Some(v1::lookup_request::Prompt::Tokens(bytes)),
        ..v1::LookupRequest::default()
    };
    raw.lookup(question).await.map(tonic::Response::into_inner)
}

fn depths(answer: &v1::LookupResponse) -> Vec<(&str, u32)> {
    let pods = answer.pods.iter();
    pods.map(|pod| (pod.pod.as_str(), pod.depth)).collect()
}

/// Stores all prompts, and looks at the bounds after each batch.
async fn overflow(client: &IndexClient, big: &Publisher) {
    let mut question = question(Prompt::Tokens(tokens(7)));
    for first in (0..PROMPTS).step_by(BATCH as usize) {
        let events = (first..first + BATCH).map(|prompt| {
            let name = u64::from(prompt) * 2;
            stored(&[name, name + 1], None, &tokens(prompt), Tier::Device)
        });
        let position = big.publish_engine(events.collect());
        question.min_position = vec![SourcePosition::new(&pod("big-0"), "engine", position)];
        client.lookup(question.clone()).await.unwrap();
        let tenants = client.status().await.unwrap().tenants;
        for tenant in &tenants {
            assert!(tenant.bytes <= tenant.bytes_max.unwrap(), "{tenant:?}");
        }
    }
}

/// One pod of each tenant; that of the default tenant stores far more than its tenant may have.
#[tokio::test]
async fn a_tenant_that_overflows_loses_its_oldest_blocks_and_nobody_elses() {
    let server = start(config_with_tenant()).await;
    let (client, mut raw) = (client(&server), raw(&server).await);
    let (big, small) = (engine("big-0"), engine("acme-0"));
    let of_big = client.register(registration(
        "big-0",
        [big.source("engine", SourceKind::Vllm)],
    ));
    let of_small = client.register(registration(
        "acme-0",
        [small.source("engine", SourceKind::Vllm)],
    ));
    of_big.ready(PATIENCE).await.unwrap();
    of_small.ready(PATIENCE).await.unwrap();

    // Of the other tenant, and first of all: by age alone it would go first.
    let own = small.publish_engine(vec![stored(&[1, 2], None, &tokens(7), Tier::Device)]);
    let mut question = question(Prompt::Tokens(tokens(7)));
    question.min_position = vec![SourcePosition::new(&pod("acme-0"), "engine", own)];
    assert!(
        client
            .lookup(question.clone())
            .await
            .unwrap()
            .pods
            .is_empty()
    );
    overflow(&client, &big).await;

    // The oldest are gone, the newest are there, and none has a pod that does not hold it.
    assert_eq!(depths(&ask(&mut raw, "", 0).await.unwrap()), []);
    let newest = ask(&mut raw, "default", PROMPTS - 1).await.unwrap();
    assert_eq!(depths(&newest), [("big-0", 2)]);
    // Whoever reads the answer can see that it may be short, and how much of the source is missing.
    let lost = newest.freshness[0].evicted;
    assert!(lost > u64::from(PROMPTS) / 2, "{newest:?}");
    for prompt in (0..PROMPTS).step_by(997) {
        let answer = ask(&mut raw, "", prompt).await.unwrap();
        assert!(
            matches!(depths(&answer)[..], [] | [("big-0", 1 | 2)]),
            "{answer:?}"
        );
    }
    // Each tenant sees its own pods only, though both have told of the same prompt.
    assert_eq!(
        depths(&ask(&mut raw, "acme", 7).await.unwrap()),
        [("acme-0", 2)]
    );
    let whole = ask(&mut raw, "acme", 7).await.unwrap();
    assert_eq!(whole.freshness[0].evicted, 0, "{whole:?}");
    assert_eq!(
        depths(&ask(&mut raw, "acme", PROMPTS - 1).await.unwrap()),
        []
    );
    let refusal = ask(&mut raw, "nobody", 7).await.unwrap_err();
    assert!(refusal.message().contains("nobody"), "{refusal}");

    // What the engine evicts later is no fault, and the loss can be seen.
    let gone = big.publish_engine(vec![removed(&[0, 1], Tier::Device)]);
    question.min_position = vec![SourcePosition::new(&pod("big-0"), "engine", gone)];
    client.lookup(question).await.unwrap();
    let newest = ask(&mut raw, "default", PROMPTS - 1).await.unwrap();
    assert_eq!(newest.freshness[0].evicted, lost - 2, "both are withdrawn");
    let page = metrics_page(&server).await;
    let default = r#"{tenant="default",tier="hbm"}"#;
    let evicted = value(
        &page,
        &format!("kvfabric_indexer_tenant_evictions_total{default}"),
    );
    let entries = value(&page, &format!("kvfabric_indexer_tenant_entries{default}"));
    assert_eq!(evicted + entries, u64::from(PROMPTS) * 2);
    assert!(evicted > u64::from(PROMPTS) / 2, "{evicted}");
    assert_eq!(value(&page, "kvcache_index_evictions_total"), evicted);
    let acme = r#"kvfabric_indexer_tenant_evictions_total{tenant="acme",tier="hbm"}"#;
    assert!(page.contains(acme) && value(&page, acme) == 0);
    assert_eq!(value(&page, "kvfabric_indexer_removals_evicted_total"), 2);
    assert_eq!(value(&page, "kvfabric_indexer_removals_unknown_total"), 0);
    assert_eq!(value(&page, "kvfabric_indexer_gaps_total"), 0);
    server.shutdown(PATIENCE).await.unwrap();
}

/// A pod and a question of nobody's, one of a tenant by its name's beginning, and a question that names the default.
#[tokio::test]
async fn where_a_tenant_is_required_nothing_belongs_to_nobody() {
    let mut config = config_with_tenant();
    config.require_tenant = true;
    let server = start(config).await;
    let (client, mut raw) = (client(&server), raw(&server).await);
    let (nobodys, own) = (engine("big-0"), engine("acme-0"));
    let refused = client.register(registration(
        "big-0",
        [nobodys.source("engine", SourceKind::Vllm)],
    ));
    let refused = refused.ready(PATIENCE).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Denied);
    assert!(refused.to_string().contains("big-0"), "{refused}");
    let _registered = join_engine(&client, "acme-0", &own).await;
    for tenant in ["", "default"] {
        let refused = ask(&mut raw, tenant, 7).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
        assert!(refused.message().contains("require_tenant"), "{refused}");
    }
    assert_eq!(depths(&ask(&mut raw, "acme", 7).await.unwrap()), []);
    server.shutdown(PATIENCE).await.unwrap();
}
