//! How queue pairs meet by rdma_cm: the owner of memory says where each of its ports takes requests in, and gives a ticket for
//! each rail, which the other side shows there.

use std::collections::VecDeque;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};

use super::greeting::Offer;
use super::options::RAILS_MAX;
use crate::metadata::Incarnation;
use crate::sys::verbs::cm::{Events, Id, local_addresses};
use crate::sys::verbs::{Context, Gid};
use crate::wire::Reader;

const MAGIC: [u8; 4] = *b"KVFC";

/// The version of tickets that this build gives, and the only one that it takes.
const VERSION: u16 = 1;

/// Bytes of a ticket: fewer than the 56 that come with a request.
pub(super) const TICKET_BYTES: usize = 44;

/// Connections are numbered from here on; before are the ports that take requests in.
const CONNECTIONS_FIRST: u64 = RAILS_MAX as u64;

/// Lets somebody connect one rail, once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Ticket {
    /// The run of the agent that gave it.
    pub(super) run: Incarnation,
    pub(super) line: u64,
    pub(super) rail: u8,
    /// How often the rail was made before.
    pub(super) made: u32,
    secret: [u8; 16],
}

impl fmt::Debug for Ticket {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (line, rail, made) = (self.line, self.rail, self.made);
        write!(f, "ticket for rail {rail}.{made} of {line}")
    }
}

impl Ticket {
    fn encode(&self) -> [u8; TICKET_BYTES] {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[self.rail, 0]);
        out.extend_from_slice(&self.made.to_le_bytes());
        out.extend_from_slice(&self.line.to_le_bytes());
        out.extend_from_slice(&self.run.0.to_le_bytes());
        out.extend_from_slice(&self.secret);
        let mut all = [0; TICKET_BYTES];
        all.copy_from_slice(&out);
        all
    }

    /// Reads what came with a request, which may have more bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] or [`ErrorKind::Version`] for what no agent sends.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let magic: [u8; 4] = reader.array("magic")?;
        if magic != MAGIC {
            let text = format!("the ticket's magic is {magic:02x?}, not {MAGIC:02x?}");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let version = reader.u16("version")?;
        if version != VERSION {
            let text = format!("the ticket has version {version}, not {VERSION}");
            return Err(Error::new(ErrorKind::Version, text));
        }
        let rail = reader.u8("rail")?;
        reader.u8("nothing")?;
        Ok(Self {
            rail,
            made: reader.u32("rail's number")?,
            line: reader.u64("line")?,
            run: Incarnation(reader.u64("run")?),
            secret: reader.array("secret")?,
        })
    }
}

/// Where, and with what, a rail is to be connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Appointment {
    pub(super) at: SocketAddr,
    /// To be shown as it is.
    pub(super) ticket: [u8; TICKET_BYTES],
}

impl Appointment {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let ip = match self.at.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        out.extend_from_slice(&ip.octets());
        out.extend_from_slice(&self.at.port().to_le_bytes());
        out.extend_from_slice(&self.ticket);
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self> {
        let ip: [u8; 16] = reader.array("address of rdma_cm")?;
        let at = SocketAddr::new(IpAddr::from(ip).to_canonical(), reader.u16("port")?);
        if at.ip().is_unspecified() || at.port() == 0 {
            let text = "an address and a port";
            return Err(Error::invalid("address of rdma_cm", at, text));
        }
        let ticket = reader.array("ticket")?;
        Ok(Self { at, ticket })
    }
}

/// A ticket that was given, and what is known of both ends.
pub(super) struct Awaited {
    pub(super) ticket: Ticket,
    pub(super) own: Offer,
    pub(super) peer: Offer,
}

/// Goodbyes that a port keeps at most; the oldest is said then, although nobody hears it.
const GOODBYES_MAX: usize = 1024;

/// Connections that have ended while their port was down: the other side is told when it is up again, and not before. Soft-RoCE
/// takes and sends no requests any more once it could not send a goodbye; and the peer would never hear it.
pub(super) struct Goodbyes {
    context: Arc<Context>,
    port: u8,
    kept: Mutex<VecDeque<Id>>,
}

impl Goodbyes {
    fn kept(&self) -> MutexGuard<'_, VecDeque<Id>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a connection, now or when the port is up.
    pub(super) fn say(&self, id: Id) {
        if self.context.is_up(self.port).unwrap_or(true) {
            return;
        }
        let mut kept = self.kept();
        let first = (kept.len() >= GOODBYES_MAX).then(|| kept.pop_front());
        kept.push_back(id);
        drop(kept);
        drop(first);
        // It may have come up meanwhile, which was told before.
        if self.context.is_up(self.port).unwrap_or(true) {
            drop(self.take());
        }
    }

    /// The port is up: those that are to be said.
    pub(super) fn take(&self) -> VecDeque<Id> {
        std::mem::take(&mut *self.kept())
    }
}

/// Where a port of ours takes requests in.
pub(super) struct Desk {
    pub(super) goodbyes: Arc<Goodbyes>,
    pub(super) address: SocketAddr,
    /// None when its device is gone.
    id: Mutex<Option<Id>>,
}

impl Desk {
    /// Its device goes: nobody is taken in any more.
    pub(super) fn close(&self) {
        *self.id.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// What all ports of an agent have in common when they meet by rdma_cm.
pub(super) struct Reception {
    pub(super) events: Arc<Events>,
    next: AtomicU64,
}

impl Reception {
    /// # Errors
    /// [`ErrorKind::Unsupported`] without librdmacm, or the kernel's part of it.
    pub(super) fn open() -> Result<Self> {
        Ok(Self {
            events: Arc::new(Events::new()?),
            next: AtomicU64::new(CONNECTIONS_FIRST),
        })
    }

    /// A number that no connection of this agent had.
    pub(super) fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// The port of ours that takes requests in by this number.
    pub(super) fn desk(number: u64) -> Option<usize> {
        (number < CONNECTIONS_FIRST).then_some(number as usize)
    }

    /// Takes requests in for the port at this position: at the address of its GID, or at an address of this machine's that the
    /// kernel knows it by.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] when it has none.
    pub(super) fn listen(
        &self,
        at: usize,
        (context, port): (&Arc<Context>, u8),
        gid: &Gid,
    ) -> Result<Desk> {
        let device = context.name();
        let mut tried = Vec::new();
        let own = gid.ip().into_iter().chain(local_addresses()?);
        for ip in own {
            if tried.contains(&ip) {
                continue;
            }
            tried.push(ip);
            let (id, address) = match Id::listen(&self.events, at as u64, ip) {
                Ok(made) => made,
                // Most addresses of a machine are of cards that know nothing of RDMA.
                Err(error) => {
                    tracing::debug!(%error, device, "no address for rdma_cm");
                    continue;
                }
            };
            if id
                .port()
                .is_some_and(|known| known == (device.to_owned(), port))
            {
                let id = Mutex::new(Some(id));
                let goodbyes = Arc::new(Goodbyes {
                    context: context.clone(),
                    port,
                    kept: Mutex::default(),
                });
                return Ok(Desk {
                    goodbyes,
                    address,
                    id,
                });
            }
        }
        let text = format!("{device}:{port} has no IP address by which rdma_cm knows it");
        Err(Error::new(ErrorKind::Unsupported, text))
    }
}

/// A ticket that nobody had.
pub(super) fn ticket(run: Incarnation, line: u64, rail: usize, made: u32) -> Result<Ticket> {
    let mut secret = [0; 16];
    getrandom::fill(&mut secret)
        .map_err(|e| Error::new(ErrorKind::Io, format!("draw a ticket: {e}")))?;
    Ok(Ticket {
        run,
        line,
        rail: rail as u8,
        made,
        secret,
    })
}

impl Desk {
    /// Has somebody come here with this ticket.
    pub(super) fn appoint(&self, ticket: &Ticket) -> Appointment {
        Appointment {
            at: self.address,
            ticket: ticket.encode(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn some() -> Ticket {
        ticket(Incarnation(0x0102_0304_0506_0708), 0x401, 3, 9).unwrap()
    }

    /// A ticket as it comes with a request: the kernel fills it up with zeros.
    #[test]
    fn tickets_survive_the_way_and_are_told_apart() {
        let given = some();
        let mut came = given.encode().to_vec();
        assert!(came.len() <= 56);
        for cut in 0..TICKET_BYTES {
            assert!(Ticket::decode(&came[..cut]).is_err(), "{cut}");
        }
        came.resize(56, 0);
        assert_eq!(Ticket::decode(&came).unwrap(), given);
        // The same rail, and another secret.
        assert_ne!(some(), given);
        assert!(!format!("{given:?}").contains(&format!("{:?}", given.secret)));
        let changed = |at: usize| {
            let mut bytes = came.clone();
            bytes[at] ^= 1;
            Ticket::decode(&bytes)
        };
        assert_eq!(changed(0).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(changed(4).unwrap_err().kind(), ErrorKind::Version);
        for at in [6, 8, 12, 20, 28, 43] {
            assert_ne!(changed(at).unwrap(), given, "{at}");
        }
    }

    /// Addresses of both kinds; none, and no port, are refused.
    #[test]
    fn appointments_survive_the_way() {
        for at in ["10.9.0.1:1", "[fd00::7]:65535"] {
            let made = Appointment {
                at: at.parse().unwrap(),
                ticket: some().encode(),
            };
            let mut out = Vec::new();
            made.encode(&mut out);
            let read = Appointment::decode(&mut Reader::new(&out)).unwrap();
            assert_eq!(read, made);
            assert!(Appointment::decode(&mut Reader::new(&out[1..])).is_err());
            let mut nowhere = out.clone();
            nowhere[..16].fill(0);
            assert!(Appointment::decode(&mut Reader::new(&nowhere)).is_err());
            out[16..18].fill(0);
            assert!(Appointment::decode(&mut Reader::new(&out)).is_err());
        }
    }

    proptest! {
        /// What strangers show is refused or understood.
        #[test]
        fn no_bytes_break_the_decoders(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Ticket::decode(&bytes);
            let _ = Appointment::decode(&mut Reader::new(&bytes));
        }
    }
}
