//! The port of an agent, and what is made of it.

use std::net::SocketAddr;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::choose::{self, Chosen};
use super::greeting::Offer;
use super::options::{VerbsOptions, mtu_bytes};
use super::wire::{FRAGMENTS, Wire};
use crate::sys::verbs::{Channel, Context, Domain, End, Gid, Limits, PairSettings, Port};

/// Operations of jobs that a connection has under way at most.
const WORK_MAX: u32 = 128;

/// Bytes in one operation: a larger one would keep others waiting.
const PIECE_BYTES_MAX: u32 = 1 << 20;

/// Reads under way on a connection, where the device could do more: enough to fill 400 Gbit/s with reads of 64 KiB.
const READS_MAX: u8 = 16;

pub(super) struct Card {
    pub(super) context: Arc<Context>,
    pub(super) domain: Arc<Domain>,
    pub(super) channel: Arc<Channel>,
    port: Port,
    gid: Gid,
    limits: Limits,
    options: VerbsOptions,
    /// The greatest that both the options and the port allow, as verbs number it.
    mtu: u8,
    work: u32,
}

/// A random number of 24 bits, which packets are counted from.
fn first_packet() -> Result<u32> {
    let mut random = [0; 4];
    getrandom::fill(&mut random)
        .map_err(|e| Error::new(ErrorKind::Io, format!("draw a packet number: {e}")))?;
    Ok(u32::from_le_bytes(random) & 0x00ff_ffff)
}

impl Card {
    pub(super) fn open(options: &VerbsOptions) -> Result<Self> {
        options.check()?;
        let Chosen { context, port, gid } = choose::port(options)?;
        let limits = context.limits()?;
        let domain = Arc::new(Domain::new(&context)?);
        let channel = Arc::new(Channel::new(&context)?);
        let room = limits
            .work
            .min(limits.completions.saturating_sub(FRAGMENTS.receives));
        let work = room.saturating_sub(FRAGMENTS.sends).min(WORK_MAX);
        if work == 0 {
            let text = format!("{} has too short work queues: {limits:?}", context.name());
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        Ok(Self {
            mtu: port.mtu.min(options.mtu_number()?).max(1),
            domain,
            channel,
            context,
            port,
            gid,
            limits,
            options: options.clone(),
            work,
        })
    }

    pub(super) fn options(&self) -> &VerbsOptions {
        &self.options
    }

    /// Where peers ask for connections.
    pub(super) fn listen(&self) -> Result<SocketAddr> {
        choose::listen(&self.options, &self.gid)
    }

    /// The address of this port, if a socket can have it.
    pub(super) fn ip(&self) -> Option<std::net::IpAddr> {
        self.gid.ip()
    }

    /// The most bytes of one operation.
    pub(super) fn piece(&self) -> u64 {
        self.port.message_bytes_max.clamp(1, PIECE_BYTES_MAX).into()
    }

    /// A wire, and what the peer is told of it.
    pub(super) fn wire(&self, number: u64) -> Result<(Wire, Offer)> {
        let size = (self.port.number, self.work);
        let wire = Wire::new(&self.domain, &self.channel, number, size)?;
        let end = End {
            pair: wire.pair(),
            first: first_packet()?,
            lid: self.port.lid,
            gid: self.gid.bytes,
        };
        let offer = Offer {
            end,
            mtu: self.mtu,
            reads_served: self.limits.reads_served.min(READS_MAX),
        };
        Ok((wire, offer))
    }

    /// Connects a wire that was offered so to the one that the peer has offered.
    pub(super) fn connect(&self, wire: &mut Wire, own: &Offer, peer: &Offer) -> Result<()> {
        // Within a subnet of InfiniBand packets go by LID.
        let same_subnet = self.gid.bytes[..8] == peer.end.gid[..8];
        let settings = PairSettings {
            port: self.port.number,
            gid_index: self.gid.index,
            is_global: self.port.is_ethernet || !same_subnet,
            mtu: own.mtu.min(peer.mtu),
            traffic_class: self.options.traffic_class,
            service_level: self.options.service_level,
            timeout: self.options.timeout,
            retries: self.options.retries,
            reads: self.limits.reads.min(peer.reads_served).min(READS_MAX),
            reads_served: own.reads_served,
        };
        wire.connect(&peer.end, own.end.first, &settings)
    }

    /// What a path to this peer is, in words.
    pub(super) fn describe(&self, peer: &Offer) -> String {
        let to = Gid {
            bytes: peer.end.gid,
            ..self.gid
        };
        let to = to.ip().map_or_else(
            || format!("LID {}", peer.end.lid),
            |address| address.to_string(),
        );
        format!(
            "verbs over {} port {}, GID {}, MTU {}, to {to}",
            self.context.name(),
            self.port.number,
            self.gid,
            mtu_bytes(self.mtu.min(peer.mtu)),
        )
    }
}
