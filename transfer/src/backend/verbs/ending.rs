//! How paths end: what is under way stops, and it is found out whether anything of it can still land.

use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::active::Active;
use super::greeting::{STOP, STOPPED};
use super::state::{Line, State};

/// How long a path that ends waits for what is under way on it, and for the peer's word.
const ENDING_MAX: Duration = Duration::from_secs(2);

/// How long what is open of a job that was given up may take while nothing on its path ends. Then the path ends, and with it all that is
/// open on it.
pub(super) const GIVEN_UP_MAX: Duration = Duration::from_secs(1);

/// How much longer it may take behind others.
const BEHIND_OTHERS_MAX: Duration = Duration::from_secs(9);

impl State {
    /// The wire is of no use any more.
    pub(super) fn fail(&mut self, line: Line, reason: &str) {
        self.lose(line, reason);
        self.cut_off(line, reason);
    }

    /// The path ends for this reason: posts are refused, whoever waits is told, what is under way stops.
    pub(super) fn lose(&mut self, line: Line, reason: &str) {
        let Some(using) = self.using.get_mut(&line) else {
            return;
        };
        if !using.shared.lose(reason) {
            return;
        }
        tracing::debug!(reason, "a path over verbs ends");
        using.ending = Some(Instant::now() + ENDING_MAX);
        using.tie.stop();
        // Only now is it true that this side sends nothing more.
        let said = using.stream.as_mut().map(|stream| stream.write(&[STOP]));
        if !matches!(said, Some(Ok(1))) {
            using.stream = None;
        }
        let shared = using.shared.clone();
        if let Some(call) = using.opening.take() {
            call.answer(Err(shared.loss()));
        }
        for asked in std::mem::take(&mut using.asked).into_values() {
            asked
                .calls
                .iter()
                .for_each(|call| call.answer(Err(shared.loss())));
        }
        using.unasked.clear();
        let unsent = std::mem::take(&mut using.unsent);
        let unsent = unsent.into_iter().map(|unsent| unsent.job);
        for job in shared.end_waiting().into_iter().chain(unsent) {
            self.settled.push((job, Err(shared.loss())));
        }
        for rail in 0..shared.rails.len() {
            self.heat(line, rail);
        }
        self.is_timed = true;
        self.give_up_unfinished(line);
        self.rouse(line);
    }

    /// Has all jobs of a path looked at.
    fn rouse(&mut self, line: Line) {
        let jobs = self.jobs.iter();
        let of_it = jobs.filter_map(|(number, job)| (job.line == line).then_some(*number));
        self.ready.extend(of_it);
    }

    /// The path stands still: it ends, unless somebody still wants of it what could not be repeated.
    pub(super) fn give_way(&mut self, line: Line) {
        let mut of_it = self.jobs.values().filter(|job| job.line == line);
        if of_it.all(|active| active.job.is_abandoned()) {
            self.lose(line, "it stood still");
        }
    }

    /// Whether something of an ended path can still land is known now.
    fn decide(&mut self, line: Line, is_fenced: bool) {
        let Some(using) = self.using.get_mut(&line) else {
            return;
        };
        if !std::mem::replace(&mut using.is_decided, true) {
            if !is_fenced {
                using.shared.unfenced.store(true, Ordering::Release);
            }
            self.rouse(line);
        }
    }

    /// A peer that we use has said something by TCP, or closed that.
    pub(super) fn peer_spoke(&mut self, line: Line) {
        let Some(stream) = self.using.get_mut(&line).and_then(|u| u.stream.as_mut()) else {
            return;
        };
        let mut bytes = [0; 16];
        let (said, is_closed) = match stream.read(&mut bytes) {
            Ok(0) => (None, true),
            Ok(count) => (Some(bytes[..count].contains(&STOPPED)), false),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
            Err(_) => (None, true),
        };
        if is_closed && let Some(using) = self.using.get_mut(&line) {
            using.stream = None;
            using.is_gone = !using.is_decided;
        }
        match said {
            Some(true) => {
                self.lose(line, "the peer has ended the path");
                self.decide(line, true);
            }
            Some(false) => self.lose(line, "the peer speaks another language"),
            None => {
                self.lose(line, "the peer is gone");
                self.decide(line, false);
            }
        }
    }

    /// Ends what is over, or has had its time.
    pub(super) fn tidy(&mut self) {
        let now = Instant::now();
        let (mut drained, mut undecided, mut over) = (Vec::new(), Vec::new(), Vec::new());
        for (line, using) in &self.using {
            let Some(until) = using.ending else {
                continue;
            };
            let is_late = until <= now;
            if using.tie.has_wires() && (using.tie.is_drained() || is_late) {
                drained.push(*line);
            }
            if !using.is_decided && (is_late || using.stream.is_none()) {
                undecided.push(*line);
            }
            if using.is_over() {
                over.push(*line);
            }
        }
        for line in drained {
            self.destroy(line);
            self.rouse(line);
        }
        undecided
            .into_iter()
            .for_each(|line| self.decide(line, false));
        for line in over {
            self.using.remove(&line);
        }
        self.force(now);
        let next = self.tend(now);
        self.due = next.filter(|next| *next > now);
        self.let_leave(now);
        self.strangers.retain(|_, stranger| now < stranger.until);
        self.is_timed = next.is_some_and(|next| next <= now)
            || !self.leaving.is_empty()
            || !self.strangers.is_empty()
            || self.using.values().any(|using| using.ending.is_some())
            || self.jobs.values().any(|job| job.forced_at.is_some());
    }

    /// Ends paths on which something that was given up does not end. What it stands behind is waited for, as long as that goes on.
    fn force(&mut self, now: Instant) {
        let goes_on = |line: &Line| {
            let using = self.using.get(line);
            let recently = now.checked_sub(GIVEN_UP_MAX);
            recently.is_some_and(|then| using.is_some_and(|it| it.tie.has_moved_since(then)))
        };
        let is_late = |job: &&Active| {
            let waited = |at| now.checked_duration_since(at);
            job.forced_at
                .and_then(waited)
                .is_some_and(|waited| waited >= BEHIND_OTHERS_MAX || !goes_on(&job.line))
        };
        let late: Vec<Line> = self
            .jobs
            .values()
            .filter(is_late)
            .map(|job| job.line)
            .collect();
        for line in late {
            self.lose(line, "what was given up on it did not end");
        }
    }

    /// The agent goes: every path ends, and nobody uses its memory any more.
    pub(super) fn close(&mut self) {
        self.is_closed = true;
        let lines: Vec<_> = self.using.keys().copied().collect();
        for line in lines {
            self.lose(line, "the agent was closed");
        }
        let users: Vec<_> = self.users.keys().copied().collect();
        for line in users {
            self.cut_off(line, "the agent was closed");
        }
        self.strangers.clear();
    }

    /// Whatever is left after that goes by force.
    pub(super) fn end(&mut self) {
        let lines: Vec<_> = self.using.keys().copied().collect();
        for line in lines {
            self.destroy(line);
            self.decide(line, false);
        }
        self.leave_buried();
        // Each step may make others ready, and all of them end.
        while self.pump() {}
        self.tidy();
        for leaving in &mut self.leaving {
            leaving.until = Instant::now();
        }
        self.let_leave(Instant::now());
        for leaving in self.leaving.drain(..) {
            leaving.keep();
        }
    }
}
