//! The commands that ask a running index.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use kvcache_core::ports::Position;
use kvcache_core::{Error, ErrorKind, IndexKey, PodName, Result, Tier};
use kvfabric_proto::v1;
use serde_json::json;

use super::print_line;
use crate::client::{
    ClientConfig, Freshness, GroupRule, IndexClient, LookupAnswer, LookupOptions, LookupRequest,
    PartDepth, PodDepth, Prompt, Ranking, ScoreTerm,
};

/// The most tokens a file may hold.
const TOKENS_MAX: usize = 4 << 20;

/// Where the index is.
#[derive(Clone, Debug, Args)]
pub(super) struct Target {
    /// The index's gRPC address.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
    address: String,
    /// How long to wait for the answer, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 5_000)]
    deadline_ms: u64,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub(super) json: bool,
}

impl Target {
    pub(super) fn client(&self) -> Result<IndexClient> {
        let mut config = ClientConfig::new(&self.address);
        config.deadline = Duration::from_millis(self.deadline_ms);
        IndexClient::new(config)
    }
}

/// Ask a running index who holds a prompt.
#[derive(Clone, Debug, Args)]
pub struct Query {
    #[command(flatten)]
    target: Target,
    /// Whose entries to look at; not needed for the default tenant, nor where the model says it.
    #[arg(long, default_value = "")]
    tenant: String,
    /// The model as the pods registered it; not needed when there is only one.
    #[arg(long, default_value = "")]
    model: String,
    /// The adapter.
    #[arg(long, default_value = "")]
    lora: String,
    /// The tenant's cache salt.
    #[arg(long, default_value = "")]
    cache_salt: String,
    /// Token ids, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "ID,ID,…", required_unless_present_any = ["tokens_file", "keys"])]
    tokens: Vec<u32>,
    /// A file with a JSON array of token ids.
    #[arg(long, value_name = "FILE", conflicts_with = "tokens")]
    tokens_file: Option<PathBuf>,
    /// Index keys in hexadecimal, separated by commas.
    #[arg(long, value_delimiter = ',', value_parser = parse_key, value_name = "HEX,HEX,…", conflicts_with_all = ["tokens", "tokens_file"])]
    keys: Vec<u64>,
    /// At most so many pods, deepest first; 0 for all.
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pods_max: u32,
    /// Only these pods, separated by commas.
    #[arg(long, value_delimiter = ',', value_parser = PodName::new, value_name = "POD,POD,…")]
    pods: Vec<PodName>,
    /// Order by score instead of depth.
    #[arg(long)]
    by_score: bool,
    /// Say how each score comes about, and how fresh each source is.
    #[arg(long)]
    explain: bool,
    /// Record that the prompt goes to this pod, after the answer, as a router does: its blocks are expected there.
    #[arg(long, value_parser = PodName::new, value_name = "POD")]
    record: Option<PodName>,
}

fn parse_key(text: &str) -> Result<u64, std::num::ParseIntError> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16)
}

impl Query {
    pub(super) async fn run(self) -> Result<()> {
        let prompt = match &self.tokens_file {
            Some(path) => Prompt::Tokens(read_tokens(path)?),
            None if self.keys.is_empty() => Prompt::Tokens(self.tokens.clone()),
            None => Prompt::Keys(self.keys.iter().map(|key| IndexKey(*key)).collect()),
        };
        let mut request = LookupRequest::new(self.model, prompt);
        (request.lora, request.cache_salt) = (self.lora, self.cache_salt);
        request.tenant = self.tenant;
        (request.pods_max, request.pods) = (self.pods_max, self.pods);
        let options = LookupOptions {
            ranking: if self.by_score {
                Ranking::Score
            } else {
                Ranking::Depth
            },
            explain: self.explain,
        };
        let client = self.target.client()?;
        let answer = client.lookup_with(request.clone(), options).await?;
        let recorded = match &self.record {
            Some(pod) => Some(client.record_routing(pod, request, None).await?),
            None => None,
        };
        if self.target.json {
            let mut told = to_json(&answer);
            if let Some(recorded) = recorded {
                told["recorded"] =
                    json!({ "depth": recorded.depth, "expected": recorded.expected });
            }
            return print_line(&told.to_string());
        }
        print(&answer, self.explain)?;
        match (recorded, self.record) {
            (Some(recorded), Some(pod)) => print_line(&format!(
                "recorded for {pod}: it holds {}, {} more are expected",
                recorded.depth, recorded.expected
            )),
            _ => Ok(()),
        }
    }
}

fn read_tokens(path: &PathBuf) -> Result<Vec<u32>> {
    let place = path.display();
    let text =
        std::fs::read_to_string(path).map_err(|error| Error::io(format!("read {place}"), error))?;
    let tokens: Vec<u32> = serde_json::from_str(&text).map_err(|error| {
        let context = format!("{place}: not a JSON array of token ids");
        Error::new(ErrorKind::Invalid, context).with_source(error)
    })?;
    if tokens.len() > TOKENS_MAX {
        return Err(Error::invalid("tokens", tokens.len(), 0..=TOKENS_MAX).at(place));
    }
    Ok(tokens)
}

fn print(answer: &LookupAnswer, explain: bool) -> Result<()> {
    print_line(&format!(
        "{} blocks of {} tokens; shared tiers hold {}",
        answer.blocks, answer.block_size, answer.shared_depth
    ))?;
    for pod in &answer.pods {
        let tiers = Tier::ALL
            .into_iter()
            .zip(pod.by_tier)
            .filter(|(_, blocks)| *blocks > 0);
        let tiers: Vec<_> = tiers
            .map(|(tier, blocks)| format!("{tier} {blocks}"))
            .collect();
        print_line(&format!(
            "{:<24} depth {:>6}  score {:>10.2}  {}{}",
            pod.pod.as_str(),
            pod.depth,
            pod.score,
            tiers.join(", "),
            expected(pod)
        ))?;
        if explain {
            let terms = pod.terms.iter().map(|term| {
                let ScoreTerm {
                    tier,
                    blocks,
                    weight,
                    medium,
                } = term;
                let medium = medium.as_ref().map(|medium| format!(" ({medium})"));
                format!(
                    "{blocks} in {tier}{} x {weight}",
                    medium.unwrap_or_default()
                )
            });
            let terms: Vec<_> = terms.collect();
            print_line(&format!("  score = {}", terms.join(" + ")))?;
            pod.parts.iter().try_for_each(print_part)?;
        }
    }
    for pool in &answer.pools {
        let held: Vec<_> = pool.held.iter().map(|held| format!("{held:?}")).collect();
        let users: Vec<_> = pool.pods.iter().map(PodName::as_str).collect();
        print_line(&format!(
            "pool {:<19} depth {:>6}  blocks {}  for {}",
            pool.pool.as_str(),
            pool.depth,
            held.join(", "),
            users.join(", ")
        ))?;
    }
    if explain {
        for (source, freshness) in answer.positions.iter().zip(&answer.freshness) {
            let Position { epoch, next } = source.position;
            let fresh = fresh(freshness);
            print_line(&format!(
                "{:<24} epoch {epoch}, sequence {next}, {fresh}",
                source.source
            ))?;
        }
    }
    Ok(())
}

/// What is not confirmed by events, in words.
fn expected(pod: &PodDepth) -> String {
    match (pod.is_approximate, pod.expected_depth) {
        (true, _) => "  (approximate)".to_owned(),
        (false, 0) => String::new(),
        (false, depth) => format!("  (expected {depth})"),
    }
}

fn print_part(part: &PartDepth) -> Result<()> {
    let rank = part
        .rank
        .map_or_else(|| "all".to_owned(), |rank| rank.to_string());
    print_line(&format!(
        "  rank {rank:<4} depth {:>6}  score {:>10.2}",
        part.depth, part.score
    ))?;
    for (group, depth) in &part.groups {
        let rule = match group.rule {
            GroupRule::Window { tokens } => format!("window of {tokens} tokens"),
            rule => rule.name().to_owned(),
        };
        print_line(&format!(
            "    group {:<4} allows {depth:>6}  {rule}",
            group.number
        ))?;
    }
    Ok(())
}

/// In words.
fn fresh(freshness: &Freshness) -> String {
    let is = match (freshness.is_connected, freshness.is_current) {
        (_, true) => "current",
        (true, false) => "catching up",
        (false, false) => "not connected",
    };
    let heard = match freshness.heard {
        Some(heard) => format!("heard {} ms ago", heard.as_millis()),
        None => "never heard".to_owned(),
    };
    let evicted = match freshness.evicted {
        0 => String::new(),
        entries => format!("; {entries} entries given up for lack of room: it may hold more"),
    };
    format!(
        "{is}, lag {} us, {heard}{evicted}",
        freshness.lag.as_micros()
    )
}

fn to_json(answer: &LookupAnswer) -> serde_json::Value {
    let pods = answer.pods.iter().map(|pod| {
        let tiers = Tier::ALL.into_iter().zip(pod.by_tier);
        let tiers: serde_json::Map<_, _> = tiers
            .map(|(tier, blocks)| (tier.name().to_owned(), json!(blocks)))
            .collect();
        json!({
            "pod": pod.pod.as_str(),
            "depth": pod.depth,
            "score": pod.score,
            "by_tier": tiers,
            "terms": pod.terms.iter().map(|term| json!({
                "tier": term.tier.name(),
                "blocks": term.blocks,
                "weight": term.weight,
                "medium": term.medium,
            })).collect::<Vec<_>>(),
            "peer_address": pod.peer_address,
            "expected_depth": pod.expected_depth,
            "approximate": pod.is_approximate,
            "parts": pod.parts.iter().map(|part| json!({
                "data_parallel_rank": part.rank,
                "depth": part.depth,
                "score": part.score,
                "groups": part.groups.iter().map(|(group, depth)| json!({
                    "group": group.number,
                    "rule": group.rule.name(),
                    "depth": depth,
                })).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
        })
    });
    let positions = answer.positions.iter().zip(&answer.freshness);
    let positions = positions.map(|(source, freshness)| {
        json!({
            "source": source.source,
            "epoch": source.position.epoch.0,
            "next_sequence": source.position.next.0,
            "connected": freshness.is_connected,
            "current": freshness.is_current,
            "lag_us": freshness.lag.as_micros() as u64,
            "heard_us": freshness.heard.map(|heard| heard.as_micros() as u64),
            "evicted": freshness.evicted,
        })
    });
    json!({
        "blocks": answer.blocks,
        "block_size": answer.block_size,
        "shared_depth": answer.shared_depth,
        "pods": pods.collect::<Vec<_>>(),
        "pools": answer.pools.iter().map(|pool| json!({
            "pool": pool.pool.as_str(),
            "depth": pool.depth,
            "held": pool.held.iter().map(|held| [held.start, held.end]).collect::<Vec<_>>(),
            "pods": pool.pods.iter().map(PodName::as_str).collect::<Vec<_>>(),
            "peer_address": pool.peer_address,
        })).collect::<Vec<_>>(),
        "positions": positions.collect::<Vec<_>>(),
    })
}

/// List the pods and sources of a running index.
#[derive(Clone, Debug, Args)]
pub struct Pods {
    #[command(flatten)]
    target: Target,
}

impl Pods {
    pub(super) async fn run(self) -> Result<()> {
        let status = self.target.client()?.status().await?;
        if self.target.json {
            let pods = status.pods.iter().map(|pod| {
                let sources = pod.sources.iter().map(source_json);
                json!({
                    "pod": pod.pod,
                    "entries": pod.entries,
                    "peer_address": pod.peer_address,
                    "sources": sources.collect::<Vec<_>>(),
                })
            });
            let pods: Vec<_> = pods.collect();
            return print_line(
                &json!({
                    "version": status.version,
                    "key_scheme": status.key_scheme,
                    "block_size": status.block_size,
                    "blocks": status.blocks,
                    "entries": status.entries,
                    "tenants": status.tenants.iter().map(tenant_json).collect::<Vec<_>>(),
                    "pods": pods,
                })
                .to_string(),
            );
        }
        print_line(&format!(
            "{} pods, {} blocks, {} entries; keys {}, {} tokens a block",
            status.pods.len(),
            status.blocks,
            status.entries,
            status.key_scheme,
            status.block_size
        ))?;
        for tenant in &status.tenants {
            print_line(&tenant_line(tenant))?;
        }
        for pod in &status.pods {
            print_line(&format!("{:<24} entries {}", pod.pod, pod.entries))?;
            for source in &pod.sources {
                let position = source.position.clone().unwrap_or_default();
                let connected = if source.connected {
                    "connected"
                } else {
                    "not connected"
                };
                print_line(&format!(
                    "  {:<22} {connected}, epoch {}, sequence {}, gaps {}, resyncs {}",
                    position.source,
                    position.epoch,
                    position.next_sequence,
                    source.gaps,
                    source.resyncs
                ))?;
            }
        }
        Ok(())
    }
}

fn source_json(source: &v1::SourceStatus) -> serde_json::Value {
    let position = source.position.clone().unwrap_or_default();
    json!({
        "source": position.source,
        "epoch": position.epoch,
        "next_sequence": position.next_sequence,
        "connected": source.connected,
        "gaps": source.gaps,
        "replays": source.replays,
        "resyncs": source.resyncs,
        "orphans": source.orphans,
        "evicted": source.freshness.map_or(0, |fresh| fresh.evicted),
    })
}

fn tiers(tenant: &v1::TenantStatus) -> impl Iterator<Item = (&'static str, &v1::TierUsage)> {
    // Tiers are numbered from 1 on the wire, in the order of `Tier::ALL`; numbers of a later version are passed over.
    tenant.tiers.iter().filter_map(|used| {
        let place = usize::try_from(used.tier).ok()?.checked_sub(1)?;
        Some((Tier::ALL.get(place)?.name(), used))
    })
}

pub(super) fn tenant_json(tenant: &v1::TenantStatus) -> serde_json::Value {
    let by_tier = tiers(tenant).map(|(tier, used)| {
        let counts = json!({
            "entries": used.entries,
            "bytes": used.bytes,
            "evicted": used.evicted,
        });
        (tier.to_owned(), counts)
    });
    json!({
        "tenant": tenant.tenant,
        "bytes": tenant.bytes,
        "bytes_max": tenant.bytes_max,
        "blocks_evicted": tenant.blocks_evicted,
        "tiers": by_tier.collect::<serde_json::Map<_, _>>(),
    })
}

pub(super) fn tenant_line(tenant: &v1::TenantStatus) -> String {
    let most = tenant
        .bytes_max
        .map_or_else(String::new, |most| format!(" of {most}"));
    let by_tier: Vec<String> = tiers(tenant)
        .filter(|(_, used)| used.entries + used.evicted > 0)
        .map(|(tier, used)| {
            let v1::TierUsage {
                entries,
                bytes,
                evicted,
                ..
            } = used;
            format!("{tier} {entries} (bytes {bytes}, evicted {evicted})")
        })
        .collect();
    format!(
        "tenant {:<17} bytes {}{most}, entries: {}",
        tenant.tenant,
        tenant.bytes,
        by_tier.join(", ")
    )
}
