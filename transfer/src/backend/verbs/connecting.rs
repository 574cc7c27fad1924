//! How wires are connected: by what was told of them, or by rdma_cm.

use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};

use super::appointment::{self, Ticket};
use super::card::{Card, Cards};
use super::greeting::Offer;
use super::wire::{Ours, Wire};
use crate::metadata::Incarnation;
use crate::sys::verbs::PairSettings;
use crate::sys::verbs::cm::{Id, Param};

/// What rdma_cm is told of a queue pair.
fn param<'a>(wire: &Wire, settings: &PairSettings, private: &'a [u8]) -> Param<'a> {
    Param {
        pair: wire.pair(),
        reads: settings.reads,
        reads_served: settings.reads_served,
        retries: settings.retries,
        private,
    }
}

impl Cards {
    /// By rdma_cm: has a peer come to this port of ours to connect a rail (run, line, position and how often it was made before).
    /// What it is told is entered; the ticket that it will show.
    pub(super) fn appoint(
        &self,
        card: usize,
        own: &mut Offer,
        (run, line, rail, made): (Incarnation, u64, usize, u32),
    ) -> Result<Option<Ticket>> {
        let Some(desk) = self.cards[card].desk() else {
            return Ok(None);
        };
        let ticket = appointment::ticket(run, line, rail, made)?;
        own.appointment = Some(desk.appoint(&ticket));
        Ok(Some(ticket))
    }

    /// Connects a wire of this port that was offered so to the one that the peer has offered, until then.
    ///
    /// # Errors
    /// By the exchange what the device says; by rdma_cm what [`Id::connect`] does. The wire is gone then.
    pub(super) fn connect(
        &self,
        card: usize,
        mut wire: Wire,
        (own, peer): (&Offer, &Offer),
        until: Instant,
    ) -> Result<Wire> {
        let card = &self.cards[card];
        let settings = card.settings(own, peer, &self.options);
        match (&self.reception, card.desk(), &peer.appointment) {
            (None, ..) => wire.connect(&peer.end, own.end.first, &settings)?,
            (Some(reception), Some(desk), Some(appointment)) => {
                let ends = (desk.address.ip(), appointment.at);
                let number = reception.number();
                let param = param(&wire, &settings, &appointment.ticket);
                let id = Id::connect(number, ends, settings.traffic_class, &param, until)?;
                self.check_port(card, &id)?;
                let ours = Ours::new(number, &desk.goodbyes);
                wire.establish(id, &settings, ours, &reception.events)?;
            }
            _ => {
                let text = "the peer does not say where it takes requests by rdma_cm";
                return Err(Error::new(ErrorKind::Corrupt, text));
            }
        }
        Ok(wire)
    }

    /// Connects a wire for somebody who asks for that by rdma_cm, and has shown the ticket.
    ///
    /// # Errors
    /// What the system says; the wire and the request are gone then, and the peer knows.
    pub(super) fn accept(
        &self,
        card: usize,
        mut wire: Wire,
        id: Id,
        (own, peer): (&Offer, &Offer),
    ) -> Result<Wire> {
        let card = &self.cards[card];
        let settings = card.settings(own, peer, &self.options);
        self.check_port(card, &id)?;
        let (Some(reception), Some(desk)) = (&self.reception, card.desk()) else {
            let text = "nobody takes requests in by rdma_cm";
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let ours = Ours::new(reception.number(), &desk.goodbyes);
        let param = param(&wire, &settings, &[]);
        wire.accept(id, &settings, ours, &param)?;
        Ok(wire)
    }

    /// A connection must be of the port whose queue pair it is for.
    fn check_port(&self, card: &Card, id: &Id) -> Result<()> {
        let wanted = (self.devices[card.device].context.name(), card.port());
        let known = id.port();
        match &known {
            Some((device, port)) if (device.as_str(), *port) == wanted => Ok(()),
            _ => {
                let text = format!("rdma_cm: the way goes by {known:?}, not by {wanted:?}");
                Err(Error::new(ErrorKind::Io, text))
            }
        }
    }
}
