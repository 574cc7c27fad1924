//! What two agents are connected by: one queue pair for each rail, and what is said over them.

use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::appointment::Awaited;
use super::controls::{Control, Which};
use super::greeting::Offer;
use super::speech::Speech;
use super::wire::{Piece, Wire};

/// How long a rail that was lost is left alone, at first and at most: twice as long each time.
pub(super) const AGAIN_MIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(60);

/// How a rail is.
pub(super) enum Condition {
    /// Its end was offered to the owner, who has so long to answer.
    Offered(Box<Offer>, Instant),
    /// It is connected, and nothing has come by it yet; so long is waited for that.
    Unproved(Instant),
    Up,
    /// It has failed. What is under way on it ends, then the other side takes its end away.
    Ending {
        until: Instant,
        /// The other side was told.
        is_told: bool,
        /// The other side's end is gone, or has stopped if the other side is the one that uses memory.
        is_gone: bool,
    },
    /// It is tried again then; the owner of memory waits for the other side to do that.
    Down(Option<Instant>),
}

pub(super) struct Rail {
    /// The port of ours, by position.
    pub(super) card: usize,
    pub(super) wire: Option<Wire>,
    pub(super) condition: Condition,
    /// The peer is to connect it by rdma_cm, with this ticket.
    pub(super) awaited: Option<Box<Awaited>>,
    /// How often it was made before.
    pub(super) made: u32,
    /// Pieces that it has not finished, and may still have an effect of.
    pub(super) unfinished: Vec<Piece>,
    /// Its end of ours is being taken away.
    pub(super) is_going: bool,
    /// The other side is told when it is gone.
    pub(super) owes: bool,
    /// It is up, its port is down, and it is given up then.
    pub(super) dark_until: Option<Instant>,
    /// How long it is left alone when it is lost next.
    pause: Duration,
    up_at: Option<Instant>,
}

impl Rail {
    pub(super) fn new(card: usize, wire: Option<Wire>, until: Instant) -> Self {
        Self {
            card,
            wire,
            condition: Condition::Unproved(until),
            awaited: None,
            made: 0,
            unfinished: Vec::new(),
            is_going: false,
            owes: false,
            dark_until: None,
            pause: AGAIN_MIN,
            up_at: None,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self.condition, Condition::Up)
    }

    pub(super) fn is_ending(&self) -> bool {
        matches!(self.condition, Condition::Ending { .. })
    }

    /// Whether it may still be used, now or soon.
    pub(super) fn is_hopeful(&self) -> bool {
        use Condition::{Offered, Unproved, Up};
        matches!(self.condition, Offered(..) | Unproved(_) | Up)
    }

    pub(super) fn rise(&mut self) {
        self.condition = Condition::Up;
        self.dark_until = None;
        self.up_at = Some(Instant::now());
    }

    /// It is left alone for a while: longer each time, unless it was of use for long.
    pub(super) fn rest(&mut self, now: Instant) {
        self.wire = None;
        if self.up_at.take().is_some_and(|at| now > at + AGAIN_MAX) {
            self.pause = AGAIN_MIN;
        }
        self.condition = Condition::Down(Some(now + self.pause));
        self.pause = (self.pause * 2).min(AGAIN_MAX);
    }

    /// When something is to be done about it.
    pub(super) fn due(&self, now: Instant) -> Option<Instant> {
        match self.condition {
            Condition::Up => {
                let stuck_at = self.wire.as_ref().and_then(Wire::due);
                self.dark_until.into_iter().chain(stuck_at).min()
            }
            Condition::Down(at) => at,
            _ => Some(now),
        }
    }
}

#[derive(Default)]
pub(super) struct Tie {
    /// The nearest first, in the eyes of the user of memory.
    pub(super) rails: Vec<Rail>,
    pub(super) speech: Speech,
}

impl Tie {
    pub(super) fn new(rails: Vec<Rail>) -> Self {
        let speech = Speech::default();
        Self { rails, speech }
    }

    pub(super) fn which(&self, rail: usize) -> Which {
        Which {
            rail: rail as u8,
            made: self.rails[rail].made,
        }
    }

    /// The rail that somebody means.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when there never was such a rail.
    pub(super) fn meant(&mut self, which: Which) -> Result<(usize, &mut Rail)> {
        let (at, count) = (usize::from(which.rail), self.rails.len());
        let rail = self.rails.get_mut(at).ok_or_else(|| {
            let text = format!("rail {at} of {count}");
            Error::new(ErrorKind::Corrupt, text)
        })?;
        Ok((at, rail))
    }

    pub(super) fn up(&self) -> impl Iterator<Item = usize> {
        let rails = self.rails.iter().enumerate();
        rails.filter_map(|(at, rail)| rail.is_up().then_some(at))
    }

    /// Whether another rail than this one is up.
    pub(super) fn has_another(&self, rail: usize) -> bool {
        self.up().any(|at| at != rail)
    }

    /// Those of the wanted rails, as bits, that are up; all that are up if none of them is.
    pub(super) fn usable(&self, wanted: u32) -> u32 {
        let up = self.up().fold(0_u32, |up, at| up | 1 << at);
        match up & wanted {
            0 => up,
            both => both,
        }
    }

    /// The rail for the next piece, of these: the first that has room, or of all that have the one with the least under way.
    pub(super) fn choose(&self, is_striped: bool, usable: u32) -> Option<usize> {
        let is_usable = |at: &usize| usable & (1 << at) != 0;
        let roomy = self.up().filter(is_usable).filter_map(|at| {
            let wire = self.rails[at].wire.as_ref()?;
            (wire.room() > 0).then_some((at, wire.load()))
        });
        let best = if is_striped {
            roomy.min_by_key(|(_, load)| *load)
        } else {
            let mut roomy = roomy;
            roomy.next()
        };
        best.map(|(at, _)| at)
    }

    /// Goes on with what is to be said; over which rail.
    pub(super) fn speak(&mut self) -> Result<Option<usize>> {
        if !self.speech.wants_to_go_on() {
            return Ok(None);
        }
        let Some(over) = self.speech.over.or_else(|| self.up().next()) else {
            return Ok(None);
        };
        self.speech.over = Some(over);
        if let Some(wire) = &mut self.rails[over].wire {
            self.speech.go_on(wire)?;
        }
        Ok(Some(over))
    }

    /// Says something about rails, over the first that is up; which one that is.
    pub(super) fn tell(&mut self, control: &Control) -> Result<usize> {
        let over = self.up().next();
        if let Some(over) = over
            && let Some(wire) = &mut self.rails[over].wire
        {
            wire.tell(control)?;
            return Ok(over);
        }
        Err(Error::new(ErrorKind::PeerLost, "no rail is up"))
    }

    /// Whether something is under way, and some of that has ended since.
    pub(super) fn has_moved_since(&self, then: Instant) -> bool {
        let mut wires = self.rails.iter().filter_map(|rail| rail.wire.as_ref());
        wires.any(|wire| wire.has_moved_since(then))
    }

    /// Ends all work on all rails.
    pub(super) fn stop(&mut self) {
        let wires = self.rails.iter_mut().filter_map(|rail| rail.wire.as_mut());
        wires.for_each(Wire::stop);
    }

    /// Whether there are queue pairs that nobody takes away yet.
    pub(super) fn has_wires(&self) -> bool {
        self.rails.iter().any(|rail| rail.wire.is_some())
    }

    /// How many rails are just being taken away.
    pub(super) fn going(&self) -> usize {
        self.rails.iter().filter(|rail| rail.is_going).count()
    }

    /// Whether no work is under way.
    pub(super) fn is_drained(&self) -> bool {
        let mut wires = self.rails.iter().filter_map(|rail| rail.wire.as_ref());
        wires.all(Wire::is_drained)
    }

    /// No rail is used any more: their wires.
    pub(super) fn end(&mut self) -> Vec<Wire> {
        for rail in &mut self.rails {
            rail.condition = Condition::Down(None);
        }
        let wires = self.rails.iter_mut().filter_map(|rail| rail.wire.take());
        wires.collect()
    }
}
