//! What rdma_cm tells: who wants a rail connected, and which connections have ended.

use kvcache_core::{Error, ErrorKind, Result};

use super::appointment::{Awaited, Reception, Ticket};
use super::card::Cards;
use super::state::{Line, State};
use super::tie::{Condition, Rail};
use super::wire::Wire;
use crate::sys::verbs::cm::{Event, Happened, Id};

/// Events that are looked at before others get their turn.
const EVENTS_MAX: usize = 64;

impl State {
    /// Something has happened to connections, or to who takes requests in.
    pub(super) fn connections(&mut self) {
        let cards = self.cards.clone();
        let Some(reception) = &cards.reception else {
            return;
        };
        for _ in 0..EVENTS_MAX {
            let Some(mut event) = reception.events.next() else {
                return;
            };
            match (event.happened, event.request.take()) {
                (Happened::Requested, Some(id)) => self.requested(id, &event.private),
                (Happened::Failed, _) => self.disconnected(&event),
                _ => {}
            }
        }
    }

    /// A connection has ended, or a device goes.
    fn disconnected(&mut self, event: &Event) {
        let error = event.error();
        if let Some(at) = Reception::desk(event.number) {
            let desk = self.cards.cards.get(at).and_then(|card| card.desk());
            if let Some(desk) = desk.filter(|_| event.is_removal()) {
                tracing::warn!(%error, at = %desk.address, "nobody is connected here any more");
                desk.close();
            }
            return;
        }
        let is_it = |rail: &Rail| {
            let wire = rail.wire.as_ref();
            wire.is_some_and(|wire| wire.connection() == Some(event.number))
        };
        for (line, rail) in self.rails_of(is_it) {
            let using = self.using.get(&line);
            if using.is_some_and(|using| using.ending.is_some()) {
                continue;
            }
            // What came before may not be looked at yet.
            self.heat(line, rail);
            self.poll();
            self.fail_rail(line, rail, &error.to_string());
        }
    }

    /// Somebody wants a rail connected.
    fn requested(&mut self, id: Id, private: &[u8]) {
        let (line, rail, wire, awaited) = match self.expected(private) {
            Ok(expected) => expected,
            Err(error) => {
                tracing::warn!(%error, "a request by rdma_cm is refused");
                if let Err(error) = id.refuse(&error.to_string()) {
                    tracing::debug!(%error, "verbs");
                }
                return;
            }
        };
        let Awaited { ticket, own, peer } = awaited;
        let Some(card) = self.tie(line).map(|tie| tie.rails[rail].card) else {
            return;
        };
        let accept = move |cards: &Cards| cards.accept(card, wire, id, (&own, &peer));
        self.aside(accept, move |state, accepted| {
            state.accepted(line, rail, ticket.made, accepted);
        });
    }

    /// The rail that a ticket is for, which it is taken for; once only.
    fn expected(&mut self, private: &[u8]) -> Result<(Line, usize, Wire, Awaited)> {
        let ticket = Ticket::decode(private)?;
        let own = self.exports.incarnation();
        if ticket.run != own {
            let text = format!("the ticket is of run {:?}, this is {own:?}", ticket.run);
            return Err(Error::new(ErrorKind::PeerLost, text));
        }
        let nobody = || Error::new(ErrorKind::Denied, "nobody is expected by this ticket");
        let (line, at) = (Line(ticket.line), usize::from(ticket.rail));
        let user = self.users.get_mut(&line).ok_or_else(nobody)?;
        let rail = user.tie.rails.get_mut(at).ok_or_else(nobody)?;
        let is_awaited = matches!(rail.condition, Condition::Unproved(_));
        let is_known = |awaited: &mut Box<Awaited>| is_awaited && awaited.ticket == ticket;
        let awaited = rail.awaited.take_if(is_known).ok_or_else(nobody)?;
        let wire = rail.wire.take().ok_or_else(nobody)?;
        Ok((line, at, wire, *awaited))
    }

    /// A request was accepted, or could not be: then the peer was told, and this end is given up in time.
    fn accepted(&mut self, line: Line, rail: usize, made: u32, accepted: Result<Wire>) {
        let wire = match accepted {
            Ok(wire) => wire,
            Err(error) => return tracing::warn!(%error, "a rail is not connected"),
        };
        let one = self.tie(line).and_then(|tie| tie.rails.get_mut(rail));
        let one = one.filter(|one| {
            let is_awaited = matches!(one.condition, Condition::Unproved(_));
            is_awaited && one.made == made && one.wire.is_none()
        });
        match one {
            Some(one) => {
                one.wire = Some(wire);
                self.heat(line, rail);
                self.is_timed = true;
            }
            // It has been given up meanwhile.
            None => self.bury(vec![wire], |_, _| ()),
        }
    }
}
