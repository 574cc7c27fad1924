//! Notifications of jobs that have moved their bytes, and jobs that were given up.

use kvcache_core::{Error, ErrorKind};

use super::frame::Session;
use super::state::State;
use crate::backend::unix::{Message, Waiting};
use crate::backend::{Job, abandoned};

impl State {
    /// Hands a job's notification to the peer, after those that came before it; its answer settles the job.
    pub(super) fn notify(&mut self, session: Session, job: Job) {
        if !job.notifies() {
            return self.settled.push((job, Ok(())));
        }
        let Some(using) = self.using.get_mut(&session) else {
            let lost = Error::new(ErrorKind::PeerLost, "the path is closed");
            return self.settled.push((job, Err(lost)));
        };
        job.awaits_peer();
        using.unsent.push_back(job);
        self.send_notifications(session);
    }

    /// Sends the notifications that wait, as many as may be unanswered.
    pub(super) fn send_notifications(&mut self, session: Session) {
        while let Some(using) = self.using.get_mut(&session) {
            if !using.may_notify() {
                break;
            }
            let Some(job) = using.unsent.pop_front() else {
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
            } else if let Err(error) = self.ask(session, Message::Notify { id, bytes })
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
        for (session, using) in &mut self.using {
            let unsent = using.unsent.extract_if(|job| job.is_abandoned());
            let mut given_up: Vec<Job> = unsent.collect();
            given_up.extend(using.shared.unanswered.take_abandoned());
            if !given_up.is_empty() {
                roomy.push(*session);
            }
            let given_up = given_up.into_iter();
            self.settled
                .extend(given_up.map(|job| (job, Err(abandoned()))));
        }
        for session in roomy {
            self.send_notifications(session);
        }
    }
}
