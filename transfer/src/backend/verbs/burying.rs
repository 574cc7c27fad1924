//! Queue pairs that are taken away, each by a thread of its own: a device may take long for that, soft-RoCE for as long as
//! packets of theirs wait in a port that is down. Meanwhile the others go on.

use std::collections::HashSet;
use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::aside::Then;
use super::controls::Control;
use super::greeting::STOPPED;
use super::rails::ENDING_MAX;
use super::state::{Line, State};
use super::tie::Condition;
use super::wire::{Piece, Wire};
use crate::region::RegionId;

/// What is to be done with the pieces that are not known to be over.
type Buried = Box<dyn FnOnce(&mut State, Vec<Piece>) + Send>;

/// A peer that was cut off, until its queue pairs are gone.
pub(super) struct Parting {
    stream: TcpStream,
    /// Burials that are not over.
    left: usize,
    /// Regions that it may still use.
    pub(super) used: HashSet<RegionId>,
}

impl State {
    /// Takes wires away, and then does something with the pieces that they have not told of: the devices touch no memory for
    /// them any more. Also when the agent is closed meanwhile.
    pub(super) fn bury(
        &mut self,
        wires: Vec<Wire>,
        then: impl FnOnce(&mut Self, Vec<Piece>) + Send + 'static,
    ) {
        if wires.is_empty() {
            return then(self, Vec::new());
        }
        self.burials += 1;
        let then: Buried = Box::new(move |state, pieces| {
            state.burials -= 1;
            then(state, pieces);
        });
        let end = |wires: Vec<Wire>| wires.into_iter().flat_map(Wire::end).collect::<Vec<_>>();
        let task = Arc::new(Mutex::new(Some((wires, then))));
        let take = |task: &Mutex<Option<(Vec<Wire>, Buried)>>| {
            task.lock().unwrap_or_else(PoisonError::into_inner).take()
        };
        let (own, aside) = (task.clone(), self.aside.clone());
        let work = move || {
            if let Some((wires, then)) = take(&own) {
                let pieces = end(wires);
                let then: Then = Box::new(move |state: &mut Self| then(state, pieces));
                aside.put(then);
            }
        };
        let started = std::thread::Builder::new()
            .name("kvf-verbs-end".into())
            .spawn(work);
        if let Err(error) = started
            && let Some((wires, then)) = take(&task)
        {
            tracing::warn!(%error, "no thread to take queue pairs away; others wait for that");
            let pieces = end(wires);
            then(self, pieces);
        }
    }

    /// Takes the own end of a rail away. The other side is told of it after that, if it waits for it.
    pub(super) fn bury_rail(&mut self, line: Line, rail: usize, owes: bool) {
        let Some(tie) = self.tie(line) else { return };
        let one = &mut tie.rails[rail];
        one.owes |= owes;
        if one.is_going {
            return;
        }
        one.is_going = true;
        match one.wire.take() {
            Some(wire) => self.bury(vec![wire], move |state, pieces| {
                state.rail_buried(line, rail, pieces);
            }),
            None => self.rail_buried(line, rail, Vec::new()),
        }
    }

    /// The own end of a rail is gone.
    fn rail_buried(&mut self, line: Line, rail: usize, pieces: Vec<Piece>) {
        let is_user = self.users.contains_key(&line);
        let Some(tie) = self.tie(line) else {
            return self.part(line);
        };
        let one = &mut tie.rails[rail];
        one.is_going = false;
        one.unfinished.extend(pieces);
        if self
            .using
            .get(&line)
            .is_some_and(|using| using.ending.is_some())
        {
            return self.give_up_unfinished(line);
        }
        let Some(tie) = self.tie(line) else { return };
        let one = &mut tie.rails[rail];
        let mut is_over = false;
        if let Condition::Ending {
            until,
            is_told,
            is_gone,
        } = &mut one.condition
        {
            *is_told = true;
            // Only now is it the other side's turn.
            *until = Instant::now() + ENDING_MAX;
            is_over = *is_gone;
        }
        if std::mem::take(&mut one.owes) {
            let (which, heard) = (tie.which(rail), tie.speech.heard);
            let control = if is_user {
                Control::Gone { which, heard }
            } else {
                Control::Stopped { which, heard }
            };
            match tie.tell(&control) {
                Ok(over) => self.heat(line, over),
                Err(error) => return self.fail(line, &error.to_string()),
            }
        }
        self.is_timed = true;
        match (is_over, is_user) {
            (true, false) => self.over_with(line, rail),
            (true, true) => self.rest_until_offered(line, rail),
            _ => {}
        }
    }

    /// Neither end of a rail to a user of our memory is left: it may offer it again.
    fn rest_until_offered(&mut self, line: Line, rail: usize) {
        if let Some(tie) = self.tie(line) {
            tie.rails[rail].condition = Condition::Down(None);
        }
    }

    /// Takes all wires of a path that has ended away.
    pub(super) fn destroy(&mut self, line: Line) {
        let Some(using) = self.using.get_mut(&line) else {
            return;
        };
        let wires = using.tie.end();
        using.burials += 1;
        self.bury(wires, move |state, pieces| {
            let Some(using) = state.using.get_mut(&line) else {
                return;
            };
            using.burials -= 1;
            if let Some(rail) = using.tie.rails.first_mut() {
                rail.unfinished.extend(pieces);
            }
            state.give_up_unfinished(line);
        });
    }

    /// A path has ended: what its rails have not finished, and no device has any more, is over for its jobs.
    pub(super) fn give_up_unfinished(&mut self, line: Line) {
        let Some(using) = self.using.get_mut(&line) else {
            return;
        };
        let rails = using.tie.rails.iter_mut();
        let unfinished = rails.flat_map(|rail| std::mem::take(&mut rail.unfinished));
        for piece in unfinished.collect::<Vec<_>>() {
            if let Some(active) = self.jobs.get_mut(&piece.job) {
                active.open -= 1;
                active.error.get_or_insert_with(|| using.shared.loss());
                self.ready.push_back(piece.job);
            }
        }
    }

    /// A peer is cut off: it is told so when all of its queue pairs are gone.
    pub(super) fn begin_parting(
        &mut self,
        line: Line,
        (stream, used): (TcpStream, HashSet<RegionId>),
        (wires, going): (Vec<Wire>, usize),
    ) {
        let left = going + 1;
        let parting = Parting { stream, left, used };
        self.parting.insert(line, parting);
        self.bury(wires, move |state, _| state.part(line));
    }

    /// A burial of such a peer's is over.
    fn part(&mut self, line: Line) {
        let Some(parting) = self.parting.get_mut(&line) else {
            return;
        };
        parting.left -= 1;
        if parting.left > 0 {
            return;
        }
        if let Some(mut parting) = self.parting.remove(&line) {
            // It may be gone.
            let _ = parting.stream.write(&[STOPPED]);
        }
        self.let_leave(Instant::now());
    }

    /// Nobody waits for burials any more: jobs end all the same, and it is told that their memory may still be used.
    pub(super) fn leave_buried(&mut self) {
        for (number, active) in &mut self.jobs {
            if active.open > 0 && !active.job.plan().sums {
                active.open = 0;
                if let Some(using) = self.using.get(&active.line) {
                    using.shared.undrained.store(true, Ordering::Release);
                }
            }
            self.ready.push_back(*number);
        }
        self.parting.clear();
    }
}
