//! The side that owns memory: lets peers in, hands out regions, takes them back.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use kvcache_core::{Error, ErrorKind, Result};

use super::frame::{Frame, Origin, Session, To};
use super::state::{Side, State, USERS_MAX};
use super::user::{Proof, User};
use crate::backend::Operation;
use crate::backend::direct::{self, Landing};
use crate::backend::late::Notifier;
use crate::backend::unix::{Message, Outcome};
use crate::metadata::Incarnation;
use crate::region::{RegionId, RegionKey};

/// Regions that one peer may use.
const USED_MAX: usize = 65_536;

impl State {
    /// Someone wants to use our memory. Whoever is refused is told why, by an endpoint that is closed then; above
    /// [`USERS_MAX`] nothing is made for them, and they run into their own time limit.
    pub(super) fn greeted(&mut self, origin: Origin, from: Session, message: Message) {
        let Message::Hello { name, wanted } = message else {
            return tracing::warn!("a stranger's message over ucx was dropped");
        };
        if let Err(error) = self.let_in(&origin, from, &name, wanted) {
            tracing::warn!(%error, name, "a peer was not let in over ucx");
        }
    }

    fn let_in(
        &mut self,
        origin: &Origin,
        from: Session,
        name: &str,
        wanted: Incarnation,
    ) -> Result<()> {
        if self.is_closed || self.users.len() >= USERS_MAX {
            let text = format!("{USERS_MAX} peers are connected, or the agent is closed");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        let session = Session::random()?;
        let endpoint = self.worker.connect(&origin.address)?;
        let checked = self.check(name, wanted);
        let is_welcome = checked.is_ok();
        let answer = Frame {
            to: To::Known(from),
            from: session,
            message: Message::Done {
                id: 0,
                outcome: Outcome::of(checked),
            },
        };
        let said = self.worker.send(endpoint, answer.encode());
        if said.is_err() || !is_welcome {
            self.worker.close(endpoint, said.is_err());
            return said;
        }
        let user = User {
            endpoint,
            session: from,
            name: name.into(),
            door: self.exports.inbox().door(),
            used: HashMap::new(),
            landing: Landing::default(),
            proof: Proof::of(origin, self.origin.host, self.origin.namespace),
            is_cut_off: false,
        };
        self.users.insert(session, user);
        self.sides.insert(endpoint, Side::User(session));
        Ok(())
    }

    fn check(&self, name: &str, wanted: Incarnation) -> Result<()> {
        let own = self.exports.incarnation();
        if wanted != own {
            let text = format!("incarnation {wanted:?} is gone, this is {own:?}");
            return Err(Error::new(ErrorKind::PeerLost, text));
        }
        self.exports.check_allowed(name)
    }

    /// Says something to a peer that uses our memory.
    pub(super) fn tell(&mut self, session: Session, message: Message) {
        let Some(user) = self.users.get(&session) else {
            return;
        };
        let frame = Frame {
            to: To::Known(user.session),
            from: session,
            message,
        };
        if let Err(error) = self.worker.send(user.endpoint, frame.encode()) {
            tracing::debug!(%error, peer = %user.name, "answer over ucx");
        }
    }

    /// Sends the answers to notifications that the inbox has taken.
    pub(super) fn answer_late(&mut self) {
        for (session, answer) in self.late.take() {
            self.tell(session, answer);
        }
    }

    /// A peer that uses our memory says something.
    pub(super) fn lend(&mut self, session: Session, message: Message) {
        let answer = match message {
            Message::Map { id, region, key } => {
                let outcome = self.grant(session, region, &key);
                let outcome = outcome.unwrap_or_else(|error| Outcome::of(Err(error)));
                Message::Done { id, outcome }
            }
            Message::Notify { id, bytes } => {
                let Some(user) = self.users.get(&session) else {
                    return;
                };
                if let Err(error) = user.landing.land() {
                    let outcome = Outcome::of(Err(error));
                    return self.tell(session, Message::Done { id, outcome });
                }
                let (name, door) = (user.name.clone(), user.door);
                let sender = Notifier {
                    late: self.late.clone(),
                    peer: session,
                    id,
                };
                let delivered = self.exports.inbox().deliver(door, &name, bytes, sender);
                let Some((_, outcome)) = delivered else {
                    return;
                };
                let outcome = Outcome::of(outcome);
                Message::Done { id, outcome }
            }
            Message::Sums {
                id,
                region,
                key,
                ranges,
            } => {
                let outcome = self.sum(region, &key, &ranges);
                let outcome = outcome.unwrap_or_else(|error| Outcome::of(Err(error)));
                Message::Done { id, outcome }
            }
            Message::Unmapped { region } => {
                if let Some(user) = self.users.get_mut(&session) {
                    user.let_go(region);
                }
                return;
            }
            Message::Hello { .. }
            | Message::Done { .. }
            | Message::Revoke { .. }
            | Message::Piece { .. } => {
                return tracing::warn!("a message over ucx that only owners of memory send");
            }
        };
        self.tell(session, answer);
    }

    fn grant(&mut self, session: Session, id: RegionId, key: &RegionKey) -> Result<Outcome> {
        let admitted = self
            .exports
            .admit(id, key, Operation::Write)
            .or_else(|_| self.exports.admit(id, key, Operation::Read))?;
        let region = admitted.region();
        let address = direct::lend(region)?;
        self.worker.register(region)?;
        let granted = Outcome::Keyed {
            address,
            bytes: region.bytes(),
            writable: region.options().remote_write,
            key: self.worker.pack_key(id)?,
        };
        // Either this sees that the region or the agent was closed, or whoever closed it finds the entry: both look
        // under one lock.
        if self.is_closed || region.is_closed() {
            let text = format!("region {id} is deregistered");
            self.forget_closed(region);
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        let Some(user) = self.users.get_mut(&session) else {
            return Err(Error::new(ErrorKind::PeerLost, "the path is closed"));
        };
        if user.used.len() >= USED_MAX {
            let text = format!("{USED_MAX} regions are in use");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        user.used.insert(id, None);
        user.landing.lend(region);
        Ok(granted)
    }

    /// Nothing more comes from this peer. What it used it may use until that is disproved.
    pub(super) fn cut_off(&mut self, session: Session) {
        let Some(user) = self.users.get_mut(&session) else {
            return;
        };
        user.is_cut_off = true;
        let door = user.door;
        if matches!(user.proof, Proof::Endpoint) {
            user.bury();
        }
        if user.used.is_empty() {
            self.users.remove(&session);
        }
        self.exports.inbox().shut(door, "the path is closed");
    }

    /// The processes whose death is waited for.
    pub(super) fn deaths(&self) -> Vec<OwnedFd> {
        let watched = self.users.values().filter_map(User::death);
        // One that cannot be watched now is looked at with the next event.
        watched
            .filter_map(|process| process.try_clone_to_owned().ok())
            .collect()
    }

    /// Looks which of the peers that are waited for have died.
    pub(super) fn look_for_deaths(&mut self) {
        let mut dead = Vec::new();
        self.users.retain(|_, user| {
            if user.death().is_some_and(super::user::is_dead) {
                user.bury();
                dead.push(user.endpoint);
            }
            !(user.is_cut_off && user.used.is_empty())
        });
        for endpoint in dead {
            self.worker.close(endpoint, true);
        }
        if !self.leaving.is_empty() {
            self.let_leave();
        }
    }
}
