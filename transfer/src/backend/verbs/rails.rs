//! Rails that fail and come back, while others of the same path go on.
//!
//! A rail has failed when its queue pair has. The user of memory stops its end, tells the owner so over another rail, and
//! does what was unfinished again over the others once the owner has said that its own end is gone: no byte of it lands after
//! that. After a while a new queue pair is offered over another rail; it is used once an answer has come by it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::controls::{Control, Which};
use super::moving::not_fitting;
use super::state::{Line, State};
use super::tie::{Condition, Rail, Tie};
use super::wire::Wire;

/// How long the other side may take to end a rail.
pub(super) const ENDING_MAX: Duration = Duration::from_secs(5);

/// How long work of a rail that was stopped may take to be told of as over, before its queue pair is taken away.
const FLUSHING_MAX: Duration = Duration::from_secs(1);

/// How long a rail may take to be answered over.
pub(super) const PROVING_MAX: Duration = Duration::from_secs(5);

/// How long the port of a path's only rail may be down: a switch that starts again takes longer, a plug less.
const DARK_MAX: Duration = Duration::from_secs(5);

/// The question by which a rail is proved; others are numbers of jobs, from 1 on.
pub(super) const PROOF: u64 = 0;

/// Whether an error tells of the rail, rather than of what was asked of it.
pub(super) fn is_of_rail(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::PeerLost | ErrorKind::Io)
}

impl State {
    pub(super) fn tie(&mut self, line: Line) -> Option<&mut Tie> {
        if let Some(user) = self.users.get_mut(&line) {
            return Some(&mut user.tie);
        }
        self.using.get_mut(&line).map(|using| &mut using.tie)
    }

    pub(super) fn wire(&mut self, line: Line, rail: usize) -> Option<&mut Wire> {
        self.tie(line)?.rails.get_mut(rail)?.wire.as_mut()
    }

    /// A rail of a path is of no use any more.
    pub(super) fn fail_rail(&mut self, line: Line, rail: usize, reason: &str) {
        let (is_user, now) = (self.users.contains_key(&line), Instant::now());
        let Some(tie) = self.tie(line) else {
            return;
        };
        let has_another = tie.has_another(rail);
        let Some(one) = tie.rails.get_mut(rail) else {
            return;
        };
        let mut is_unused = false;
        match one.condition {
            Condition::Ending { .. } | Condition::Down(_) => return,
            Condition::Up if !has_another => return self.fail(line, reason),
            // Whoever offered it will say that it has stopped.
            Condition::Offered(..) | Condition::Unproved(_) if is_user => {
                one.condition = Condition::Down(None);
                is_unused = true;
            }
            _ => {
                if let Some(wire) = &mut one.wire {
                    wire.stop();
                }
                one.condition = Condition::Ending {
                    until: now + ENDING_MAX,
                    is_told: false,
                    is_gone: false,
                };
                tie.speech.lose(rail);
            }
        }
        let is_hopeless = !tie.rails.iter().any(Rail::is_hopeful);
        if is_unused {
            self.bury_rail(line, rail, false);
        }
        self.told_lost(line, rail, reason);
        self.is_timed = true;
        self.heat(line, rail);
        if is_hopeless {
            self.fail(line, reason);
        }
    }

    fn told_lost(&mut self, line: Line, rail: usize, reason: &str) {
        let Some(using) = self.using.get(&line) else {
            return;
        };
        let told = &self.cards.cards[using.tie.rails[rail].card].told;
        if using.shared.rails[rail].lose(reason) {
            told.lost.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(port = told.name, reason, "a rail was lost");
        }
    }

    /// Looks after rails that are not up. When there is something to do next.
    pub(super) fn tend(&mut self, now: Instant) -> Option<Instant> {
        let due = |tie: &Tie| {
            let rails = tie.rails.iter().enumerate();
            let due = rails.filter_map(|(at, rail)| Some((at, rail.due(now)?)));
            due.collect::<Vec<_>>()
        };
        let using = self
            .using
            .iter()
            .filter(|(_, using)| using.ending.is_none());
        let ties = using.map(|(line, using)| (*line, &using.tie));
        let ties = ties.chain(self.users.iter().map(|(line, user)| (*line, &user.tie)));
        let all: Vec<(Line, usize, Instant)> = ties
            .flat_map(|(line, tie)| due(tie).into_iter().map(move |(at, due)| (line, at, due)))
            .collect();
        let mut next: Option<Instant> = None;
        for (line, rail, due) in all {
            if due > now {
                next = Some(next.map_or(due, |next| next.min(due)));
                continue;
            }
            self.tend_one(line, rail, now);
            // Whatever follows from it is looked at soon.
            next = Some(now);
        }
        next
    }

    fn tend_one(&mut self, line: Line, rail: usize, now: Instant) {
        let is_user = self.users.contains_key(&line);
        let Some(tie) = self.tie(line) else {
            return;
        };
        let Some(one) = tie.rails.get(rail) else {
            return;
        };
        match one.condition {
            Condition::Up if one.dark_until.is_some_and(|until| until <= now) => {
                self.fail_rail(line, rail, "its port stays down");
            }
            Condition::Up => {
                self.fail_rail(line, rail, "the device does not end what was handed to it");
            }
            Condition::Offered(_, until) if until <= now => {
                self.fail_rail(line, rail, "the peer does not take it up again");
            }
            Condition::Unproved(until) if until <= now => {
                self.fail_rail(line, rail, "no answer comes by it");
            }
            Condition::Ending { is_told, .. } if !is_told && tie.up().next().is_none() => {
                // Another one may be proved yet, or all are lost, which ends the path.
            }
            Condition::Ending { until, .. } if until <= now => {
                let reason = match one.is_going {
                    true => "the device does not take a queue pair away",
                    false => "the peer does not say that it has ended a rail",
                };
                self.fail(line, reason);
            }
            Condition::Ending { is_told: false, .. } if !one.is_going => {
                self.end_rail(line, rail, now);
            }
            Condition::Down(Some(_)) if !is_user => self.offer_again(line, rail, now),
            _ => {}
        }
    }

    /// Hears what has come by a rail that was stopped. When the device has told of all that was under way, nothing of it has any
    /// effect on this side any more, and the other side is told so; else when the queue pair is gone.
    fn end_rail(&mut self, line: Line, rail: usize, now: Instant) {
        self.drain(line, rail);
        let is_user = self.users.contains_key(&line);
        let Some(tie) = self.tie(line) else {
            return;
        };
        let one = &mut tie.rails[rail];
        let Condition::Ending { until, .. } = one.condition else {
            return;
        };
        let is_still = |wire: &Wire| match is_user {
            true => wire.is_flushed(),
            false => wire.is_drained(),
        };
        if one.wire.as_ref().is_none_or(is_still) {
            let still = one.wire.take();
            self.bury(still.into_iter().collect(), |_, _| ());
            self.bury_rail(line, rail, true);
        } else if now + ENDING_MAX >= until + FLUSHING_MAX {
            // What the device does not tell of is not known to have had no effect: it counts as unfinished.
            self.bury_rail(line, rail, true);
        }
    }

    /// Hears all that has come by a rail.
    fn drain(&mut self, line: Line, rail: usize) {
        let mut heard = Vec::new();
        while let Some(polled) = self.wire(line, rail).map(|wire| wire.poll(&mut heard)) {
            for heard in heard.drain(..) {
                self.hear(line, rail, heard);
            }
            match polled {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.fail(line, &error.to_string()),
            }
        }
    }

    /// Neither end of a rail is left: what it has not finished is done again by the others.
    pub(super) fn over_with(&mut self, line: Line, rail: usize) {
        let Some(using) = self.using.get_mut(&line) else {
            return;
        };
        let one = &mut using.tie.rails[rail];
        one.rest(Instant::now());
        let unfinished = std::mem::take(&mut one.unfinished);
        let told = &self.cards.cards[one.card].told;
        told.repeated
            .fetch_add(unfinished.len() as u64, Ordering::Relaxed);
        for piece in unfinished {
            let Some(active) = self.jobs.get_mut(&piece.job) else {
                continue;
            };
            active.open -= 1;
            if active.gives_way() {
                using.background.end();
            }
            active.again.push(piece.extent);
            self.ready.push_back(piece.job);
        }
        using.end_marks(rail);
        self.ready.extend(using.waiting.drain(..));
        self.go_on_behind(line);
        self.send_notifications(line);
        self.say_on(line);
    }

    /// The port of some rails went down or up.
    pub(super) fn port_changed(&mut self, device: usize, port: u8, is_up: bool) {
        let cards = self.cards.cards.iter().enumerate();
        let Some(card) = cards
            .filter(|(_, card)| card.device == device && card.port() == port)
            .map(|(at, _)| at)
            .next()
        else {
            return;
        };
        self.cards.cards[card]
            .told
            .is_up
            .store(is_up, Ordering::Relaxed);
        if is_up && let Some(desk) = self.cards.cards[card].desk() {
            let goodbyes = desk.goodbyes.take();
            self.aside(move |_| drop(goodbyes), |_, ()| ());
        }
        let now = Instant::now();
        for (line, rail) in self.rails_of(|one| one.card == card) {
            let Some(tie) = self.tie(line) else { continue };
            match tie.rails[rail].condition {
                Condition::Down(Some(_)) if is_up => {
                    tie.rails[rail].condition = Condition::Down(Some(now));
                    self.is_timed = true;
                }
                Condition::Up if !is_up && tie.has_another(rail) => {
                    self.fail_rail(line, rail, "its port went down");
                }
                // The only one may come back soon, and before the device gives up.
                Condition::Up => {
                    tie.rails[rail].dark_until = (!is_up).then_some(now + DARK_MAX);
                    self.is_timed = true;
                }
                _ => {}
            }
        }
    }

    /// All rails for which this holds.
    pub(super) fn rails_of(&self, is_it: impl Fn(&Rail) -> bool) -> Vec<(Line, usize)> {
        let using = self.using.iter().map(|(line, using)| (line, &using.tie));
        let users = self.users.iter().map(|(line, user)| (line, &user.tie));
        using
            .chain(users)
            .flat_map(|(line, tie)| {
                let rails = tie.rails.iter().enumerate();
                let found = rails.filter_map(|(at, rail)| is_it(rail).then_some((*line, at)));
                found.collect::<Vec<_>>()
            })
            .collect()
    }

    /// Somebody says something about rails.
    pub(super) fn hear_control(&mut self, line: Line, rail: usize, control: Control) -> Result<()> {
        let is_user = self.users.contains_key(&line);
        match control {
            Control::Ask { token } => {
                if is_user && token == PROOF {
                    self.proved(line, rail);
                }
                let answer = Control::Answer { token };
                let told = self.wire(line, rail).map(|wire| wire.tell(&answer));
                self.heat(line, rail);
                told.unwrap_or(Ok(()))
            }
            Control::Answer { token: PROOF } if !is_user => {
                self.proved(line, rail);
                Ok(())
            }
            Control::Answer { token } if !is_user => {
                if let Some(using) = self.using.get_mut(&line) {
                    using.end_mark(token, rail);
                }
                Ok(())
            }
            Control::Stopped { which, heard } if is_user => self.user_stopped(line, which, heard),
            Control::Gone { which, heard } if !is_user => self.owner_gone(line, which, heard),
            Control::Offer { which, offer } if is_user => self.take_up(line, which, &offer),
            Control::Taken { which, offer } if !is_user => self.taken_up(line, which, &offer),
            _ => Err(not_fitting("a word about rails of the wrong side")),
        }
    }

    /// A user of our memory has stopped its end of a rail.
    fn user_stopped(&mut self, line: Line, which: Which, heard: u64) -> Result<()> {
        let Some(tie) = self.tie(line) else {
            return Ok(());
        };
        let (rail, one) = tie.meant(which)?;
        if which.made < one.made {
            return Ok(());
        }
        // The offer of one that was stopped may be on its way.
        one.made = which.made;
        match &mut one.condition {
            Condition::Ending { is_told: true, .. } => one.condition = Condition::Down(None),
            Condition::Ending { is_gone, .. } => *is_gone = true,
            Condition::Down(_) => self.bury_rail(line, rail, true),
            _ => {
                if let Some(wire) = &mut one.wire {
                    wire.stop();
                }
                one.condition = Condition::Ending {
                    until: Instant::now() + ENDING_MAX,
                    is_told: false,
                    is_gone: true,
                };
                self.heat(line, rail);
                self.is_timed = true;
            }
        }
        let Some(tie) = self.tie(line) else {
            return Ok(());
        };
        tie.speech.lose(rail);
        tie.speech.resume(rail, heard)?;
        self.say_on(line);
        Ok(())
    }

    /// The owner's end of a rail is gone.
    fn owner_gone(&mut self, line: Line, which: Which, heard: u64) -> Result<()> {
        let Some(tie) = self.tie(line) else {
            return Ok(());
        };
        let (rail, one) = tie.meant(which)?;
        if one.made != which.made {
            return Ok(());
        }
        // The owner may have found out first.
        self.fail_rail(line, rail, "the peer's end of it failed");
        let Some(tie) = self.tie(line) else {
            return Ok(());
        };
        let Condition::Ending {
            is_told, is_gone, ..
        } = &mut tie.rails[rail].condition
        else {
            return Ok(());
        };
        let is_over = *is_told;
        *is_gone = true;
        tie.speech.resume(rail, heard)?;
        if is_over {
            self.over_with(line, rail);
        }
        Ok(())
    }
}
