//! RDMA by libibverbs: reliable queue pairs, over InfiniBand or RoCE, one for each rail between two agents.
//!
//! Agents meet by TCP, where they tell each other their queue pairs, and then talk over those: which region may be used,
//! notifications. Bytes are read and written by the device, with no word of the peer's. The TCP connection stays: by it a
//! side learns at once that the other is gone, and that the other's queue pairs are, so that nothing can land any more. A
//! deregistered region is taken from the device, which then refuses it to everyone. Queue pairs are connected by what was told
//! of them, or by rdma_cm, if both sides are told to: then the kernel finds the way.

mod active;
mod appointment;
mod aside;
mod asking;
mod burying;
mod card;
mod channel;
mod choose;
mod connecting;
mod controls;
mod driver;
mod ending;
mod fair;
mod greeting;
mod guests;
mod lending;
mod moving;
mod near;
mod options;
mod ports;
mod rails;
mod requests;
mod returning;
mod speech;
mod state;
mod sums;
mod tie;
mod using;
mod wire;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::direct::HOST_AND_DEVICES;
use super::unix::Call;
use super::{Channel, Fabric, Kinds};
use crate::agent::{Exports, PeerCard};
use crate::region::RegionCore;
use crate::stats::PortStats;

use aside::Meeting;
use card::Cards;
use channel::VerbsChannel;
use driver::Driver;
use greeting::{Question, Taken};
pub use options::{VerbsConnect, VerbsOptions};
pub use ports::{RdmaPort, rdma_cm, rdma_ports};
use state::{Met, Offered, State};
use wire::Wire;

const NAME: &str = "verbs";

struct VerbsFabric {
    driver: Arc<Driver>,
    exports: Arc<Exports>,
    /// Where peers ask for connections.
    addresses: Vec<SocketAddr>,
}

/// Opens RDMA ports for an agent.
pub(crate) fn fabric(exports: &Arc<Exports>, options: &VerbsOptions) -> Result<Arc<dyn Fabric>> {
    let cards = Cards::open(options)?;
    let (mut listeners, mut addresses) = (Vec::new(), Vec::new());
    for wanted in cards.listen()? {
        let listener = TcpListener::bind(wanted)
            .map_err(|e| Error::io(format!("listen for verbs on tcp {wanted}"), e))?;
        let failed = |e| Error::io("listen for verbs", e);
        listener.set_nonblocking(true).map_err(failed)?;
        let mut address = listener.local_addr().map_err(failed)?;
        if address.ip().is_unspecified() {
            let Some(ip) = cards.ip() else {
                let text = "peers can't be told an unspecified address";
                return Err(Error::new(ErrorKind::Invalid, text).at("verbs listen"));
            };
            address.set_ip(ip);
        }
        listeners.push(listener);
        addresses.push(address);
    }
    Ok(Arc::new(VerbsFabric {
        driver: Driver::start(cards, exports.clone(), listeners)?,
        exports: exports.clone(),
        addresses,
    }))
}

/// Connects to the first of a peer's addresses that can be reached.
fn reach(addresses: &[u8], until: Instant) -> Result<TcpStream> {
    let text = String::from_utf8_lossy(addresses);
    let wrong = || {
        Error::invalid(
            "verbs addresses",
            &text,
            "IP:PORT, with commas between them",
        )
    };
    let addresses: Vec<SocketAddr> = text
        .split(',')
        .map(|one| one.parse().map_err(|_| wrong()))
        .collect::<Result<_>>()?;
    let mut last = wrong();
    for (at, address) in addresses.iter().enumerate() {
        // Each has its share of what time is left.
        let left = until.saturating_duration_since(Instant::now());
        let share = left / (addresses.len() - at) as u32;
        match TcpStream::connect_timeout(address, share.max(Duration::from_millis(1))) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Error::io(format!("connect to {address} for verbs"), error),
        }
    }
    Err(last)
}

/// Asks a peer for a connection; its answer.
fn ask(stream: &mut TcpStream, question: &Question, until: Instant) -> Result<Taken> {
    let failed = |e| Error::io("ask for a connection over verbs", e);
    stream.write_all(&question.encode()).map_err(failed)?;
    let mut read = Vec::new();
    loop {
        if let Some(body) = greeting::whole(&read)? {
            return greeting::decode_answer(body);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Error::new(ErrorKind::Timeout, "the peer does not answer"));
        }
        stream.set_read_timeout(Some(left)).map_err(failed)?;
        let mut bytes = [0; greeting::BYTES_MAX + 2];
        // Nothing follows an answer before it was taken up.
        match stream.read(&mut bytes) {
            Ok(0) => {
                let text = "the peer closed the connection instead of answering";
                return Err(Error::new(ErrorKind::PeerLost, text));
            }
            Ok(count) => read.extend_from_slice(&bytes[..count]),
            Err(error) if is_time_over(&error) => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

fn is_time_over(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}

impl VerbsFabric {
    /// Connects the rails that the peer has taken of those that it was offered.
    fn meet(&self, offered: Offered, taken: &Taken, until: Instant) -> Result<Vec<Met>> {
        let cards = self.driver.cards();
        let (mut meetings, mut peers) = (Vec::new(), Vec::new());
        for (position, (card, wire, own)) in offered.into_iter().enumerate() {
            let peer = taken.iter().find(|(at, _)| usize::from(*at) == position);
            let Some(&(_, peer)) = peer else { continue };
            peers.push(peer);
            meetings.push(Meeting {
                card,
                wire,
                own,
                peer,
            });
        }
        if meetings.len() != taken.len() {
            let text = "the peer took rails that were not offered";
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let met = aside::meet(cards, meetings, until).into_iter().zip(peers);
        let met = met.map(|((card, wire), peer)| {
            let reached = wire.as_ref().ok().and_then(Wire::reached);
            let told = cards.tell(card, &peer, reached);
            Met { card, told, wire }
        });
        Ok(met.collect())
    }
}

impl Fabric for VerbsFabric {
    fn name(&self) -> &'static str {
        NAME
    }

    fn address(&self) -> Option<Vec<u8>> {
        let addresses: Vec<String> = self.addresses.iter().map(ToString::to_string).collect();
        Some(addresses.join(",").into_bytes())
    }

    fn ports(&self) -> Vec<PortStats> {
        let cards = self.driver.cards().cards.iter();
        cards.map(|card| card.told.stats()).collect()
    }

    fn kinds(&self) -> Kinds {
        Kinds {
            local: HOST_AND_DEVICES,
            remote: HOST_AND_DEVICES,
        }
    }

    fn connect(&self, peer: &PeerCard, timeout: Duration) -> Result<Arc<dyn Channel>> {
        let until = Instant::now() + timeout;
        let Some(address) = peer.address(NAME) else {
            let text = "the peer does not offer verbs";
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let mut stream = reach(address, until)?;
        let (line, offered) = self.driver.with(State::offer)?;
        let question = Question {
            name: self.exports.name().to_string(),
            wanted: peer.incarnation,
            connect: self.driver.cards().options.connect,
            offers: offered.iter().map(|(_, _, offer)| *offer).collect(),
        };
        let taken = ask(&mut stream, &question, until)?;
        lending::tune(&stream)?;
        // What is left over is for the first answers: a rail that leads nowhere must not use up the time of the others.
        let left = until.saturating_duration_since(Instant::now());
        let met = self.meet(offered, &taken, until - left / 4)?;
        let opening = Arc::<Call>::default();
        let patience = until.saturating_duration_since(Instant::now());
        let shared = self
            .driver
            .with(|state| state.connect(line, met, stream, (&opening, patience)))?;
        // A channel that is dropped ends its path.
        let channel = VerbsChannel::new(&self.driver, line, shared, timeout);
        opening
            .wait(until)
            .map_err(|error| channel.unproved(error))?;
        Ok(Arc::new(channel))
    }

    fn withdraw(&self, region: &Arc<RegionCore>) {
        self.driver.with(|state| state.withdraw(region));
    }

    fn close(&self) {
        self.driver.close();
    }
}

impl Drop for VerbsFabric {
    fn drop(&mut self) {
        self.driver.close();
    }
}
