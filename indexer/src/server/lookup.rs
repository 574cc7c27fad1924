//! Lookups: waiting for positions, then one walk through the index.

use std::cell::RefCell;
use std::ops::Range;
use std::time::Duration;

use kvcache_core::ports::Position;
use kvcache_core::{Error, ErrorKind, IndexKey, PodName, Result, Tier};
use kvfabric_proto::v1;
use tokio::time::{Instant, timeout_at};
use tonic::metadata::MetadataMap;

use super::access::Access;
use super::hub::Hub;
use super::positions::Positions;
use crate::index::{Answer, GroupDepth, KvIndex, PartDepth, PodDepth, Query};
use crate::score::{PodWeights, TIERS, TierWeights};
use crate::wire::{CacheGroup, SourcePosition, group_to_wire, tier_to_wire};

/// The most positions one lookup may wait for.
const MIN_POSITIONS_MAX: usize = 4096;
/// The most pods one lookup may name.
const PODS_NAMED_MAX: usize = 65_536;
/// How often the best pods may be others than those just read of, before all are read of.
const FINDS_MAX: usize = 4;
/// The longest a client's deadline is believed.
const DEADLINE_MAX: Duration = Duration::from_secs(300);

/// What a thread keeps between lookups, so that they do not allocate.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) keys: Vec<IndexKey>,
    answer: Answer,
    positions: Positions,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A prompt, checked.
pub(super) enum Prompt<'a> {
    /// u32 little-endian each.
    Tokens(&'a [u8]),
    Keys(&'a [u64]),
}

/// A question, checked.
pub(super) struct Question<'a> {
    /// Empty: whose the model is.
    pub(super) tenant: &'a str,
    pub(super) model: &'a str,
    pub(super) lora: Option<&'a str>,
    pub(super) cache_salt: Option<&'a str>,
    pub(super) prompt: Prompt<'a>,
    pub(super) pods_max: usize,
    pub(super) pods: Vec<PodName>,
    pub(super) ranking: v1::Ranking,
    pub(super) explain: bool,
}

impl<'a> Question<'a> {
    /// # Errors
    /// `Invalid` naming the field and the value.
    pub(super) fn parse(request: &'a v1::LookupRequest) -> Result<Self> {
        let prompt = match &request.prompt {
            Some(v1::lookup_request::Prompt::Tokens(bytes)) if bytes.len() % 4 == 0 => {
                Prompt::Tokens(bytes)
            }
            Some(v1::lookup_request::Prompt::Tokens(bytes)) => {
                return Err(Error::invalid(
                    "tokens",
                    format!("{} bytes", bytes.len()),
                    "4 a token",
                ));
            }
            Some(v1::lookup_request::Prompt::Keys(keys)) => Prompt::Keys(&keys.keys),
            None => return Err(Error::invalid("prompt", "absent", "tokens or keys")),
        };
        Ok(Self {
            tenant: &request.tenant,
            model: &request.model,
            lora: named(&request.lora),
            cache_salt: named(&request.cache_salt),
            prompt,
            pods_max: request.pods_max as usize,
            pods: parse_pods(&request.pods)?,
            ranking: v1::Ranking::try_from(request.ranking).map_err(|_| {
                Error::invalid("ranking", request.ranking, "a Ranking of kvfabric.v1")
            })?,
            explain: request.explain,
        })
    }

    /// The prompt's keys.
    pub(super) fn keys(&self, index: &KvIndex, scratch: &mut Scratch) {
        let keys = &mut scratch.keys;
        keys.clear();
        match self.prompt {
            Prompt::Tokens(bytes) => {
                index.keys_of_le(self.lora, self.cache_salt, bytes, keys);
            }
            Prompt::Keys(raw) => keys.extend(raw.iter().map(|key| IndexKey(*key))),
        }
    }
}

fn named(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

/// # Errors
/// `Invalid` naming the first name that is none, or the count when there are too many.
pub(super) fn parse_pods(names: &[String]) -> Result<Vec<PodName>> {
    if names.len() > PODS_NAMED_MAX {
        return Err(Error::invalid(
            "pods named",
            names.len(),
            0..=PODS_NAMED_MAX,
        ));
    }
    names.iter().map(|name| PodName::new(name)).collect()
}

impl Hub {
    /// Asks the index; nothing in here waits.
    ///
    /// # Errors
    /// `Invalid` when no model is named and several are served.
    pub(super) fn answer(&self, question: &Question<'_>) -> Result<v1::LookupResponse> {
        let started = Instant::now();
        let index = self.index_for(question.tenant, question.model)?;
        let mut response = match index {
            Some(index) => SCRATCH.with_borrow_mut(|scratch| {
                question.keys(&index, scratch);
                self.find(&index, question, scratch);
                let response = self.response(question, scratch);
                scratch.positions.clear();
                response
            }),
            None => v1::LookupResponse::default(),
        };
        response.blocks = match question.prompt {
            Prompt::Tokens(bytes) => (bytes.len() / 4) as u32 / self.config.block_size,
            Prompt::Keys(keys) => keys.len() as u32,
        };
        response.block_size = self.config.block_size;
        let best = response.pods.first();
        let deepest = best.map_or(0, |pod| pod.depth).max(response.shared_depth);
        let mut by_tier = [0; TIERS];
        for held in best.iter().flat_map(|pod| &pod.by_tier) {
            // Tiers are numbered from 1 on the wire, in the order of `Tier::ALL`.
            by_tier[held.tier as usize - 1] = held.blocks;
        }
        self.metrics.looked_up(started.elapsed(), deepest, &by_tier);
        Ok(response)
    }

    /// Asks until how far the answered pods' sources are applied was read before the answer was found: what is applied in
    /// between is in the answer without being promised.
    ///
    /// To read it of all pods first would cost as much as there are pods, however few are asked for.
    fn find(&self, index: &KvIndex, question: &Question<'_>, scratch: &mut Scratch) {
        let Scratch {
            keys,
            answer,
            positions,
        } = scratch;
        for _ in 0..FINDS_MAX {
            self.ask(index, question, keys, answer);
            if positions.are_of(answer) {
                return;
            }
            positions.read(&self.pods(), answered(answer));
        }
        // Who is best changes from one walk to the next.
        let pods = self.pods();
        positions.read(&pods, pods.keys());
        drop(pods);
        self.ask(index, question, keys, answer);
        positions.keep(answer);
    }

    fn ask(
        &self,
        index: &KvIndex,
        question: &Question<'_>,
        keys: &[IndexKey],
        answer: &mut Answer,
    ) {
        let is_by_score = question.ranking == v1::Ranking::Score;
        let query = Query {
            // The best by score need not be among the deepest.
            pods_max: if is_by_score { 0 } else { question.pods_max },
            pods: &question.pods,
        };
        index.lookup_at(self.now(), keys, &query, answer);
        if !answer.pools.is_empty() && !question.pods.is_empty() {
            self.leave_usable(&mut answer.pools, &question.pods);
        }
        if is_by_score {
            // Stable, and the answer comes by depth and name.
            answer
                .pods
                .sort_by(|one, other| other.score.total_cmp(&one.score));
            if question.pods_max != 0 {
                answer.pods.truncate(question.pods_max);
            }
        }
    }

    fn response(&self, question: &Question<'_>, scratch: &Scratch) -> v1::LookupResponse {
        let Scratch {
            answer, positions, ..
        } = scratch;
        let pods = answer.pods.iter().zip(positions.pods());
        let depths = pods.map(|(found, pod)| v1::PodDepth {
            pod: found.pod.as_str().to_owned(),
            depth: found.depth,
            by_tier: tiers_to_wire(&found.by_tier),
            score: found.score,
            peer_address: pod
                .and_then(|pod| pod.registration.peer_address.clone())
                .unwrap_or_default(),
            terms: if question.explain {
                self.terms(found)
            } else {
                Vec::new()
            },
            parts: found
                .parts
                .iter()
                .map(|part| part_to_wire(part, self.weights_of(found), question.explain))
                .collect(),
            expected_depth: found.expected_depth,
            approximate: found.is_approximate,
        });
        let pools = match answer.pools.as_slice() {
            [] => Vec::new(),
            pools => self.pools_to_wire(pools, &question.pods),
        };
        let (positions, freshness) = positions.to_wire(std::time::Instant::now());
        v1::LookupResponse {
            pools,
            pods: depths.collect(),
            shared_depth: answer.shared_depth,
            shared: ranges_to_wire(&answer.shared),
            positions,
            freshness,
            ..v1::LookupResponse::default()
        }
    }

    /// What a pod's blocks are worth.
    fn weights_of<'a>(&'a self, found: &'a PodDepth) -> &'a TierWeights {
        let own = found.weights.as_deref();
        own.map_or(&self.weights, PodWeights::weights)
    }

    /// How a score comes about.
    fn terms(&self, found: &PodDepth) -> Vec<v1::ScoreTerm> {
        let (weights, own) = (self.weights_of(found), found.weights.as_deref());
        let held = Tier::ALL.into_iter().zip(found.by_tier);
        held.filter(|(_, blocks)| *blocks > 0)
            .map(|(tier, blocks)| v1::ScoreTerm {
                tier: tier_to_wire(tier).into(),
                blocks,
                weight: weights.of(tier),
                medium: own
                    .and_then(|own| own.medium(tier))
                    .unwrap_or_default()
                    .to_owned(),
            })
            .collect()
    }

    /// Waits until every position is applied.
    ///
    /// # Errors
    /// `Timeout` naming the first source that was not that far, and how far it was; `Invalid` for too many positions.
    pub(super) async fn wait_for(
        &self,
        wanted: &[SourcePosition],
        deadline: Instant,
        access: Access,
    ) -> Result<()> {
        if wanted.len() > MIN_POSITIONS_MAX {
            return Err(Error::invalid(
                "positions",
                wanted.len(),
                0..=MIN_POSITIONS_MAX,
            ));
        }
        let started = Instant::now();
        for wanted in wanted {
            if timeout_at(deadline, self.reach(wanted, access))
                .await
                .is_err()
            {
                return Err(self.not_reached(wanted, access));
            }
        }
        if !wanted.is_empty() {
            self.metrics.waited(started.elapsed());
        }
        Ok(())
    }

    async fn reach(&self, wanted: &SourcePosition, access: Access) {
        let mut membership = self.membership.subscribe();
        loop {
            membership.mark_unchanged();
            if let Some(state) = self.source(&wanted.source, access) {
                let mut progress = state.progress.subscribe();
                if !is_reached(progress.borrow().position, wanted.position) {
                    state.want(wanted.position);
                }
                // The pod may leave meanwhile, and come back with a new state.
                tokio::select! {
                    reached = progress.wait_for(|now| is_reached(now.position, wanted.position)) => {
                        if reached.is_ok() {
                            return;
                        }
                    }
                    _ = membership.changed() => continue,
                }
            }
            // The hub lives as long as its calls, so this waits and cannot fail.
            let _ = membership.changed().await;
        }
    }

    fn not_reached(&self, wanted: &SourcePosition, access: Access) -> Error {
        let now = match self.source(&wanted.source, access) {
            Some(state) => {
                let progress = *state.progress.borrow();
                let connected = if progress.is_connected {
                    "connected"
                } else {
                    "not connected"
                };
                let Position { epoch, next } = progress.position;
                format!("is {connected}, at sequence {next} of epoch {epoch}")
            }
            None => "is not registered".to_owned(),
        };
        let Position { epoch, next } = wanted.position;
        let context = format!(
            "source {:?} {now}; the lookup waited for sequence {next} of epoch {epoch}",
            wanted.source
        );
        Error::new(ErrorKind::Timeout, context)
    }
}

/// Everybody who is answered: pods, then pools.
pub(super) fn answered(answer: &Answer) -> impl Iterator<Item = &PodName> {
    let pods = answer.pods.iter().map(|found| &found.pod);
    pods.chain(answer.pools.iter().map(|found| &found.pool))
}

pub(super) fn ranges_to_wire(ranges: &[Range<u32>]) -> Vec<v1::BlockRange> {
    let ranges = ranges.iter().map(|range| v1::BlockRange {
        start: range.start,
        end: range.end,
    });
    ranges.collect()
}

pub(super) fn tiers_to_wire(by_tier: &[u32; TIERS]) -> Vec<v1::TierDepth> {
    let held = Tier::ALL.into_iter().zip(*by_tier);
    held.filter(|(_, blocks)| *blocks > 0)
        .map(|(tier, blocks)| v1::TierDepth {
            tier: tier_to_wire(tier).into(),
            blocks,
        })
        .collect()
}

fn part_to_wire(part: &PartDepth, weights: &TierWeights, explain: bool) -> v1::PartDepth {
    let groups = part.groups.iter().filter(|_| explain);
    v1::PartDepth {
        data_parallel_rank: part.rank,
        depth: part.depth,
        by_tier: tiers_to_wire(&part.by_tier),
        score: weights.score(&part.by_tier),
        groups: groups.map(group_depth_to_wire).collect(),
    }
}

fn group_depth_to_wire(found: &GroupDepth) -> v1::GroupDepth {
    let group = CacheGroup {
        number: found.group,
        rule: found.rule,
        block_size: 0,
    };
    v1::GroupDepth {
        group: Some(group_to_wire(&group)),
        depth: found.depth,
    }
}

/// Whether a source at `now` has applied everything before `wanted`; a later epoch has left it behind.
fn is_reached(now: Position, wanted: Position) -> bool {
    (now.epoch, now.next) >= (wanted.epoch, wanted.next)
}

/// When a call must be answered: a little before its client gives up, so that the reason still gets there.
pub(super) fn deadline(metadata: &MetadataMap, default: Duration) -> Instant {
    let told = metadata
        .get("grpc-timeout")
        .and_then(|value| value.to_str().ok());
    let patience = told
        .and_then(parse_timeout)
        .map_or(default, |told| told.mul_f64(0.9));
    Instant::now() + patience.min(DEADLINE_MAX)
}

/// gRPC's `<digits><unit>`.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    // The protocol allows eight digits.
    let count: u64 = digits.parse().ok().filter(|count| *count < 100_000_000)?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of each unit, and what is none.
    #[test]
    fn grpc_timeouts_are_read_as_the_protocol_writes_them() {
        assert_eq!(parse_timeout("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parse_timeout("3M"), Some(Duration::from_secs(180)));
        assert_eq!(parse_timeout("4S"), Some(Duration::from_secs(4)));
        assert_eq!(parse_timeout("50m"), Some(Duration::from_millis(50)));
        assert_eq!(parse_timeout("6u"), Some(Duration::from_micros(6)));
        assert_eq!(parse_timeout("7n"), Some(Duration::from_nanos(7)));
        for bad in ["", "S", "5", "-1S", "1x", "123456789S", "é"] {
            assert_eq!(parse_timeout(bad), None, "{bad:?}");
        }
    }

    /// Same epoch, later epoch, earlier epoch.
    #[test]
    fn a_position_is_reached_in_its_epoch_or_a_later_one() {
        let at = |epoch, next| Position {
            epoch: kvcache_core::Epoch(epoch),
            next: kvcache_core::Sequence(next),
        };
        assert!(is_reached(at(1, 5), at(1, 5)));
        assert!(!is_reached(at(1, 4), at(1, 5)));
        assert!(is_reached(at(2, 0), at(1, 5)));
        assert!(!is_reached(at(1, 9), at(2, 0)));
    }
}
