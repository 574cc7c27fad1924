//! Rails that are made: the first ones are proved by an answer, those that were lost are offered again over another rail, and
//! then proved like the first.

use std::sync::atomic::Ordering;
use std::time::Instant;

use kvcache_core::Result;

use super::appointment::Awaited;
use super::card::Cards;
use super::controls::{Control, Which};
use super::greeting::Offer;
use super::moving::not_fitting;
use super::rails::{PROOF, PROVING_MAX};
use super::state::{Line, State, number};
use super::tie::Condition;
use crate::backend::unix::Outcome;

impl State {
    /// Asks over a rail of ours, which is up when the answer has come.
    pub(super) fn prove(&mut self, line: Line, rail: usize) {
        let asked = self
            .wire(line, rail)
            .map(|wire| wire.tell(&Control::Ask { token: PROOF }));
        if let Some(Err(error)) = asked {
            self.fail_rail(line, rail, &error.to_string());
        }
        self.heat(line, rail);
        self.is_timed = true;
    }

    /// Something has come by a rail: it works.
    pub(super) fn proved(&mut self, line: Line, rail: usize) {
        let Some(tie) = self.tie(line) else { return };
        if !matches!(tie.rails[rail].condition, Condition::Unproved(_)) {
            return;
        }
        tie.rails[rail].rise();
        if let Some(using) = self.using.get_mut(&line) {
            using.shared.rails[rail].rise();
            if let Some(call) = using.opening.take() {
                call.answer(Ok((Outcome::Done, None)));
            }
            self.ready.extend(using.waiting.drain(..));
        }
        self.say_on(line);
    }

    /// Offers the owner of memory a new end of a rail that was lost.
    pub(super) fn offer_again(&mut self, line: Line, rail: usize, now: Instant) {
        let Some(using) = self.using.get_mut(&line) else {
            return;
        };
        let one = &mut using.tie.rails[rail];
        let card = &self.cards.cards[one.card];
        if !card.told.is_up.load(Ordering::Relaxed) {
            return one.rest(now);
        }
        let (wire, offer) = match card.wire(number(line, one.card)) {
            Ok(made) => made,
            Err(error) => {
                using.shared.rails[rail].lose(&error.to_string());
                return one.rest(now);
            }
        };
        one.made += 1;
        one.wire = Some(wire);
        one.condition = Condition::Offered(Box::new(offer), now + PROVING_MAX);
        let which = using.tie.which(rail);
        match using.tie.tell(&Control::Offer { which, offer }) {
            Ok(over) => self.heat(line, over),
            Err(error) => self.fail(line, &error.to_string()),
        }
    }

    /// A user of our memory wants a rail again.
    pub(super) fn take_up(&mut self, line: Line, which: Which, offer: &Offer) -> Result<()> {
        let Some(tie) = self.tie(line) else {
            return Ok(());
        };
        let (at, one) = tie.meant(which)?;
        if which.made <= one.made {
            return Ok(());
        }
        if one.is_up() || one.is_ending() {
            return Err(not_fitting("a rail is offered again that was not ended"));
        }
        one.made = which.made;
        one.condition = Condition::Down(None);
        let (card, unused) = (one.card, one.wire.take());
        // The user's end of it is gone, so nobody waits for this.
        self.bury(unused.into_iter().collect(), |_, _| ());
        let (wire, mut own) = self.cards.cards[card].wire(number(line, card))?;
        let (peer, now) = (*offer, Instant::now());
        let run = self.exports.incarnation();
        if let Some(ticket) = self
            .cards
            .appoint(card, &mut own, (run, line.0, at, which.made))?
        {
            let Some(tie) = self.tie(line) else {
                return Ok(());
            };
            let one = &mut tie.rails[at];
            one.wire = Some(wire);
            one.condition = Condition::Unproved(now + 2 * PROVING_MAX);
            one.awaited = Some(Box::new(Awaited { ticket, own, peer }));
            let over = tie.tell(&Control::Taken { which, offer: own })?;
            self.heat(line, over);
            self.is_timed = true;
            return Ok(());
        }
        let until = now + PROVING_MAX;
        let connect = move |cards: &Cards| cards.connect(card, wire, (&own, &peer), until);
        self.aside(connect, move |state, connected| {
            let Some(tie) = state.tie(line) else { return };
            let one = &mut tie.rails[at];
            match connected {
                Ok(wire) if one.made == which.made && one.wire.is_none() => {
                    one.wire = Some(wire);
                    one.condition = Condition::Unproved(Instant::now() + 2 * PROVING_MAX);
                    match tie.tell(&Control::Taken { which, offer: own }) {
                        Ok(over) => state.heat(line, over),
                        Err(error) => return state.fail(line, &error.to_string()),
                    }
                    state.heat(line, at);
                    state.is_timed = true;
                }
                // The user has given it up meanwhile.
                Ok(wire) => state.bury(vec![wire], |_, _| ()),
                // The user tries again by itself.
                Err(error) => tracing::warn!(%error, "a rail is not taken up again"),
            }
        });
        Ok(())
    }

    /// The owner has taken up a rail again.
    pub(super) fn taken_up(&mut self, line: Line, which: Which, offer: &Offer) -> Result<()> {
        let Some(using) = self.using.get_mut(&line) else {
            return Ok(());
        };
        let (rail, one) = using.tie.meant(which)?;
        if one.made != which.made {
            return Ok(());
        }
        let (Condition::Offered(own, _), Some(wire)) = (&one.condition, one.wire.take()) else {
            return Ok(());
        };
        let (own, peer, card) = (**own, *offer, one.card);
        let until = Instant::now() + PROVING_MAX;
        one.condition = Condition::Unproved(until + PROVING_MAX);
        let connect = move |cards: &Cards| cards.connect(card, wire, (&own, &peer), until);
        self.aside(connect, move |state, connected| {
            let Some(tie) = state.tie(line) else { return };
            let one = &mut tie.rails[rail];
            if one.made != which.made || !matches!(one.condition, Condition::Unproved(_)) {
                return;
            }
            match connected {
                Ok(wire) => {
                    one.wire = Some(wire);
                    one.condition = Condition::Unproved(Instant::now() + PROVING_MAX);
                    state.prove(line, rail);
                }
                Err(error) => state.fail_rail(line, rail, &error.to_string()),
            }
        });
        Ok(())
    }
}
