//! RDMA by libibverbs: reliable queue pairs, over InfiniBand or RoCE.
//!
//! Agents meet by TCP, where they tell each other their queue pairs, and then talk over those: which region may be used,
//! notifications. Bytes are read and written by the device, with no word of the peer's. The TCP connection stays: by it a
//! side learns at once that the other is gone, and that the other's queue pair is, so that nothing can land any more. A
//! deregistered region is taken from the device, which then refuses it to everyone.

mod active;
mod asking;
mod card;
mod channel;
mod choose;
mod driver;
mod ending;
mod greeting;
mod lending;
mod moving;
mod options;
mod ports;
mod state;
mod sums;
mod using;
mod wire;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};

use super::{Channel, Fabric};
use crate::agent::{Exports, PeerCard};
use crate::region::RegionCore;

use card::Card;
use channel::VerbsChannel;
use driver::Driver;
use greeting::{Offer, Question};
pub use options::VerbsOptions;
pub use ports::{RdmaPort, rdma_ports};

const NAME: &str = "verbs";

struct VerbsFabric {
    driver: Arc<Driver>,
    exports: Arc<Exports>,
    /// Where peers ask for connections.
    address: SocketAddr,
}

/// Opens an RDMA port for an agent.
pub(crate) fn fabric(exports: &Arc<Exports>, options: &VerbsOptions) -> Result<Arc<dyn Fabric>> {
    let card = Card::open(options)?;
    let (wanted, ip) = (card.listen()?, card.ip());
    let listener = TcpListener::bind(wanted)
        .map_err(|e| Error::io(format!("listen for verbs on tcp {wanted}"), e))?;
    let failed = |e| Error::io("listen for verbs", e);
    listener.set_nonblocking(true).map_err(failed)?;
    let mut address = listener.local_addr().map_err(failed)?;
    if address.ip().is_unspecified() {
        let Some(ip) = ip else {
            let text = "peers can't be told an unspecified address";
            return Err(Error::new(ErrorKind::Invalid, text).at("verbs listen"));
        };
        address.set_ip(ip);
    }
    Ok(Arc::new(VerbsFabric {
        driver: Driver::start(card, exports.clone(), listener)?,
        exports: exports.clone(),
        address,
    }))
}

/// Asks a peer for a connection; its answer.
fn ask(stream: &mut TcpStream, question: &Question, until: Instant) -> Result<Offer> {
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

impl Fabric for VerbsFabric {
    fn name(&self) -> &'static str {
        NAME
    }

    fn address(&self) -> Option<Vec<u8>> {
        Some(self.address.to_string().into_bytes())
    }

    fn connect(&self, peer: &PeerCard, timeout: Duration) -> Result<Arc<dyn Channel>> {
        let until = Instant::now() + timeout;
        let Some(address) = peer.address(NAME) else {
            let text = "the peer does not offer verbs";
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        let address = String::from_utf8_lossy(address);
        let address: SocketAddr = address
            .parse()
            .map_err(|_| Error::invalid("verbs address", &address, "IP:PORT"))?;
        let mut stream = TcpStream::connect_timeout(&address, timeout)
            .map_err(|e| Error::io(format!("connect to {address} for verbs"), e))?;
        let (line, wire, own) = self.driver.with(|state| state.offer())?;
        let question = Question {
            name: self.exports.name().to_string(),
            wanted: peer.incarnation,
            offer: own,
        };
        let offer = ask(&mut stream, &question, until)?;
        lending::tune(&stream)?;
        let (detail, shared) = self.driver.with(|state| -> Result<_> {
            let detail = state.card.describe(&offer);
            Ok((detail, state.connect(line, (wire, own), (stream, offer))?))
        })?;
        // A channel that is dropped ends its path.
        Ok(Arc::new(VerbsChannel::new(
            &self.driver,
            line,
            shared,
            detail,
            timeout,
        )))
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
