//! The side that uses memory asks for regions, and hears what their owner has to say.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::active::Phase;
use super::greeting;
use super::moving::not_fitting;
use super::state::{Line, State};
use super::using::{Asked, Held};
use crate::agent::RemoteRegion;
use crate::backend::unix::{Call, Message, Outcome, Waiting};
use crate::region::RegionId;

fn again(error: &Error) -> Error {
    Error::new(error.kind(), error.to_string())
}

impl State {
    /// Asks the peer for a region, once for all who need it: whether it is here already.
    pub(super) fn want(
        &mut self,
        line: Line,
        region: &Arc<RemoteRegion>,
        call: Option<&Arc<Call>>,
        job: Option<u64>,
    ) -> Result<bool> {
        let closed = || Error::new(ErrorKind::PeerLost, "the path is closed");
        let using = self.using.get_mut(&line).ok_or_else(closed)?;
        if using.shared.is_lost() {
            return Err(using.shared.loss());
        }
        let held = using.held.get(&region.id);
        if held.is_some_and(|held| !held.is_revoked) {
            return Ok(true);
        }
        let (calls, jobs) = (call.cloned().into_iter(), job.into_iter());
        if let Some(asked) = using.question(region.id) {
            asked.calls.extend(calls);
            asked.jobs.extend(jobs);
            return Ok(false);
        }
        let id = using.shared.unanswered.number();
        let asked = Asked {
            region: region.clone(),
            is_revoked: false,
            jobs: jobs.collect(),
            calls: calls.collect(),
        };
        using.asked.insert(id, asked);
        let message = Message::Map {
            id,
            region: region.id,
            key: region.key,
        };
        using.unasked.push_back(message);
        self.ask_questions(line);
        Ok(false)
    }

    /// Asks what waits to be asked, as much as may be unanswered.
    pub(super) fn ask_questions(&mut self, line: Line) {
        while let Some(using) = self.using.get_mut(&line) {
            if !using.may_ask() {
                return;
            }
            let Some(question) = using.unasked.pop_front() else {
                return;
            };
            using.questions += 1;
            if let Err(error) = self.ask(line, &question) {
                return self.fail(line, &error.to_string());
            }
        }
    }

    /// A peer whose memory we use says something.
    pub(super) fn answered(&mut self, line: Line, message: Message) {
        let heard = match message {
            Message::Done { id, outcome } => self.granted_or_notified(line, id, outcome),
            Message::Revoke { region } => {
                self.revoked(line, region);
                Ok(())
            }
            _ => Err(not_fitting("a message that only users of memory send")),
        };
        if let Err(error) = heard {
            self.lose(line, &error.to_string());
        }
    }

    fn granted_or_notified(&mut self, line: Line, id: u64, outcome: Outcome) -> Result<()> {
        let Some(using) = self.using.get_mut(&line) else {
            return Ok(());
        };
        if let Some(waiting) = using.shared.unanswered.take(id) {
            // Whoever sent it may have stopped waiting.
            if let Waiting::Notification(job) = waiting {
                let outcome = match outcome {
                    Outcome::Done => Ok(()),
                    Outcome::Failed { code, text } => Err(Outcome::failure(code, &text)),
                    _ => Err(not_fitting("a notification is answered by something else")),
                };
                self.settled.push((job, outcome));
            }
            return Ok(());
        }
        let Some(left) = using.questions.checked_sub(1) else {
            return Err(not_fitting("more is answered than was asked"));
        };
        using.questions = left;
        // Nobody may wait for it any more.
        if let Some(asked) = using.asked.remove(&id) {
            self.granted(line, asked, outcome);
        } else if let Some(summing) = using.summing.remove(&id) {
            self.summed(&summing, outcome);
        }
        self.ask_questions(line);
        Ok(())
    }

    fn granted(&mut self, line: Line, asked: Asked, outcome: Outcome) {
        let kept = self.keep(line, &asked, outcome);
        for call in &asked.calls {
            call.answer(match &kept {
                Ok(()) => Ok((Outcome::Done, None)),
                Err(error) => Err(again(error)),
            });
        }
        for number in asked.jobs {
            let Some(active) = self.jobs.get_mut(&number) else {
                continue;
            };
            if let Err(error) = &kept {
                active.error.get_or_insert(again(error));
            }
            if let Phase::Asking(missing) = &mut active.phase {
                *missing -= 1;
                if *missing == 0 {
                    active.phase = Phase::Moving;
                }
            }
            self.ready.push_back(number);
        }
    }

    /// Learns how a region that was asked for is reached.
    fn keep(&mut self, line: Line, asked: &Asked, outcome: Outcome) -> Result<()> {
        let (address, bytes, key) = match outcome {
            Outcome::Keyed {
                address,
                bytes,
                key,
                ..
            } => (address, bytes, key),
            Outcome::Failed { code, text } => return Err(Outcome::failure(code, &text)),
            _ => return Err(not_fitting("a map is answered without a key")),
        };
        let region = &asked.region;
        let learnt = if asked.is_revoked {
            let text = format!("region {} is deregistered", region.id);
            Err(Error::new(ErrorKind::NotFound, text))
        } else if bytes != region.bytes || address.checked_add(bytes).is_none() {
            Err(not_fitting(
                "a region is not as long as the peer's metadata says",
            ))
        } else {
            let rails = self.tie(line).map_or(0, |tie| tie.rails.len());
            greeting::decode_keys(&key, rails)
        };
        match (learnt, self.using.get_mut(&line)) {
            (Ok(keys), Some(using)) => {
                let held = Held {
                    address,
                    keys,
                    users: 0,
                    is_revoked: false,
                };
                using.held.insert(region.id, held);
                Ok(())
            }
            (Ok(_), None) => Err(Error::new(ErrorKind::PeerLost, "the path is closed")),
            (Err(error), _) => {
                let region = region.id;
                // The peer has handed it out, and would wait for it.
                let _ = self.ask(line, &Message::Unmapped { region });
                Err(error)
            }
        }
    }

    /// The peer wants a region back: it gets it as soon as no job uses it.
    fn revoked(&mut self, line: Line, region: RegionId) {
        let Some(using) = self.using.get_mut(&line) else {
            return;
        };
        if let Some(held) = using.held.get_mut(&region) {
            held.is_revoked = true;
            return self.let_go_of_revoked(line, region);
        }
        if let Some(asked) = using.question(region) {
            asked.is_revoked = true;
            return;
        }
        let _ = self.ask(line, &Message::Unmapped { region });
    }

    pub(super) fn let_go_of_revoked(&mut self, line: Line, region: RegionId) {
        let Some(using) = self.using.get_mut(&line) else {
            return;
        };
        let free = |held: &Held| held.is_revoked && held.users == 0;
        if using.held.get(&region).is_some_and(free) {
            using.held.remove(&region);
            // If it cannot be said, the path is lost, and the peer hears of that.
            let _ = self.ask(line, &Message::Unmapped { region });
        }
    }
}
