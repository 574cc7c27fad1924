//! `kvfabric demo`: a cluster of processes on this machine that finds, moves and verifies blocks.

pub(crate) mod args;
mod cluster;
pub(crate) mod indexer;
mod kill;
mod plan;
pub(crate) mod pod;
mod process;
mod protocol;
mod run;
mod table;
mod tally;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_sim::report::Report;
use kvfabric_sim::router::Policy;

use self::args::DemoArgs;
use self::cluster::Cluster;
use self::kill::Assassin;
use self::plan::Plan;
use self::protocol::{Done, PodCounters, Work};
use self::run::Run;
use self::tally::IndexCounters;

/// How long a pod may take to tell its counters.
const STATS_DEADLINE: Duration = Duration::from_secs(10);

/// Runs the demo; prints the table, writes the JSON, and fails if any promise was broken.
///
/// # Errors
/// Bad options or input, a process that did not start, and every broken promise: a wrong byte, counts that do not add
/// up, or, unbounded, hits that differ from an infinite cache's.
pub(crate) async fn run(args: DemoArgs) -> Result<()> {
    let plan = Plan::new(&args)?;
    kill::check(&args)?;
    let json = args.json.as_deref().map(JsonFile::create).transpose()?;
    let stop = Arc::new(AtomicBool::new(false));
    stop_at_ctrl_c(Arc::clone(&stop));
    let policy = plan::policy(args.router);
    let mut report = one_run(&args, &plan, policy, &stop).await?;
    let compare = !args.no_comparison && args.kill_pod.is_none() && !stop.load(Ordering::Relaxed);
    if compare {
        let other = if policy == Policy::RoundRobin {
            report.clone()
        } else {
            one_run(&args, &plan, Policy::RoundRobin, &stop).await?
        };
        if !stop.load(Ordering::Relaxed) {
            report.round_robin_cluster_hit_ratio = Some(other.cluster_hit_ratio);
            report.round_robin_local_hit_ratio = Some(other.local_hit_ratio);
        }
    }
    say(&table::render(&report))?;
    if let Some(json) = json {
        json.finish(&report)?;
    }
    report.check()?;
    if stop.load(Ordering::Relaxed) {
        return Err(Error::new(
            ErrorKind::Cancelled,
            "interrupted: the figures are of a part",
        ));
    }
    check_exactness(&args, &plan, &report)
}

/// Unbounded, what one pod lacks another supplies: the hits are the infinite cache's, block for block.
fn check_exactness(args: &DemoArgs, plan: &Plan, report: &Report) -> Result<()> {
    let (hits, expected) = (report.hits.total(), plan.infinite);
    if !args.unbounded || args.kill_pod.is_some() {
        return Ok(());
    }
    if hits != expected.hits || report.block_accesses != expected.accesses {
        let text = format!(
            "unbounded, {hits} of {} accesses hit, but an infinite cache hits {} of {}",
            report.block_accesses, expected.hits, expected.accesses
        );
        return Err(Error::new(ErrorKind::Internal, text));
    }
    Ok(())
}

/// Starts a cluster, runs the workload through it, and stops it.
async fn one_run(
    args: &DemoArgs,
    plan: &Plan,
    policy: Policy,
    stop: &AtomicBool,
) -> Result<Report> {
    let folder = match &args.dir {
        Some(dir) => tempfile::Builder::new().prefix("kvfabric-").tempdir_in(dir),
        None => tempfile::Builder::new().prefix("kvfabric-").tempdir(),
    }
    .map_err(|e| Error::io("temporary folder for the tiers", e))?;
    let bar = progress_bar(plan.requests.len(), policy);
    bar.set_message("starting pods");
    let cluster = Arc::new(Cluster::start(args, plan, folder.path()).await?);
    bar.set_message(policy.name());
    let assassin = Assassin::start(args, &cluster);
    let run = Arc::new(Run::new(Arc::clone(&cluster), plan, policy, args.seed));
    let replayed = run.replay(plan, stop, || bar.inc(1)).await;
    let kills = assassin.finish().await;
    let tally = match replayed {
        Ok(tally) => tally,
        Err(error) => {
            // The first error says what happened; a failing stop would only hide it.
            let _ = cluster.stop().await;
            return Err(error);
        }
    };
    let counters = pod_counters(&cluster).await;
    let index = index_counters(&cluster).await?;
    let mut report = tally.report(plan, &cluster, &counters, index);
    report.seed = args.seed;
    policy.name().clone_into(&mut report.config.router);
    report.config.object = cluster.object_url().map(str::to_owned);
    report.kills = kills?;
    if let Some(kill) = report.kills.first_mut() {
        kill.requests_retried = tally.retried;
    }
    cluster.stop().await?;
    bar.finish_and_clear();
    Ok(report)
}

/// What the living pods counted; the dead took theirs along.
async fn pod_counters(cluster: &Cluster) -> Vec<Option<PodCounters>> {
    let mut counters = Vec::new();
    for pod in cluster.pods() {
        counters.push(
            match pod.process().call(Work::Stats, STATS_DEADLINE).await {
                Ok(Done::Stats(counted)) => Some(counted),
                Ok(_) | Err(_) => None,
            },
        );
    }
    counters
}

async fn index_counters(cluster: &Cluster) -> Result<IndexCounters> {
    let status = cluster.index().status().await?;
    Ok(IndexCounters {
        applied: status.events_applied,
        rejected: status.events_rejected,
        lag_p50_us: status.lag_p50_us,
        lag_p99_us: status.lag_p99_us,
    })
}

fn progress_bar(requests: usize, policy: Policy) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(requests as u64), ProgressDrawTarget::stderr());
    let style = "{msg:>13} [{bar:40}] {pos}/{len} requests, {elapsed} elapsed, {eta} to go";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(policy.name());
    bar
}

/// The first Ctrl-C ends the run with the figures it has; the second ends the program.
fn stop_at_ctrl_c(stop: Arc<AtomicBool>) {
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            stop.store(true, Ordering::Relaxed);
        }
        if tokio::signal::ctrl_c().await.is_ok() {
            std::process::exit(130);
        }
    });
}

fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .map_err(|e| Error::io("write the table", e))
}

/// The report's file: opened before the run, so that a wrong path costs no minute, and put in place whole.
struct JsonFile {
    path: std::path::PathBuf,
    file: tempfile::NamedTempFile,
}

impl JsonFile {
    fn create(path: &Path) -> Result<Self> {
        let failed = |e| Error::io(format!("--json {}", path.display()), e);
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    fn finish(mut self, report: &Report) -> Result<()> {
        let failed = |e| Error::io(format!("--json {}", self.path.display()), e);
        self.file
            .write_all(report.to_json()?.as_bytes())
            .map_err(failed)?;
        self.file.persist(&self.path).map_err(|e| failed(e.error))?;
        Ok(())
    }
}
