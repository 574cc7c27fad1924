//! Kills a pod in the middle of a run, and watches it leave the index.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_sim::report::KillReport;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::args::DemoArgs;
use super::cluster::{Cluster, Role};

/// How often the index is asked whether the pod is still there.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// How long it is asked.
const ASK_FOR: Duration = Duration::from_secs(10);

/// Waits for its moment in a task of its own.
pub(crate) struct Assassin {
    /// Its own end of the workload: a kill that is not due yet is called off.
    ended: watch::Sender<bool>,
    task: JoinHandle<Result<Vec<KillReport>>>,
}

/// Refuses a kill that would leave nobody to work on prompts or to write answers.
pub(crate) fn check(args: &DemoArgs) -> Result<()> {
    if args.kill_pod.is_some() && args.pods.prefill < 2 && args.pods.decode < 2 {
        let text = "--kill-pod needs a second prefill or decode pod (--pods) to take over";
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    Ok(())
}

impl Assassin {
    /// Starts counting now.
    pub(crate) fn start(args: &DemoArgs, cluster: &Arc<Cluster>) -> Self {
        let (ended, mut watched) = watch::channel(false);
        let cluster = Arc::clone(cluster);
        let (after, prefill) = (args.kill_pod, args.pods.prefill);
        let task = tokio::spawn(async move {
            let Some(after) = after else {
                return Ok(Vec::new());
            };
            tokio::select! {
                () = tokio::time::sleep(after) => {}
                _ = watched.wait_for(|ended| *ended) => return Ok(Vec::new()),
            }
            let role = if prefill >= 2 {
                Role::Prefill
            } else {
                Role::Decode
            };
            kill(&cluster, role, after).await.map(|report| vec![report])
        });
        Self { ended, task }
    }

    /// The workload is over: says who was killed.
    pub(crate) async fn finish(self) -> Result<Vec<KillReport>> {
        // A task that has ended listens no more, and need not be told.
        let _ = self.ended.send(true);
        self.task
            .await
            .map_err(|e| Error::new(ErrorKind::Internal, "the kill").with_source(e))?
    }
}

/// Kills the first pod of this role.
async fn kill(cluster: &Cluster, role: Role, after: Duration) -> Result<KillReport> {
    let no_pod = || Error::new(ErrorKind::Internal, "no pod to kill");
    let pod = cluster
        .pods()
        .iter()
        .find(|pod| pod.role() == role)
        .ok_or_else(no_pod)?;
    pod.process().kill().await?;
    let killed = Instant::now();
    let name = pod.process().name();
    let mut left_index_after_s = None;
    while killed.elapsed() < ASK_FOR {
        let status = cluster.index().status().await?;
        if status.pods.iter().all(|pod| pod.pod != name) {
            left_index_after_s = Some(killed.elapsed().as_secs_f64());
            break;
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
    Ok(KillReport {
        pod: name.to_owned(),
        at_s: after.as_secs_f64(),
        requests_retried: 0,
        left_index_after_s,
    })
}
