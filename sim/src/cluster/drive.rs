//! One step after the other: time goes to what is due next, and everything that is due happens.

use kvcache_core::Time;
use kvcache_core::manager::{Command, Outcome};
use kvfabric_transfer::backend::sim::Effect;

use super::directory::{self, Announcement};
use super::{Check, Cluster, Due, STEPS_BETWEEN_CHECKS, STEPS_MAX, Sabotage};

impl Cluster {
    /// Goes to the next time at which something happens, and lets it happen.
    pub(super) fn step(&mut self) -> Check {
        let Some(next) = self.next_time() else {
            return Err("requests are under way, but nothing will ever happen".to_owned());
        };
        // A manager may ask for a time that has passed; time itself never goes back.
        self.now = self.now.max(next);
        self.summary.steps += 1;
        if self.summary.steps > STEPS_MAX {
            return Err(format!("no end after {STEPS_MAX} steps"));
        }
        self.exchange.handle_timeout(self.now);
        while let Some(effect) = self.exchange.poll_effect() {
            self.take_effect(effect)?;
        }
        for position in 0..self.pods.len() {
            let pod = &mut self.pods[position];
            if pod.alive && pod.manager.poll_timeout().is_some_and(|at| at <= self.now) {
                pod.manager.handle_timeout(self.now);
            }
        }
        while let Some(first) = self
            .agenda
            .first_entry()
            .filter(|first| first.key().0 <= self.now)
        {
            let due = first.remove();
            self.take_due(due)?;
        }
        self.pump()?;
        if self.summary.steps.is_multiple_of(STEPS_BETWEEN_CHECKS) {
            self.pods
                .iter()
                .filter(|pod| pod.alive)
                .for_each(|pod| pod.manager.check_invariants());
            self.check_pins()?;
        }
        Ok(())
    }

    pub(super) fn next_time(&self) -> Option<Time> {
        let managers = self
            .pods
            .iter()
            .filter(|pod| pod.alive)
            .filter_map(|pod| pod.manager.poll_timeout());
        let agenda = self.agenda.first_key_value().map(|((at, _), _)| *at);
        managers
            .chain(agenda)
            .chain(self.exchange.poll_timeout())
            .min()
    }

    /// Does all that the managers and engines want done now.
    pub(super) fn pump(&mut self) -> Check {
        let mut is_busy = true;
        while is_busy {
            is_busy = false;
            for position in 0..self.pods.len() {
                while let Some(command) = self.poll_command(position) {
                    is_busy = true;
                    self.execute(position, command)?;
                }
                self.announce(position);
                while let Some(outcome) = self.poll_outcome(position) {
                    is_busy = true;
                    self.take_outcome(position, outcome)?;
                }
            }
        }
        Ok(())
    }

    fn poll_command(&mut self, position: usize) -> Option<Command> {
        let pod = &mut self.pods[position];
        if pod.alive {
            pod.manager.poll_command(self.now)
        } else {
            None
        }
    }

    fn poll_outcome(&mut self, position: usize) -> Option<Outcome> {
        let pod = &mut self.pods[position];
        if pod.alive {
            pod.manager.poll_outcome()
        } else {
            None
        }
    }

    /// Sends what a pod has to announce to the index; it takes its time, and keeps its order.
    fn announce(&mut self, position: usize) {
        let pod = &mut self.pods[position];
        if !pod.alive {
            return;
        }
        let mut announcements: Vec<Announcement> = pod
            .engine
            .take_events()
            .into_iter()
            .map(Announcement::Engine)
            .collect();
        while let Some(event) = pod.manager.poll_event() {
            if self.config.sabotage != Sabotage::SwallowRemovals || !directory::leaves_host(&event)
            {
                announcements.push(Announcement::Node(event));
            }
        }
        if announcements.is_empty() {
            return;
        }
        let peer = pod.peer;
        let lag = self.some_time(self.config.faults.index_lag_max);
        let at = (self.now + lag).max(self.pods[position].announced_until);
        self.pods[position].announced_until = at;
        if at <= self.now {
            announcements
                .into_iter()
                .for_each(|one| self.directory.apply(peer, one));
        } else {
            self.schedule_at(at, Due::Announced(peer, announcements));
        }
    }

    fn take_due(&mut self, due: Due) -> Check {
        match due {
            Due::Copied(peer, command) => self.local_copy_ended(peer, command),
            Due::Drained(peer, command) => self.local_copy_drained(peer, command),
            Due::Unanswered(peer, command) => {
                self.lease_unanswered(peer, command);
                Ok(())
            }
            Due::SegmentDropped(peer, command, segment) => {
                self.segment_dropped(peer, command, segment);
                Ok(())
            }
            Due::Announced(peer, announcements) => {
                announcements
                    .into_iter()
                    .for_each(|one| self.directory.apply(peer, one));
                Ok(())
            }
            Due::Computed { request, stay } => self.computed(request, stay),
            Due::Start(request) => self.start(request),
            Due::Gone(peer) => {
                self.noticed(peer);
                Ok(())
            }
            Due::Restart(position) => self.restart(position),
            Due::Heal(one, other) => {
                self.exchange.heal(one, other);
                Ok(())
            }
            Due::Disturb => {
                self.disturb();
                Ok(())
            }
            Due::Upkeep => self.upkeep(),
            Due::Retired(peer) => {
                if let Some(position) = self.living(peer) {
                    self.end(position);
                }
                Ok(())
            }
        }
    }

    fn take_effect(&mut self, effect: Effect) -> Check {
        match effect {
            Effect::Landed {
                transfer,
                offset,
                len,
                corruption,
            } => {
                self.landed(transfer, offset, len, corruption);
                Ok(())
            }
            Effect::Finished {
                transfer,
                failure,
                settled,
                ..
            } => self.transfer_finished(transfer, failure, settled),
            Effect::Drained { transfer } => {
                self.transfer_drained(transfer);
                Ok(())
            }
            // A damaged message is as good as lost: its protocol notices.
            Effect::Message {
                corrupted: true, ..
            }
            | Effect::Notified { .. } => Ok(()),
            Effect::Message { to, tag, .. } => {
                self.take_message(to, tag);
                Ok(())
            }
        }
    }
}
