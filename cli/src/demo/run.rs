//! One run of the workload through a cluster: the router's side.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvcache_core::ports::Position;
use kvcache_core::{Epoch, Error, ErrorKind, Result, Sequence};
use kvfabric_indexer::client::{IndexClient, LookupAnswer, LookupRequest, Prompt, SourcePosition};
use kvfabric_sim::router::{PodView, Policy, Route, Router};
use kvfabric_sim::workload::Request;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::cluster::{Cluster, Role};
use super::plan::Plan;
use super::protocol::{Done, HolderHint, PositionText, Served, Task, Work};
use super::tally::Tally;

/// How long one lookup may take, waiting for the positions it needs included.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(20);

/// How long a pod may take over one request.
const WORK_DEADLINE: Duration = Duration::from_secs(120);

/// How often one request is started anew because a pod died under it.
const ATTEMPTS_MAX: u32 = 4;

/// Pods that a task is told about at most.
const HINTS_MAX: usize = 8;

/// The router and everything it keeps about a run.
pub(crate) struct Run {
    cluster: Arc<Cluster>,
    index: IndexClient,
    block_tokens: u32,
    state: Mutex<State>,
    /// How many requests have ended, for those that wait for an earlier one.
    ended: watch::Sender<Ended>,
}

struct State {
    router: Router,
    /// Requests in flight, by pod.
    in_flight: Vec<u32>,
    /// Where lookups must have got to, by source.
    positions: BTreeMap<String, Position>,
    tally: Tally,
}

/// Which requests have ended: all below `below`, and those in `later`.
#[derive(Default)]
struct Ended(std::collections::BTreeSet<u64>);

impl Run {
    /// A router over a cluster that is up.
    pub(crate) fn new(cluster: Arc<Cluster>, plan: &Plan, policy: Policy, seed: u64) -> Self {
        let pods = cluster.pods().len();
        Self {
            index: cluster.index().clone(),
            cluster,
            block_tokens: plan.block_tokens,
            state: Mutex::new(State {
                router: Router::new(policy, seed),
                in_flight: vec![0; pods],
                positions: BTreeMap::new(),
                tally: Tally::new(pods),
            }),
            ended: watch::Sender::new(Ended::default()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs the whole workload; `progress` is called after each request. Ends early when `stop` is set.
    pub(crate) async fn replay(
        self: &Arc<Self>,
        plan: &Plan,
        stop: &AtomicBool,
        mut progress: impl FnMut(),
    ) -> Result<Tally> {
        let slots = Arc::new(Semaphore::new(plan.concurrency as usize));
        let mut tasks: JoinSet<Result<()>> = JoinSet::new();
        let started = Instant::now();
        for request in &plan.requests {
            let closed = |_| Error::new(ErrorKind::Internal, "the router's slots were closed");
            let slot = Arc::clone(&slots).acquire_owned().await.map_err(closed)?;
            while let Some(ended) = tasks.try_join_next() {
                flatten(ended)?;
                progress();
            }
            if stop.load(Ordering::Relaxed) {
                break;
            }
            if plan.paced {
                let due = started + Duration::from_millis(request.at_ms);
                tokio::time::sleep_until(due.into()).await;
            }
            let (run, request) = (Arc::clone(self), request.clone());
            tasks.spawn(async move {
                let result = run.serve(&request).await;
                run.ended.send_modify(|ended| {
                    ended.0.insert(request.id);
                });
                drop(slot);
                result.map_err(|error| error.at(format!("request {}", request.id)))
            });
        }
        while let Some(ended) = tasks.join_next().await {
            flatten(ended)?;
            progress();
        }
        let mut tally = std::mem::take(&mut self.lock().tally);
        tally.elapsed = started.elapsed();
        Ok(tally)
    }

    /// One request, from lookup to the last block of its answer.
    async fn serve(&self, request: &Request) -> Result<()> {
        if let Some(before) = request.after {
            let mut ended = self.ended.subscribe();
            let gone = |_| Error::new(ErrorKind::Internal, "the router ended");
            ended
                .wait_for(|ended| ended.0.contains(&before))
                .await
                .map_err(gone)?;
        }
        let mut moving = Duration::ZERO;
        let mut attempts = 0;
        let (route, answer, prefilled) = loop {
            attempts += 1;
            let start = Instant::now();
            let answer = self.lookup(request).await?;
            moving += start.elapsed();
            let route = self.route(&answer, None)?;
            let task = self.task(request, &answer, None);
            match self.work(route.prefill, Work::Prefill(task)).await {
                Ok(served) => break (route, answer, served),
                Err(error) if error.kind() == ErrorKind::PeerLost && attempts < ATTEMPTS_MAX => {
                    self.lock().tally.retried += 1;
                }
                Err(error) => return Err(error),
            }
        };
        let decoded = self.decode(request, &answer, route).await?;
        let mut state = self.lock();
        moving += Duration::from_micros(prefilled.moving_us);
        if let Some(decoded) = &decoded {
            moving += Duration::from_micros(decoded.moving_us);
            state.tally.count_verified(decoded);
        }
        state.tally.count_prefill(route.prefill, &prefilled, moving);
        Ok(())
    }

    /// The decode pod's part; another pod takes over when one dies. None when no decode pod lives.
    async fn decode(
        &self,
        request: &Request,
        answer: &LookupAnswer,
        route: Route,
    ) -> Result<Option<Served>> {
        let blocks = u32::try_from(request.prompt_blocks(self.block_tokens)).unwrap_or(u32::MAX);
        let source = self.cluster.pods()[route.prefill].process();
        let hint = HolderHint {
            pod: source.name().to_owned(),
            depth: blocks,
            peer_address: source.peer_address().to_owned(),
        };
        let mut target = route.decode;
        for _ in 0..ATTEMPTS_MAX {
            let Some(pod) = target else { return Ok(None) };
            let task = self.task(request, answer, Some(hint.clone()));
            match self.work(pod, Work::Decode(task)).await {
                Ok(served) => {
                    self.lock().tally.served_by(pod);
                    return Ok(Some(served));
                }
                Err(error) if error.kind() == ErrorKind::PeerLost => {
                    self.lock().tally.retried += 1;
                    target = self.route(answer, Some(route.prefill))?.decode;
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::new(
            ErrorKind::PeerLost,
            "decode pods died one after the other",
        ))
    }

    /// Asks the index, waiting for everything that earlier requests published.
    async fn lookup(&self, request: &Request) -> Result<LookupAnswer> {
        let tokens = request.prompt_tokens().into_owned();
        loop {
            let min_position = self.positions_of_the_living();
            let waited_for: Vec<String> = min_position.iter().map(|p| p.source.clone()).collect();
            let start = Instant::now();
            let asked = LookupRequest {
                tenant: String::new(),
                model: self.cluster.model().to_owned(),
                lora: String::new(),
                cache_salt: String::new(),
                prompt: Prompt::Tokens(tokens.clone()),
                pods_max: 0,
                pods: Vec::new(),
                min_position,
                deadline: Some(LOOKUP_DEADLINE),
            };
            match self.index.lookup(asked).await {
                Ok(answer) => {
                    self.lock().tally.lookup(start.elapsed());
                    return Ok(answer);
                }
                // A source whose pod died meanwhile can be waited for no more: ask again without it.
                Err(_) if waited_for.iter().any(|source| self.is_of_the_dead(source)) => {}
                Err(error) => return Err(error.at("lookup")),
            }
        }
    }

    /// How far each living pod has published; the dead are forgotten.
    fn positions_of_the_living(&self) -> Vec<SourcePosition> {
        let mut state = self.lock();
        state
            .positions
            .retain(|source, _| !self.is_of_the_dead(source));
        state.positions.iter().map(to_source_position).collect()
    }

    /// Whether the pod that publishes as `source` has ended.
    fn is_of_the_dead(&self, source: &str) -> bool {
        let dead = self.cluster.pods().iter().map(|pod| pod.process());
        dead.filter(|process| !process.is_alive())
            .any(|process| is_source_of(source, process.name()))
    }

    /// Chooses pods; `prefill` keeps the one that has already been chosen.
    fn route(&self, answer: &LookupAnswer, prefill: Option<usize>) -> Result<Route> {
        let mut state = self.lock();
        let views: Vec<(Role, usize, PodView)> = self
            .cluster
            .pods()
            .iter()
            .enumerate()
            .map(|(position, pod)| {
                let name = pod.process().name();
                let depth = answer.pods.iter().find(|p| p.pod.as_str() == name);
                let view = PodView {
                    depth: depth.map_or(0, |p| p.depth),
                    in_flight: state.in_flight[position],
                    alive: pod.process().is_alive(),
                };
                (pod.role(), position, view)
            })
            .collect();
        let of = |wanted: Role| -> (Vec<usize>, Vec<PodView>) {
            let chosen = views.iter().filter(|(role, ..)| *role == wanted);
            chosen.map(|(_, position, view)| (*position, *view)).unzip()
        };
        let (prefills, prefill_views) = of(Role::Prefill);
        let (decodes, decode_views) = of(Role::Decode);
        let route = match prefill {
            None => state.router.route(&prefill_views, &decode_views)?,
            // The prefill pod's work is done, so it does not matter whether it still lives.
            Some(_) => {
                let placeholder = [PodView {
                    alive: true,
                    ..PodView::default()
                }];
                state.router.route(&placeholder, &decode_views)?
            }
        };
        Ok(Route {
            prefill: prefill.unwrap_or_else(|| prefills[route.prefill]),
            decode: route.decode.map(|position| decodes[position]),
        })
    }

    /// What a pod is told: the request, and who holds its beginning.
    fn task(&self, request: &Request, answer: &LookupAnswer, first: Option<HolderHint>) -> Task {
        let known = answer.pods.iter().filter_map(|pod| {
            let peer_address = pod.peer_address.clone()?;
            Some(HolderHint {
                pod: pod.pod.to_string(),
                depth: pod.depth,
                peer_address,
            })
        });
        let others = known.filter(|hint| first.as_ref().is_none_or(|f| f.pod != hint.pod));
        let mut task = Task::new(request);
        task.shared = answer.shared.clone();
        task.holders = first
            .clone()
            .into_iter()
            .chain(others)
            .take(HINTS_MAX)
            .collect();
        task
    }

    /// Gives work to a pod and remembers up to where it has published.
    async fn work(&self, pod: usize, work: Work) -> Result<Served> {
        self.lock().in_flight[pod] += 1;
        let result = self.cluster.pods()[pod]
            .process()
            .call(work, WORK_DEADLINE)
            .await;
        let mut state = self.lock();
        state.in_flight[pod] -= 1;
        match result? {
            Done::Served(served) => {
                for position in &served.positions {
                    note_position(&mut state.positions, position);
                }
                Ok(served)
            }
            other => Err(Error::new(
                ErrorKind::Internal,
                format!("unexpected answer {other:?}"),
            )),
        }
    }
}

/// Whether `source`, named `pod/…`, belongs to `pod`.
fn is_source_of(source: &str, pod: &str) -> bool {
    let rest = source.strip_prefix(pod);
    rest.is_some_and(|rest| rest.starts_with('/'))
}

fn to_source_position((source, position): (&String, &Position)) -> SourcePosition {
    SourcePosition {
        source: source.clone(),
        position: *position,
    }
}

/// Answers arrive in any order, so only a later position replaces an earlier one.
fn note_position(positions: &mut BTreeMap<String, Position>, text: &PositionText) {
    let new = Position {
        epoch: Epoch(text.epoch),
        next: Sequence(text.next),
    };
    let known = positions.entry(text.source.clone()).or_insert(new);
    if new.next > known.next || new.epoch != known.epoch {
        *known = new;
    }
}

fn flatten(ended: Result<Result<()>, tokio::task::JoinError>) -> Result<()> {
    ended.map_err(|e| Error::new(ErrorKind::Internal, "a request's task").with_source(e))?
}
