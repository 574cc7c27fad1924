//! Lookups: waiting for positions, then one walk through the index.

use std::cell::RefCell;
use std::time::Duration;

use kvcache_core::ports::Position;
use kvcache_core::{Error, ErrorKind, IndexKey, PodName, Result};
use kvfabric_proto::{Encoded, v1};
use tokio::time::{Instant, timeout_at};
use tonic::metadata::MetadataMap;

use super::access::Access;
use super::fields::Fields;
use super::hub::{Hub, Pods};
use super::positions::Positions;
use super::told::Told;
use crate::index::{Answer, KvIndex, Query};
use crate::score::TIERS;
use crate::wire::SourcePosition;

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
    fields: Fields,
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
    /// Asks the index and has the answer told; nothing in here waits.
    ///
    /// # Errors
    /// `Invalid` when no model is named and several are served.
    pub(super) fn answer<R>(
        &self,
        question: &Question<'_>,
        tell: impl FnOnce(&Told<'_>, &mut Fields) -> R,
    ) -> Result<R> {
        let started = Instant::now();
        let index = self.index_for(question.tenant, question.model)?;
        let told = SCRATCH.with_borrow_mut(|scratch| {
            let pods = self.pods();
            match index {
                Some(index) => {
                    question.keys(&index, scratch);
                    self.find(&index, &pods, question, scratch, started);
                }
                None => {
                    scratch.answer = Answer::default();
                    scratch.positions.clear();
                }
            }
            let Scratch {
                answer,
                positions,
                fields,
                ..
            } = scratch;
            let told = Told {
                answer,
                positions,
                weights: &self.weights,
                blocks: match question.prompt {
                    Prompt::Tokens(bytes) => (bytes.len() / 4) as u32 / self.config.block_size,
                    Prompt::Keys(keys) => keys.len() as u32,
                },
                block_size: self.config.block_size,
                explain: question.explain,
                pools: match answer.pools.as_slice() {
                    [] => Vec::new(),
                    pools => self.pools_to_wire(&pods, pools, &question.pods),
                },
            };
            let result = tell(&told, fields);
            let best = answer.pods.first();
            let by_tier = best.map_or([0; TIERS], |best| best.by_tier);
            let deepest = best.map_or(0, |best| best.depth).max(answer.shared_depth);
            (result, deepest, by_tier)
        });
        let (result, deepest, by_tier) = told;
        self.metrics.looked_up(started.elapsed(), deepest, &by_tier);
        Ok(result)
    }

    /// The same as the message that goes over the wire.
    ///
    /// # Errors
    /// As [`Hub::answer`].
    pub(super) fn answer_encoded(&self, question: &Question<'_>) -> Result<Encoded> {
        self.answer(question, |told, fields| told.encode(fields))
    }

    /// Asks until how far the answered pods' sources are applied is known of a moment that the answer is not older than:
    /// what is applied in between is in the answer without being promised.
    ///
    /// To read it of all pods first would cost as much as there are pods, however few are asked for. So it is read
    /// afterwards, which will do as long as nothing was applied meanwhile.
    fn find(
        &self,
        index: &KvIndex,
        pods: &Pods,
        question: &Question<'_>,
        scratch: &mut Scratch,
        now: Instant,
    ) {
        let Scratch {
            keys,
            answer,
            positions,
            ..
        } = scratch;
        positions.clear();
        for _ in 0..FINDS_MAX {
            let step = self.steps.count();
            self.ask(index, pods, question, keys, answer, now);
            if positions.are_of(answer) {
                return;
            }
            positions.read(pods, answered(answer), now);
            if self.steps.count() == step {
                return;
            }
            positions.remember(answered(answer));
        }
        // Who is best changes from one walk to the next.
        positions.read(pods, pods.keys(), now);
        positions.remember(pods.keys());
        self.ask(index, pods, question, keys, answer, now);
        positions.keep(answer);
    }

    fn ask(
        &self,
        index: &KvIndex,
        pods: &Pods,
        question: &Question<'_>,
        keys: &[IndexKey],
        answer: &mut Answer,
        now: Instant,
    ) {
        let is_by_score = question.ranking == v1::Ranking::Score;
        let query = Query {
            // The best by score need not be among the deepest.
            pods_max: if is_by_score { 0 } else { question.pods_max },
            pods: &question.pods,
        };
        index.lookup_at(self.time_at(now), keys, &query, answer);
        if !answer.pools.is_empty() && !question.pods.is_empty() {
            self.leave_usable(pods, &mut answer.pools, &question.pods);
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
                let mut progress = state.subscribe();
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
                let progress = state.progress();
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
