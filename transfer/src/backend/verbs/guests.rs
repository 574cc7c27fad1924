//! Peers that want to use memory of ours: what is made for them, and how their rails are connected.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::appointment::{Awaited, Ticket};
use super::aside::{self, Meeting};
use super::card::Cards;
use super::greeting::{Question, Taken};
use super::lending::USERS_MAX;
use super::state::{Line, State, number};
use super::tie::{Rail, Tie};

/// How long a peer that was let in may take to say the first word by a rail.
const PROVING_MAX: Duration = Duration::from_secs(10);

/// Somebody who is let in as soon as its rails are connected.
pub(super) struct Guest {
    name: String,
    meetings: Vec<Meeting>,
    taken: Taken,
    /// By rdma_cm, one for each.
    tickets: Vec<Ticket>,
}

impl State {
    /// Makes rails for somebody, if it may come in.
    pub(super) fn let_in(&mut self, line: Line, question: Question) -> Result<Guest> {
        if self.is_closed || self.users.len() >= USERS_MAX {
            let text = format!("{USERS_MAX} peers are connected, or the agent is closed");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        self.check(&question.name, question.wanted)?;
        let way = self.cards.options.connect;
        if question.connect != way {
            let (way, other) = (way.name(), question.connect.name());
            let text = format!("this side connects queue pairs by {way}, the other one by {other}");
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let run = self.exports.incarnation();
        let (mut meetings, mut taken) = (Vec::new(), Taken::new());
        let mut tickets = Vec::new();
        for (position, at) in self.cards.pair(&question.offers) {
            let (wire, mut own) = self.cards.cards[at].wire(number(line, at))?;
            let peer = question.offers[position];
            let rail = (run, line.0, meetings.len(), 0);
            tickets.extend(self.cards.appoint(at, &mut own, rail)?);
            meetings.push(Meeting {
                card: at,
                wire,
                own,
                peer,
            });
            taken.push((position as u8, own));
        }
        if meetings.is_empty() {
            let text = "one side has InfiniBand, the other one Ethernet";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        Ok(Guest {
            name: question.name,
            meetings,
            taken,
            tickets,
        })
    }

    /// Answers a guest when its rails are connected, or has it connect them.
    pub(super) fn receive_guest(&mut self, line: Line, stream: TcpStream, guest: Guest) {
        match self.cards.reception.is_some() {
            true => self.expect(line, stream, guest),
            false => self.meet(line, stream, guest),
        }
    }

    /// Answers a guest, who connects its rails then.
    fn expect(&mut self, line: Line, stream: TcpStream, guest: Guest) {
        let until = Instant::now() + PROVING_MAX;
        let meetings = guest.meetings.into_iter().zip(guest.tickets);
        let rails = meetings.map(|(meeting, ticket)| {
            let (own, peer) = (meeting.own, meeting.peer);
            let mut rail = Rail::new(meeting.card, Some(meeting.wire), until);
            rail.awaited = Some(Box::new(Awaited { ticket, own, peer }));
            rail
        });
        let tie = Tie::new(rails.collect());
        self.answer(line, stream, Ok((guest.name, (tie, guest.taken))));
    }

    /// Connects a guest's rails, and answers.
    fn meet(&self, line: Line, stream: TcpStream, guest: Guest) {
        let Guest {
            name,
            meetings,
            taken,
            tickets: _,
        } = guest;
        let until = Instant::now() + PROVING_MAX;
        let met = move |cards: &Cards| aside::meet(cards, meetings, until);
        self.aside(met, move |state, met| {
            let until = Instant::now() + PROVING_MAX;
            let rails = met.into_iter().map(|(card, wire)| {
                if let Err(error) = &wire {
                    tracing::warn!(%error, peer = name, "a rail is not connected yet");
                }
                Rail::new(card, wire.ok(), until)
            });
            let tie = Tie::new(rails.collect());
            state.answer(line, stream, Ok((name, (tie, taken))));
        });
    }
}
