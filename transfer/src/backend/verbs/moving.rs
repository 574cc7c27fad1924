//! The side that moves bytes: hands pieces of jobs to the device, settles them.

use std::collections::HashMap;
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};

use super::active::{Active, Phase, STRIPE_BYTES};
use super::controls::Control;
use super::ending::GIVEN_UP_MAX;
use super::near::nearest;
use super::state::{Line, Memories, State};
use super::using::{Held, Unsent, Using};
use super::wire::Piece;
use crate::backend::direct;
use crate::backend::unix::{Message, Waiting};
use crate::backend::{Job, Operation, abandoned};
use crate::descriptor::Target;
use crate::plan::{Extent, Plan};
use crate::region::RegionId;
use crate::request::Priority;
use crate::sys::cuda::Gpu;
use crate::sys::verbs::{Far, Place};

/// Pieces that are handed over before others get their turn.
const TURN_PIECES: usize = 64;

pub(super) fn not_fitting(text: &'static str) -> Error {
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
    /// A job begins: its regions are made ready on both sides.
    pub(super) fn enter(&mut self, number: u64) {
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
    fn make_ready(&mut self, number: u64) -> Result<usize> {
        let Some(active) = self.jobs.get(&number) else {
            return Ok(0);
        };
        let (plan, line) = (active.job.plan().clone(), active.line);
        let near = direct::local_devices(&plan).next();
        let near = near.map(|memory| self.rails_near(line, memory.gpu()));
        if let Some(active) = self.jobs.get_mut(&number) {
            active.near = near.unwrap_or(u32::MAX);
        }
        // Neither side's memory is the device's concern then.
        if plan.sums {
            return Ok(0);
        }
        for target in &*plan.local {
            if let Target::Local(region) = target {
                self.register(line, region)?;
            }
        }
        let mut missing = 0;
        for target in &*plan.remote {
            if let Target::Remote(region) = target
                && !self.want(line, region, None, Some(number))?
            {
                missing += 1;
            }
        }
        Ok(missing)
    }

    /// A path's rails over the cards that are nearest to a GPU, as bits.
    fn rails_near(&self, line: Line, gpu: &Gpu) -> u32 {
        let Some(using) = self.using.get(&line) else {
            return u32::MAX;
        };
        let near = self.cards.near(gpu);
        let rails = using.tie.rails.iter();
        let of_rails: Vec<_> = rails.map(|rail| near[rail.card]).collect();
        nearest(&of_rails)
    }

    /// Hands pieces of waiting jobs to the device, in turn; whether there were any.
    pub(super) fn pump(&mut self) -> bool {
        let mut left = TURN_PIECES;
        let mut busy = false;
        while left > 0 {
            let Some(number) = self.ready.pop_front() else {
                break;
            };
            busy = true;
            let pieces = self.step(number, left);
            left -= pieces.clamp(1, left);
        }
        busy
    }

    /// Goes on with a job; how many pieces of it were handed over.
    fn step(&mut self, number: u64, most: usize) -> usize {
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
                self.fail_job(number);
            }
        }
        pieces
    }

    /// A job has failed: it is over as soon as nothing of it can have any effect, on either side.
    fn fail_job(&mut self, number: u64) {
        let Some(active) = self.jobs.get_mut(&number) else {
            return;
        };
        // Answers touch no memory of anybody else's.
        if active.open > 0 && !active.job.plan().sums {
            if active.forced_at.is_none() {
                active.forced_at = Some(Instant::now() + GIVEN_UP_MAX);
                self.is_timed = true;
            }
            return;
        }
        let writes = active.job.plan().operation == Operation::Write;
        let denied = active.error.as_ref().map(Error::kind) == Some(ErrorKind::Denied);
        if let Some(using) = self.using.get(&active.line)
            && using.shared.is_lost()
            && active.began
        {
            if (writes || denied) && !using.is_decided {
                // Until the peer's word has come, what was written may still be on its way.
                return;
            }
            if denied
                && using.is_gone
                && let Some(error) = active.error.take()
            {
                // The memory of a process that dies goes before its queue pairs.
                let text = format!("the peer is gone: {error}");
                active.error = Some(Error::new(ErrorKind::PeerLost, text));
            }
        }
        self.finish(number);
    }

    /// Whether the job has nothing left to wait for.
    fn advance(&mut self, number: u64, most: usize, pieces: &mut usize) -> Result<bool> {
        let Some(active) = self.jobs.get_mut(&number) else {
            return Ok(false);
        };
        if active.error.is_some() {
            return Ok(true);
        }
        active.job.go_on()?;
        let Some(using) = self.using.get_mut(&active.line) else {
            return Err(Error::new(ErrorKind::PeerLost, "the path is closed"));
        };
        if using.shared.is_lost() {
            return Err(using.shared.loss());
        }
        if active.phase != Phase::Moving {
            return Ok(false);
        }
        let plan = active.job.plan().clone();
        if plan.sums {
            return self.ask_for_sums(number, pieces);
        }
        if !active.holds {
            hold(using, &plan)?;
            active.holds = true;
        }
        let (touched, may_go_on) = self.hand_over(number, &plan, most, pieces)?;
        let Some(active) = self.jobs.get_mut(&number) else {
            return Ok(false);
        };
        let (line, is_cut, is_open) = (active.line, active.is_cut(), active.open > 0);
        if plan.operation == Operation::Write {
            active.rails |= touched;
        }
        for rail in bits(touched) {
            self.heat(line, rail);
        }
        if !is_cut && may_go_on {
            self.ready.push_back(number);
        }
        Ok(is_cut && !is_open)
    }

    /// Hands pieces of a job to the devices, as many as may be. The rails that they went by, as bits, and whether there would
    /// be more to hand over at once.
    fn hand_over(
        &mut self,
        number: u64,
        plan: &Plan,
        most: usize,
        pieces: &mut usize,
    ) -> Result<(u32, bool)> {
        let mut touched = 0;
        let Some(active) = self.jobs.get_mut(&number) else {
            return Ok((touched, false));
        };
        let Some(using) = self.using.get_mut(&active.line) else {
            return Ok((touched, false));
        };
        let usable = using.tie.usable(active.near);
        let rails = usable.count_ones() as usize;
        let is_striped = active.is_striped() && rails > 1;
        let gives_way = active.gives_way();
        while *pieces < most && active.may_begin(rails) {
            if active.must_wait(number, &mut using.background) {
                return Ok((touched, false));
            }
            let Some(rail) = using.tie.choose(is_striped, usable) else {
                using.waiting.push_back(number);
                return Ok((touched, false));
            };
            let one = &mut using.tie.rails[rail];
            let (card, Some(wire)) = (&self.cards.cards[one.card], &mut one.wire) else {
                break;
            };
            let largest = if is_striped { STRIPE_BYTES } else { u64::MAX };
            let Some(extent) = active.cut(card.piece().min(largest)) else {
                break;
            };
            let (local, far) = ends(
                &self.memories,
                card.device,
                &using.held,
                rail,
                plan,
                &extent,
            )?;
            let writes = plan.operation == Operation::Write;
            let job = number;
            wire.work(Piece { job, extent }, writes, local, far)?;
            *pieces += 1;
            touched |= 1 << rail;
            active.open += 1;
            active.began = true;
            if gives_way {
                using.background.begin();
            }
        }
        Ok((touched, active.may_begin(rails)))
    }

    /// A job is over: nothing of it is open.
    fn finish(&mut self, number: u64) {
        let Some(active) = self.jobs.remove(&number) else {
            return;
        };
        let Active {
            job,
            line,
            error,
            holds,
            rails,
            ..
        } = active;
        let plan = job.plan().clone();
        for target in &*plan.local {
            if let Target::Local(region) = target {
                self.forget_closed(region);
            }
        }
        if let Some(using) = self.using.get_mut(&line) {
            using.jobs -= 1;
        }
        if job.priority() == Priority::Background {
            self.go_on_behind(line);
        }
        if plan.sums {
            self.forget_sums(line, number);
        }
        if holds {
            for target in &*plan.remote {
                if let Target::Remote(region) = target {
                    self.leave(line, region.id);
                }
            }
        }
        if !self.leaving.is_empty() {
            self.let_leave(Instant::now());
        }
        match error.or_else(|| direct::land(&plan).err()) {
            Some(error) => self.settled.push((job, Err(error))),
            None => self.notify(line, number, job, rails),
        }
    }

    /// Lets the next job that gives way go on.
    pub(super) fn go_on_behind(&mut self, line: Line) {
        let Some(using) = self.using.get_mut(&line) else {
            return;
        };
        while let Some(number) = using.background.next() {
            if let Some(active) = self.jobs.get_mut(&number) {
                active.is_waiting = false;
                return self.ready.push_back(number);
            }
        }
    }

    fn leave(&mut self, line: Line, region: RegionId) {
        let using = self.using.get_mut(&line);
        if let Some(held) = using.and_then(|using| using.held.get_mut(&region)) {
            held.users -= 1;
            self.let_go_of_revoked(line, region);
        }
    }

    /// Hands a job's notification to the peer, after those that came before it; its answer settles the job. What was written
    /// is in place by then: what came by the rail that carries the notification is, and the others are asked.
    fn notify(&mut self, line: Line, number: u64, job: Job, rails: u32) {
        if !job.notifies() {
            return self.settled.push((job, Ok(())));
        }
        let Some(using) = self.using.get_mut(&line) else {
            let lost = Error::new(ErrorKind::PeerLost, "the path is closed");
            return self.settled.push((job, Err(lost)));
        };
        job.awaits_peer();
        // Where messages go may change before it is said: then all rails that it was written by are asked.
        let over = using.tie.speech.over.map_or(0, |over| 1 << over);
        let others = if rails & !over == 0 { 0 } else { rails };
        let up = using.tie.up().fold(0_u32, |up, rail| up | 1 << rail);
        let asked = others & up;
        let mark = (asked != 0).then_some(number + 1);
        if let Some(token) = mark {
            using.mark(token, asked);
        }
        using.unsent.push_back(Unsent { job, mark });
        for rail in bits(asked) {
            let token = number + 1;
            let told = self
                .wire(line, rail)
                .map(|wire| wire.tell(&Control::Ask { token }));
            if let Some(Err(error)) = told {
                self.fail_rail(line, rail, &error.to_string());
            }
            self.heat(line, rail);
        }
        self.send_notifications(line);
    }

    /// Sends the notifications that wait, as many as may be unanswered.
    pub(super) fn send_notifications(&mut self, line: Line) {
        while let Some(using) = self.using.get_mut(&line) {
            if !using.may_notify() {
                break;
            }
            let Some(Unsent { job, .. }) = using.unsent.pop_front() else {
                break;
            };
            let shared = using.shared.clone();
            let bytes = job.notification().cloned().unwrap_or_default();
            let id = shared.unanswered.number();
            let entered = shared.unanswered.enter(id, Waiting::Notification(job));
            if let Err((who, _)) = entered {
                // There was room, so the path is lost.
                if let Waiting::Notification(job) = who {
                    self.settled.push((job, Err(shared.loss())));
                }
            } else if let Err(error) = self.ask(line, &Message::Notify { id, bytes })
                && let Some(Waiting::Notification(job)) = shared.unanswered.take(id)
            {
                self.settled.push((job, Err(error)));
            }
        }
    }

    /// Some callers gave up: their jobs are looked at.
    pub(super) fn sweep(&mut self) {
        let jobs = self.jobs.iter();
        let given_up =
            jobs.filter_map(|(number, active)| active.job.is_abandoned().then_some(*number));
        self.ready.extend(given_up);
        let mut roomy = Vec::new();
        for (line, using) in &mut self.using {
            let unsent = using.unsent.extract_if(|unsent| unsent.job.is_abandoned());
            let mut given_up: Vec<Job> = unsent.map(|unsent| unsent.job).collect();
            given_up.extend(using.shared.unanswered.take_abandoned());
            if !given_up.is_empty() {
                roomy.push(*line);
            }
            let given_up = given_up.into_iter();
            self.settled
                .extend(given_up.map(|job| (job, Err(abandoned()))));
        }
        for line in roomy {
            self.send_notifications(line);
        }
    }
}

/// The places of the bits that are set.
fn bits(set: u32) -> impl Iterator<Item = usize> {
    (0..u32::BITS as usize).filter(move |at| set & (1 << at) != 0)
}

/// Both ends of a piece, for a device and a rail.
fn ends(
    memories: &Memories,
    device: usize,
    held: &HashMap<RegionId, Held>,
    rail: usize,
    plan: &Plan,
    piece: &Extent,
) -> Result<(Place, Far)> {
    let (Target::Local(local), Target::Remote(remote)) = (
        &plan.local[piece.local as usize],
        &plan.remote[piece.remote as usize],
    ) else {
        return Err(not_fitting("a plan between two places of this agent"));
    };
    let memory = memories
        .get(&local.id())
        .and_then(|all| all.get(device)?.as_ref());
    let held = held
        .get(&remote.id)
        .map(|held| (held.address, held.keys.get(rail)));
    let (Some(memory), Some((address, Some(key)))) = (memory, held) else {
        let text = format!("region {} or {} is deregistered", local.id(), remote.id);
        return Err(Error::new(ErrorKind::NotFound, text));
    };
    let end = piece.remote_offset.checked_add(piece.len);
    if end.is_none_or(|end| end > remote.bytes) {
        return Err(Error::invalid(
            "remote offset",
            piece.remote_offset,
            ..remote.bytes,
        ));
    }
    let place = Place {
        memory: memory.clone(),
        offset: piece.local_offset,
        len: piece.len as u32,
    };
    let far = Far {
        address: address + piece.remote_offset,
        key: *key,
    };
    Ok((place, far))
}
