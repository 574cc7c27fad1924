//! The ports of an agent, and what is made of them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};

use super::appointment::{Desk, Reception};
use super::choose::{self, Chosen};
use super::greeting::Offer;
use super::near::{Nearness, Place};
use super::options::{VerbsConnect, VerbsOptions, mtu_bytes};
use super::using::RailTold;
use super::wire::{FRAGMENTS, Wire};
use crate::stats::PortStats;
use crate::sys::cuda::Gpu;
use crate::sys::verbs::{
    Channel, Context, Domain, End, Gid, GidKind, Limits, PairSettings, Port, Reached,
};

/// Operations of jobs that a connection has under way at most.
const WORK_MAX: u32 = 128;

/// Bytes in one operation: a larger one would keep others waiting.
const PIECE_BYTES_MAX: u32 = 1 << 20;

/// Reads under way on a connection, where the device could do more: enough to fill 400 Gbit/s with reads of 64 KiB.
const READS_MAX: u8 = 16;

/// Where packets of RoCE v2 go.
const ROCE_PORT: u16 = 4791;

/// An open device: memory that is registered with it serves all of its ports.
pub(super) struct Device {
    pub(super) context: Arc<Context>,
    pub(super) domain: Arc<Domain>,
    pub(super) channel: Arc<Channel>,
    limits: Limits,
}

/// A port that is used.
pub(super) struct Card {
    /// Its device's number among those of the agent.
    pub(super) device: usize,
    domain: Arc<Domain>,
    channel: Arc<Channel>,
    port: Port,
    gid: Gid,
    nearness: Nearness,
    limits: Limits,
    /// The greatest that both the options and the port allow, as verbs number it.
    mtu: u8,
    work: u32,
    patience: Duration,
    /// Where peers connect by rdma_cm.
    desk: Option<Desk>,
    /// Of all peers.
    pub(super) told: Arc<PortTold>,
}

/// What is told of a port.
pub(super) struct PortTold {
    /// The device's name, and the port's number.
    pub(super) name: String,
    pub(super) is_up: AtomicBool,
    pub(super) written: AtomicU64,
    pub(super) read: AtomicU64,
    /// How often a rail over it was lost.
    pub(super) lost: AtomicU64,
    /// Operations that were done again by another rail.
    pub(super) repeated: AtomicU64,
}

impl PortTold {
    pub(super) fn stats(&self) -> PortStats {
        PortStats {
            name: self.name.clone(),
            is_up: self.is_up.load(Ordering::Relaxed),
            bytes_read: self.read.load(Ordering::Relaxed),
            bytes_written: self.written.load(Ordering::Relaxed),
            rails_lost: self.lost.load(Ordering::Relaxed),
            pieces_repeated: self.repeated.load(Ordering::Relaxed),
        }
    }
}

/// All that an agent has of RDMA.
pub(super) struct Cards {
    pub(super) devices: Vec<Device>,
    /// The nearest first; never none.
    pub(super) cards: Vec<Card>,
    /// Queue pairs are connected by rdma_cm.
    pub(super) reception: Option<Reception>,
    pub(super) options: VerbsOptions,
    /// How near each card is to GPUs whose memory was moved, by their PCI addresses.
    near: Mutex<HashMap<String, Arc<[Nearness]>>>,
}

/// A random number of 24 bits, which packets are counted from.
fn first_packet() -> Result<u32> {
    let mut random = [0; 4];
    getrandom::fill(&mut random)
        .map_err(|e| Error::new(ErrorKind::Io, format!("draw a packet number: {e}")))?;
    Ok(u32::from_le_bytes(random) & 0x00ff_ffff)
}

impl Device {
    fn open(context: Arc<Context>) -> Result<Self> {
        Ok(Self {
            limits: context.limits()?,
            domain: Arc::new(Domain::new(&context)?),
            channel: Arc::new(Channel::new(&context)?),
            context,
        })
    }
}

impl Cards {
    pub(super) fn open(options: &VerbsOptions) -> Result<Self> {
        options.check()?;
        let mut devices: Vec<Device> = Vec::new();
        let mut cards: Vec<Card> = Vec::new();
        let reception = match options.connect {
            VerbsConnect::Exchange => None,
            VerbsConnect::RdmaCm => Some(Reception::open()?),
        };
        let mut lacking = None;
        for chosen in choose::ports(options)? {
            let known = devices
                .iter()
                .position(|device| Arc::ptr_eq(&device.context, &chosen.context));
            let number = match known {
                Some(number) => number,
                None => {
                    devices.push(Device::open(chosen.context.clone())?);
                    devices.len() - 1
                }
            };
            let mut card = Card::new(number, &devices[number], chosen, options)?;
            if let Some(reception) = &reception {
                let port = (&devices[number].context, card.port.number);
                match reception.listen(cards.len(), port, &card.gid) {
                    Ok(desk) => card.desk = Some(desk),
                    Err(error) => {
                        tracing::warn!(%error, "an RDMA port is not used");
                        lacking = Some(error);
                        continue;
                    }
                }
            }
            cards.push(card);
        }
        if let Some(error) = lacking.filter(|_| cards.is_empty()) {
            return Err(error);
        }
        Ok(Self {
            devices,
            cards,
            reception,
            options: options.clone(),
            near: Mutex::default(),
        })
    }

    /// How near each of the cards is to a GPU; nobody can say of one that is at no PCI address that the system knows.
    pub(super) fn near(&self, gpu: &Gpu) -> Arc<[Nearness]> {
        let pci = gpu.pci().unwrap_or_default();
        let mut known = self.near.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(near) = known.get(&pci) {
            return near.clone();
        }
        let place = Place::of(Some(&pci), Path::new("/")).ok();
        let near: Arc<[Nearness]> = self
            .cards
            .iter()
            .map(|card| {
                let name = self.devices[card.device].context.name();
                let place = place.as_ref();
                place.map_or(Nearness::Unknown, |place| place.nearness(name))
            })
            .collect();
        tracing::debug!(pci, ?near, "ports as seen from a GPU");
        known.insert(pci, near.clone());
        near
    }

    /// Where peers ask for connections.
    pub(super) fn listen(&self) -> Result<Vec<SocketAddr>> {
        let gids: Vec<Gid> = self.cards.iter().map(|card| card.gid).collect();
        choose::listen(&self.options, &gids)
    }

    /// The address of the first port that has one that a socket can have.
    pub(super) fn ip(&self) -> Option<IpAddr> {
        self.cards.iter().find_map(|card| card.gid.ip())
    }

    /// What is told of a rail to this peer.
    pub(super) fn tell(&self, card: usize, peer: &Offer, reached: Option<Reached>) -> RailTold {
        let card = &self.cards[card];
        let context = &self.devices[card.device].context;
        let what = card.describe(peer, context, &self.options, reached);
        RailTold::new(what, card.to(peer))
    }

    /// Which port of ours goes with which of a peer's: pairs of positions, in the order of the peer's offers. Those of one
    /// network first, as far as addresses tell; each port of ours once.
    pub(super) fn pair(&self, offers: &[Offer]) -> Vec<(usize, usize)> {
        let own: Vec<(bool, [u8; 16])> = self
            .cards
            .iter()
            .map(|card| (card.port.is_ethernet, card.gid.bytes))
            .collect();
        pair(offers, &own)
    }
}

/// Leading bytes that two addresses share, without the last one, which neighbours differ in; of InfiniBand's only those of
/// the subnet.
fn shared(is_ethernet: bool, one: &[u8; 16], other: &[u8; 16]) -> usize {
    let most = if is_ethernet { 15 } else { 8 };
    let pairs = one.iter().zip(other).take(most);
    pairs.take_while(|(a, b)| a == b).count()
}

fn pair(offers: &[Offer], own: &[(bool, [u8; 16])]) -> Vec<(usize, usize)> {
    let mut free: Vec<usize> = (0..own.len()).collect();
    let mut pairs = Vec::new();
    for (number, offer) in offers.iter().enumerate() {
        let fitting = free.iter().enumerate();
        let fitting = fitting.filter(|&(_, &at)| own[at].0 == offer.is_ethernet);
        // Of equals the first, which is the nearest on this side.
        let best = fitting.min_by_key(|&(_, &at)| {
            std::cmp::Reverse(shared(offer.is_ethernet, &own[at].1, &offer.end.gid))
        });
        if let Some((place, &at)) = best {
            free.remove(place);
            pairs.push((number, at));
        }
    }
    pairs
}

impl Card {
    fn new(number: usize, device: &Device, chosen: Chosen, options: &VerbsOptions) -> Result<Self> {
        let Chosen {
            context,
            port,
            gid,
            nearness,
        } = chosen;
        let limits = device.limits;
        let room = limits
            .work
            .min(limits.completions.saturating_sub(FRAGMENTS.receives));
        let work = room.saturating_sub(FRAGMENTS.sends).min(WORK_MAX);
        if work == 0 {
            let text = format!("{} has too short work queues: {limits:?}", context.name());
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        let told = PortTold {
            name: format!("{}:{}", context.name(), port.number),
            is_up: AtomicBool::new(true),
            written: AtomicU64::new(0),
            read: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            repeated: AtomicU64::new(0),
        };
        Ok(Self {
            device: number,
            domain: device.domain.clone(),
            channel: device.channel.clone(),
            mtu: port.mtu.min(options.mtu_number()?).max(1),
            port,
            gid,
            nearness,
            limits,
            work,
            patience: options.patience(),
            desk: None,
            told: Arc::new(told),
        })
    }

    /// The number of its port.
    pub(super) fn port(&self) -> u8 {
        self.port.number
    }

    /// Where peers connect by rdma_cm.
    pub(super) fn desk(&self) -> Option<&Desk> {
        self.desk.as_ref()
    }

    /// The most bytes of one operation.
    pub(super) fn piece(&self) -> u64 {
        self.port.message_bytes_max.clamp(1, PIECE_BYTES_MAX).into()
    }

    /// A wire, and what the peer is told of it.
    pub(super) fn wire(&self, number: u64) -> Result<(Wire, Offer)> {
        let size = (self.port.number, self.work, self.patience);
        let wire = Wire::new(&self.domain, &self.channel, number, size)?;
        let end = End {
            pair: wire.pair(),
            first: first_packet()?,
            lid: self.port.lid,
            gid: self.gid.bytes,
        };
        let offer = Offer {
            end,
            is_ethernet: self.port.is_ethernet,
            mtu: self.mtu,
            reads_served: self.limits.reads_served.min(READS_MAX),
            appointment: None,
        };
        Ok((wire, offer))
    }

    /// How a wire that was offered so is connected to the one that the peer has offered.
    pub(super) fn settings(
        &self,
        own: &Offer,
        peer: &Offer,
        options: &VerbsOptions,
    ) -> PairSettings {
        // Within a subnet of InfiniBand packets go by LID.
        let same_subnet = self.gid.bytes[..8] == peer.end.gid[..8];
        PairSettings {
            port: self.port.number,
            gid_index: self.gid.index,
            is_global: self.port.is_ethernet || !same_subnet,
            mtu: own.mtu.min(peer.mtu),
            traffic_class: options.traffic_class,
            service_level: options.service_level,
            timeout: options.timeout,
            retries: options.retries,
            reads: self.limits.reads.min(peer.reads_served).min(READS_MAX),
            reads_served: own.reads_served,
        }
    }

    /// Where a rail to this peer leads.
    fn to(&self, peer: &Offer) -> SocketAddr {
        let to = Gid {
            bytes: peer.end.gid,
            ..self.gid
        };
        let any = IpAddr::V6(Ipv6Addr::from(to.bytes));
        let is_routed = self.gid.kind == GidKind::RoceV2;
        let port = if is_routed { ROCE_PORT } else { 0 };
        let told = peer.appointment.map(|appointment| appointment.at.ip());
        SocketAddr::new(told.or_else(|| to.ip()).unwrap_or(any), port)
    }

    /// What a rail to this peer is, in words.
    fn describe(
        &self,
        peer: &Offer,
        context: &Context,
        options: &VerbsOptions,
        reached: Option<Reached>,
    ) -> String {
        let to = Gid {
            bytes: peer.end.gid,
            ..self.gid
        };
        let told = peer.appointment.map(|appointment| appointment.at.ip());
        let to = told.or_else(|| to.ip()).map_or_else(
            || format!("LID {}", peer.end.lid),
            |address| address.to_string(),
        );
        let index = reached.and_then(|reached| reached.gid_index);
        let by = index.and_then(|index| self.port.gids.iter().find(|gid| gid.index == index));
        let mtu = reached.map_or(self.mtu.min(peer.mtu), |reached| reached.mtu);
        let (class, level) = (options.traffic_class, options.service_level);
        let (class, level) = reached.map_or((class, level), |reached| {
            (reached.traffic_class, reached.service_level)
        });
        let near = self.nearness.words();
        let near = near.map_or_else(String::new, |words| format!(" ({words})"));
        let mut text = format!(
            "{} port {}{near}, GID {}, MTU {}",
            context.name(),
            self.port.number,
            by.unwrap_or(&self.gid),
            mtu_bytes(mtu),
        );
        for (name, value) in [("traffic class", class), ("service level", level)] {
            if value > 0 {
                text.push_str(&format!(", {name} {value}"));
            }
        }
        if let Some(desk) = &self.desk {
            text.push_str(&format!(", by rdma_cm from {}", desk.address.ip()));
        }
        text + &format!(", to {to}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> [u8; 16] {
        text.parse::<Ipv6Addr>().unwrap().octets()
    }

    fn offer(is_ethernet: bool, gid: &str) -> Offer {
        Offer {
            end: End {
                pair: 1,
                first: 1,
                lid: 0,
                gid: address(gid),
            },
            is_ethernet,
            mtu: 5,
            reads_served: 1,
            appointment: None,
        }
    }

    /// Ports of one network go together; where addresses do not tell, the nearest of both sides do.
    #[test]
    fn ports_of_one_network_go_together() {
        let roce = |gids: &[&str]| {
            gids.iter()
                .map(|gid| (true, address(gid)))
                .collect::<Vec<_>>()
        };
        let offers = [
            offer(true, "::ffff:10.0.1.7"),
            offer(true, "::ffff:10.0.0.7"),
            offer(true, "::ffff:10.0.2.7"),
        ];
        let own = roce(&["::ffff:10.0.0.9", "::ffff:10.0.1.9"]);
        assert_eq!(pair(&offers, &own), [(0, 1), (1, 0)]);
        let flat = roce(&["::ffff:10.0.0.2", "::ffff:10.0.0.1"]);
        let offers = [
            offer(true, "::ffff:10.0.0.1"),
            offer(true, "::ffff:10.0.0.2"),
        ];
        assert_eq!(pair(&offers, &flat), [(0, 0), (1, 1)]);
        // InfiniBand does not reach Ethernet, and has its networks in the upper half.
        let mixed = [
            (false, address("fe80::1")),
            (true, address("::ffff:10.0.0.9")),
            (false, address("fec0::1")),
        ];
        let offers = [offer(false, "fec0::2"), offer(true, "::ffff:10.9.0.9")];
        assert_eq!(pair(&offers, &mixed), [(0, 2), (1, 1)]);
        assert_eq!(pair(&offers[..1], &mixed[1..2]), []);
    }
}
