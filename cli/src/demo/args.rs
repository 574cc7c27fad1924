//! The demo's options, checked as soon as they are read.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use kvcache_core::{Error, ErrorKind, Result};

/// How many pods a demo may have of each kind: it is one machine.
const PODS_MAX: u32 = 64;

/// Runs a small cluster on this machine: an indexer, prefill and decode pods, a router and a workload.
#[derive(Args, Clone, Debug)]
pub(crate) struct DemoArgs {
    /// Prefill and decode pods, as P:D.
    #[arg(long, default_value = "2:2", value_name = "P:D", value_parser = parse_pods)]
    pub(crate) pods: Pods,
    /// Bytes of each pod's HBM tier (plain memory here), with an optional K, M or G.
    #[arg(long, default_value = "12M", value_parser = parse_bytes, value_name = "BYTES")]
    pub(crate) hbm_bytes: u64,
    /// Bytes of each pod's DRAM tier.
    #[arg(long, default_value = "16M", value_parser = parse_bytes, value_name = "BYTES")]
    pub(crate) dram_bytes: u64,
    /// Bytes of each pod's NVMe tier; 0 for none.
    #[arg(long, default_value = "24M", value_parser = parse_bytes, value_name = "BYTES")]
    pub(crate) nvme_bytes: u64,
    /// The shared object tier: a file:// or s3:// URL, or "none". A temporary folder by default.
    #[arg(long, value_name = "URL")]
    pub(crate) object: Option<String>,
    /// Bytes of a block.
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES", conflicts_with = "model")]
    pub(crate) block_bytes: Option<u64>,
    /// Take the bytes of a block from this model's geometry (bf16).
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Tokens of a block in generated workloads; a trace has its own.
    #[arg(long, default_value_t = 16, value_name = "TOKENS")]
    pub(crate) block_tokens: u32,
    /// How the router chooses pods.
    #[arg(long, value_enum, default_value_t = RouterKind::Prefix)]
    pub(crate) router: RouterKind,
    /// How blocks move between pods.
    #[arg(long, value_enum, default_value_t = TransportKind::Auto)]
    pub(crate) transport: TransportKind,
    /// Replay this trace (JSON lines in Mooncake's schema) instead of a generated workload.
    #[arg(long, value_name = "FILE", conflicts_with = "workload")]
    pub(crate) trace: Option<PathBuf>,
    /// The generated workload.
    #[arg(long, value_enum, default_value_t = WorkloadKind::Chat)]
    pub(crate) workload: WorkloadKind,
    /// Change a setting of the generated workload, like --setting turns=3-8; an unknown name lists them all. Repeatable.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_setting, conflicts_with = "trace")]
    pub(crate) setting: Vec<(String, String)>,
    /// Issue each request no earlier than its own time (a trace's timestamp, a generator's arrival); by default, as soon
    /// as --concurrency allows.
    #[arg(long)]
    pub(crate) paced: bool,
    /// Fixes the workload and every random choice.
    #[arg(long, default_value_t = 42)]
    pub(crate) seed: u64,
    /// Stop after this many requests.
    #[arg(long, value_name = "N")]
    pub(crate) max_requests: Option<usize>,
    /// Requests in flight at once.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) concurrency: u32,
    /// No tier evicts, and requests run one at a time: hits are then the workload's infinite-cache hits exactly.
    #[arg(long)]
    pub(crate) unbounded: bool,
    /// Kill a prefill pod (SIGKILL) after this many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub(crate) kill_pod: Option<Duration>,
    /// Skip the second run under round-robin that the table compares with.
    #[arg(long)]
    pub(crate) no_comparison: bool,
    /// Tokens a second that a prefill pod is modelled to compute.
    #[arg(long, default_value_t = 10_000.0, value_name = "N", value_parser = parse_rate)]
    pub(crate) prefill_tokens_per_second: f64,
    /// Write the report to this file as JSON.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Folder for the tiers' files; a temporary one, removed at the end, by default.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) dir: Option<PathBuf>,
}

/// How many pods of each kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pods {
    pub(crate) prefill: u32,
    pub(crate) decode: u32,
}

/// Routing policies, as the command line names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RouterKind {
    /// The pod with the longest cached prefix, the less loaded one among equals.
    Prefix,
    /// One after the other.
    RoundRobin,
    /// A seeded coin.
    Random,
    /// The least loaded.
    Load,
}

/// Paths between pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TransportKind {
    /// Shared memory on one host, else TCP.
    Auto,
    /// Shared memory only.
    Shm,
    /// TCP only.
    Tcp,
    /// RDMA only, by libibverbs; needs a device.
    Verbs,
}

impl TransportKind {
    /// The name, as configuration files and reports have it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
            Self::Verbs => "verbs",
        }
    }
}

/// Generated workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WorkloadKind {
    /// Conversations of several turns over shared system prompts.
    Chat,
    /// Loops of growing context.
    Agent,
    /// Questions over shared documents.
    Rag,
}

fn invalid(text: &str, expected: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("{text:?} is not {expected}"))
}

fn parse_pods(text: &str) -> Result<Pods> {
    let expected = "two counts between 1 and 64, like 2:2";
    let (prefill, decode) = text
        .split_once(':')
        .ok_or_else(|| invalid(text, expected))?;
    let count = |part: &str| match part.parse::<u32>() {
        Ok(count) if (1..=PODS_MAX).contains(&count) => Ok(count),
        _ => Err(invalid(text, expected)),
    };
    Ok(Pods {
        prefill: count(prefill)?,
        decode: count(decode)?,
    })
}

/// Reads a count of bytes: digits, then nothing or K, M, G (powers of 1024).
pub(crate) fn parse_bytes(text: &str) -> Result<u64> {
    let expected = "a number of bytes, like 65536, 64K, 48M or 2G";
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|count| count.checked_mul(1 << shift))
        .ok_or_else(|| invalid(text, expected))
}

fn parse_setting(text: &str) -> Result<(String, String)> {
    text.split_once('=')
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .ok_or_else(|| invalid(text, "NAME=VALUE"))
}

fn parse_seconds(text: &str) -> Result<Duration> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(invalid(text, "a number of seconds between 0 and 86400")),
    }
}

fn parse_rate(text: &str) -> Result<f64> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err(invalid(text, "a positive number")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes with and without suffix, and what is refused, by example.
    #[test]
    fn sizes_are_read_with_their_suffix_and_nothing_else() {
        assert_eq!(parse_bytes("65536").unwrap(), 65_536);
        assert_eq!(parse_bytes("64K").unwrap(), 65_536);
        assert_eq!(parse_bytes("2g").unwrap(), 2 << 30);
        for text in ["", "K", "-1", "1.5M", "1T", "18446744073709551615K"] {
            let error = parse_bytes(text).unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
    }

    /// Pod counts, by example.
    #[test]
    fn pod_counts_name_what_they_expected() {
        assert_eq!(
            parse_pods("3:1").unwrap(),
            Pods {
                prefill: 3,
                decode: 1
            }
        );
        for text in ["2", "0:1", "1:65", "a:b", "1:1:1"] {
            assert!(
                parse_pods(text).unwrap_err().to_string().contains("2:2"),
                "{text}"
            );
        }
    }
}
