//! The side that moves bytes: asks for regions, hands pieces of jobs to UCX, settles them.

use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::active::{Active, Phase, WINDOW};
use super::frame::Session;
use super::state::State;
use super::using::{Asked, Held, Using};
use crate::agent::RemoteRegion;
use crate::backend::direct;
use crate::backend::giving_way::{LARGE_BYTES, OPEN_MAX};
use crate::backend::unix::{Call, Message, Outcome, Waiting};
use crate::backend::{Operation, abandoned};
use crate::descriptor::Target;
use crate::plan::Plan;
use crate::region::RegionId;
use crate::sys::ucx::{Granted, Moving, Started};

/// Pieces that are handed over before UCX and others get their turn.
const TURN_PIECES: usize = 64;

fn not_fitting(text: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}

/// Counts a job as a user of all regions of the peer that it names, or of none.
fn hold(using: &mut Using, plan: &Plan) -> Result<()> {
    let regions = || {
        plan.remote.iter().filter_map(|target| match target {
            Target::Remote(region) => Some(region.id),
            Target::Local(_) => None,
        })
    };
    for id in regions() {
        if using.held.get(&id).is_none_or(|held| held.is_revoked) {
            let text = format!("region {id} is deregistered");
            return Err(Error::new(ErrorKind::NotFound, text));
        }
    }
    for id in regions() {
        if let Some(held) = using.held.get_mut(&id) {
            held.users += 1;
        }
    }
    Ok(())
}

impl State {
    /// Asks the peer for a region, once for all who need it: whether it is here already.
    pub(super) fn want(
        &mut self,
        session: Session,
        region: &Arc<RemoteRegion>,
        call: Option<&Arc<Call>>,
        job: Option<usize>,
    ) -> Result<bool> {
        let closed = || Error::new(ErrorKind::PeerLost, "the path is closed");
        let using = self.using.get_mut(&session).ok_or_else(closed)?;
        if using.shared.is_lost() {
            return Err(using.shared.loss());
        }
        if using
            .held
            .get(&region.id)
            .is_some_and(|held| !held.is_revoked)
        {
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
        let said = self.ask(session, message);
        if said.is_err()
            && let Some(using) = self.using.get_mut(&session)
        {
            using.asked.remove(&id);
        }
        said.map(|()| false)
    }

    /// A job begins: its regions are made ready on both sides.
    pub(super) fn enter(&mut self, number: usize) {
        let ready = self.make_ready(number);
        if let Some(active) = self.jobs.get_mut(&number) {
            match ready {
                Ok(0) => active.phase = Phase::Moving,
                Ok(missing) => active.phase = Phase::Asking(missing),
                Err(error) => active.error = Some(error),
            }
        }
        self.ready.push_back(number);
    }

    /// How many of the peer's regions are still to come.
    fn make_ready(&mut self, number: usize) -> Result<usize> {
        let Some(active) = self.jobs.get(&number) else {
            return Ok(0);
        };
        let (plan, session) = (active.job.plan().clone(), active.session);
        // Neither side's memory is UCX's concern then.
        if plan.sums {
            return Ok(0);
        }
        for target in &*plan.local {
            if let Target::Local(region) = target {
                self.worker.register(region)?;
            }
        }
        let mut missing = 0;
        for target in &*plan.remote {
            if let Target::Remote(region) = target
                && !self.want(session, region, None, Some(number))?
            {
                missing += 1;
            }
        }
        Ok(missing)
    }

    /// A peer whose memory we use says something.
    pub(super) fn answered(&mut self, session: Session, from: Session, message: Message) {
        let heard = match message {
            Message::Done { id: 0, outcome } => self.welcomed(session, from, outcome),
            Message::Done { id, outcome } => self.granted_or_notified(session, id, outcome),
            Message::Revoke { region } => {
                self.revoked(session, region);
                Ok(())
            }
            _ => Err(not_fitting("a message that only users of memory send")),
        };
        if let Err(error) = heard {
            self.lose(session, &error.to_string());
        }
    }

    fn welcomed(&mut self, session: Session, from: Session, outcome: Outcome) -> Result<()> {
        let Some(using) = self.using.get_mut(&session) else {
            return Ok(());
        };
        let Some(Waiting::Call(call)) = using.shared.unanswered.take(0) else {
            return Err(not_fitting("a greeting is answered twice"));
        };
        using.to = Some(from);
        call.answer(Ok((outcome, None)));
        Ok(())
    }

    fn granted_or_notified(&mut self, session: Session, id: u64, outcome: Outcome) -> Result<()> {
        let Some(using) = self.using.get_mut(&session) else {
            return Ok(());
        };
        if let Some(asked) = using.asked.remove(&id) {
            self.granted(session, asked, outcome);
            return Ok(());
        }
        if let Some(summing) = using.summing.remove(&id) {
            self.summed(&summing, outcome);
            return Ok(());
        }
        // Whoever asked may have stopped waiting.
        if let Some(Waiting::Notification(job)) = using.shared.unanswered.take(id) {
            let outcome = match outcome {
                Outcome::Done => Ok(()),
                Outcome::Failed { code, text } => Err(Outcome::failure(code, &text)),
                _ => Err(not_fitting("a notification is answered by something else")),
            };
            self.settled.push((job, outcome));
            self.send_notifications(session);
        }
        Ok(())
    }

    fn granted(&mut self, session: Session, asked: Asked, outcome: Outcome) {
        let kept = self.keep(session, &asked, outcome);
        for call in &asked.calls {
            call.answer(match &kept {
                Ok(()) => Ok((Outcome::Done, None)),
                Err(error) => Err(Error::new(error.kind(), error.to_string())),
            });
        }
        for number in asked.jobs {
            let Some(active) = self.jobs.get_mut(&number) else {
                continue;
            };
            if let Err(error) = &kept {
                let error = Error::new(error.kind(), error.to_string());
                active.error.get_or_insert(error);
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
    fn keep(&mut self, session: Session, asked: &Asked, outcome: Outcome) -> Result<()> {
        let (address, bytes, writable, key) = match outcome {
            Outcome::Keyed {
                address,
                bytes,
                writable,
                key,
            } => (address, bytes, writable, key),
            Outcome::Failed { code, text } => return Err(Outcome::failure(code, &text)),
            _ => return Err(not_fitting("a map is answered without a key")),
        };
        let region = &asked.region;
        let learnt = if asked.is_revoked {
            let text = format!("region {} is deregistered", region.id);
            Err(Error::new(ErrorKind::NotFound, text))
        } else if bytes != region.bytes {
            Err(not_fitting(
                "a region is not as long as the peer's metadata says",
            ))
        } else if region.writable && !writable {
            let text = format!("region {} is read-only", region.id);
            Err(Error::new(ErrorKind::Denied, text))
        } else {
            self.learn(session, region.id, (address, bytes, &key))
        };
        if learnt.is_err() {
            let region = region.id;
            // The peer has handed it out, and would wait for it.
            let _ = self.ask(session, Message::Unmapped { region });
        }
        learnt
    }

    fn learn(
        &mut self,
        session: Session,
        region: RegionId,
        (address, bytes, key): (u64, u64, &[u8]),
    ) -> Result<()> {
        let Some(using) = self.using.get_mut(&session) else {
            return Err(Error::new(ErrorKind::PeerLost, "the path is closed"));
        };
        let granted = Granted {
            region,
            address,
            bytes,
            key,
        };
        self.worker.learn(using.endpoint, &granted)?;
        using.held.insert(region, Held::default());
        Ok(())
    }

    /// The peer wants a region back: it gets it as soon as no job uses it.
    fn revoked(&mut self, session: Session, region: RegionId) {
        let Some(using) = self.using.get_mut(&session) else {
            return;
        };
        if let Some(held) = using.held.get_mut(&region) {
            held.is_revoked = true;
            return self.let_go_of_revoked(session, region);
        }
        if let Some(asked) = using.question(region) {
            asked.is_revoked = true;
            return;
        }
        let _ = self.ask(session, Message::Unmapped { region });
    }

    fn let_go_of_revoked(&mut self, session: Session, region: RegionId) {
        let Some(using) = self.using.get_mut(&session) else {
            return;
        };
        let free = |held: &Held| held.is_revoked && held.users == 0;
        if using.held.get(&region).is_some_and(free) {
            using.held.remove(&region);
            self.worker.forget(using.endpoint, region);
            // If it cannot be said, the peer waits for the endpoint's end.
            let _ = self.ask(session, Message::Unmapped { region });
        }
    }

    /// Hands pieces of waiting jobs to UCX, in turn, and those of jobs that give way when there are no others; whether there
    /// were any.
    pub(super) fn pump(&mut self) -> bool {
        let mut left = TURN_PIECES;
        let mut busy = false;
        while left > 0 {
            let (number, weight) = match self.ready.pop_front() {
                Some(number) => match self.jobs.get(&number) {
                    Some(active) if active.gives_way() && !active.job.is_abandoned() => {
                        self.behind.push_back(number);
                        continue;
                    }
                    _ => (number, 1),
                },
                None => match self.behind.pop_front() {
                    Some(number) => (number, self.weight(number)),
                    None => break,
                },
            };
            busy = true;
            let pieces = self.step(number, left.div_ceil(weight));
            left -= (pieces * weight).clamp(1, left);
        }
        busy
    }

    /// What a piece of a job that gives way counts: UCX may copy it before anybody else gets his turn.
    fn weight(&self, number: usize) -> usize {
        let is_large = |active: &Active| active.left() >= LARGE_BYTES;
        match self.jobs.get(&number).is_some_and(is_large) {
            true => TURN_PIECES / OPEN_MAX,
            false => 1,
        }
    }

    /// Goes on with a job; how many pieces of it were handed over.
    fn step(&mut self, number: usize, most: usize) -> usize {
        let mut pieces = 0;
        let outcome = self.advance(number, most, &mut pieces);
        let Some(active) = self.jobs.get_mut(&number) else {
            return pieces;
        };
        match outcome {
            Ok(false) => {}
            Ok(true) if active.error.is_none() => self.finish(number),
            Ok(true) | Err(_) => {
                if let Err(error) = outcome {
                    active.error.get_or_insert(error);
                }
                // Answers touch no memory of anybody else's.
                if active.open == 0 || active.job.plan().sums {
                    self.finish(number);
                }
            }
        }
        pieces
    }

    /// Whether the job has nothing left to wait for.
    fn advance(&mut self, number: usize, most: usize, pieces: &mut usize) -> Result<bool> {
        let Some(active) = self.jobs.get_mut(&number) else {
            return Ok(false);
        };
        if active.job.is_abandoned() {
            return Err(abandoned());
        }
        let Some(using) = self.using.get_mut(&active.session) else {
            return Err(Error::new(ErrorKind::PeerLost, "the path is closed"));
        };
        if using.shared.is_lost() {
            return Err(using.shared.loss());
        }
        if active.error.is_some() {
            return Ok(active.open == 0);
        }
        let (plan, endpoint) = (active.job.plan().clone(), using.endpoint);
        if plan.sums {
            return self.ask_for_sums(number, pieces);
        }
        match active.phase {
            Phase::Asking(_) => return Ok(false),
            Phase::Flushing => return Ok(active.open == 0),
            Phase::Moving => {}
        }
        if !active.holds {
            hold(using, &plan)?;
            active.holds = true;
        }
        while active.open < WINDOW && *pieces < most {
            if active.must_wait(number, &mut using.background) {
                return Ok(false);
            }
            let Some(piece) = active.cut() else { break };
            let (Target::Local(local), Target::Remote(remote)) = (
                &plan.local[piece.local as usize],
                &plan.remote[piece.remote as usize],
            ) else {
                return Err(not_fitting("a plan between two places of this agent"));
            };
            let moving = Moving {
                local: local.id(),
                local_offset: piece.local_offset,
                remote: remote.id,
                remote_offset: piece.remote_offset,
                len: piece.len,
            };
            *pieces += 1;
            let started = self
                .worker
                .transfer(plan.operation, endpoint, moving, number)?;
            active.began(started, &mut using.background);
        }
        if !active.is_cut() {
            if active.open < WINDOW {
                self.ready.push_back(number);
            }
            return Ok(false);
        }
        if active.open > 0 {
            return Ok(false);
        }
        if plan.operation == Operation::Write && !plan.extents.is_empty() {
            active.phase = Phase::Flushing;
            let started = self.worker.flush(endpoint, number)?;
            active.began(started, &mut using.background);
            return Ok(started == Started::Over);
        }
        Ok(true)
    }

    /// A job is over: nothing of it is open.
    fn finish(&mut self, number: usize) {
        let Some(active) = self.jobs.remove(&number) else {
            return;
        };
        let plan = active.job.plan().clone();
        let session = active.session;
        for target in &*plan.local {
            if let Target::Local(region) = target {
                self.forget_closed(region);
            }
        }
        if let Some(using) = self.using.get_mut(&session) {
            using.jobs -= 1;
        }
        if active.gives_way() {
            self.go_on_behind(session);
        }
        if plan.sums {
            self.forget_sums(session, number);
        }
        if active.holds {
            for target in &*plan.remote {
                if let Target::Remote(region) = target {
                    self.leave(session, region.id);
                }
            }
        }
        match active.error.or_else(|| direct::land(&plan).err()) {
            Some(error) => self.settled.push((active.job, Err(error))),
            None => self.notify(session, active.job),
        }
    }

    /// Lets the next job that gives way go on.
    pub(super) fn go_on_behind(&mut self, session: Session) {
        let Some(using) = self.using.get_mut(&session) else {
            return;
        };
        while let Some(number) = using.background.next() {
            if let Some(active) = self.jobs.get_mut(&number) {
                active.is_waiting = false;
                return self.ready.push_back(number);
            }
        }
    }

    fn leave(&mut self, session: Session, region: RegionId) {
        let using = self.using.get_mut(&session);
        if let Some(held) = using.and_then(|using| using.held.get_mut(&region)) {
            held.users -= 1;
            self.let_go_of_revoked(session, region);
        }
    }
}
