//! What RDMA there is on this machine, for whoever wants to know before making an agent.

use std::sync::Arc;

use kvcache_core::Error;

use super::choose;
use super::options::mtu_bytes;
use crate::sys::verbs::{Context, Domain, cm, device_names, takes_dma_bufs};

/// A port of an RDMA device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RdmaPort {
    /// The device's name, such as `mlx5_0`.
    pub device: String,
    /// Its number, from 1.
    pub port: u8,
    /// Whether the link is up.
    pub is_active: bool,
    /// RoCE; InfiniBand otherwise.
    pub is_ethernet: bool,
    /// The most bytes of content in a packet that the link takes now.
    pub mtu: u32,
    /// The GIDs that are set, each with its index and kind.
    pub gids: Vec<String>,
    /// The one that an agent uses unless it is told another; none without any.
    pub gid_used: Option<String>,
    /// The longest work queue that the device has, in operations.
    pub work_max: u32,
    /// Whether the device takes memory of GPUs as dma-bufs, or why not.
    pub dma_bufs: Result<(), String>,
}

/// All RDMA ports of this machine; none where it has no RDMA device.
///
/// # Errors
/// [`kvcache_core::ErrorKind::Unsupported`] without libibverbs, [`kvcache_core::ErrorKind::Io`] when a device can't be
/// opened.
pub fn rdma_ports() -> Result<Vec<RdmaPort>, Error> {
    let mut all = Vec::new();
    for name in device_names()? {
        let context = Context::open(&name)?;
        let limits = context.limits()?;
        let context = Arc::new(context);
        let dma_bufs = takes_dma_bufs(&Domain::new(&context)?);
        for port in context.ports()? {
            let used = choose::gid(&port.gids, port.is_ethernet, None).ok();
            all.push(RdmaPort {
                device: name.clone(),
                port: port.number,
                is_active: port.is_active,
                is_ethernet: port.is_ethernet,
                mtu: mtu_bytes(port.mtu),
                gids: port.gids.iter().map(ToString::to_string).collect(),
                gid_used: used.map(|gid| gid.to_string()),
                work_max: limits.work,
                dma_bufs: dma_bufs.clone(),
            });
        }
    }
    Ok(all)
}

/// Whether queue pairs can be connected by rdma_cm on this machine ([`super::VerbsConnect::RdmaCm`]).
///
/// # Errors
/// [`kvcache_core::ErrorKind::Unsupported`] without librdmacm, or without the kernel's part of it.
pub fn rdma_cm() -> Result<(), Error> {
    cm::available()
}
