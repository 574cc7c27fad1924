//! How near two devices are, in the words of `nvidia-smi topo`.

use std::fmt;

use serde::{Serialize, Serializer};

use super::Device;

/// What lies between two devices; the nearer, the smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Link {
    /// They are one.
    Same,
    /// So many NVLinks, also by switches.
    Nv(u32),
    /// At most one PCI switch.
    Pix,
    /// Several PCI switches, and not the host bridge.
    Pxb,
    /// The host bridge: the processor's own PCI lanes.
    Phb,
    /// The way between host bridges of one memory node.
    Node,
    /// The way between memory nodes.
    Sys,
}

impl Link {
    /// All but NVLink, with what they mean.
    const ALL: [(Self, &'static str, &'static str); 6] = [
        (Self::Same, "X", "itself"),
        (Self::Pix, "PIX", "at most one PCI switch between them"),
        (
            Self::Pxb,
            "PXB",
            "several PCI switches, and not the host bridge",
        ),
        (Self::Phb, "PHB", "the host bridge of a processor"),
        (Self::Node, "NODE", "host bridges of one memory node"),
        (Self::Sys, "SYS", "the link between processors"),
    ];

    const OF_NVLINK: &'static str = "so many NVLinks, also by switches";

    /// Words of a matrix and what they mean.
    pub(crate) fn legend(has_nvlink: bool) -> impl Iterator<Item = (&'static str, &'static str)> {
        let nvlink = has_nvlink.then_some(("NV#", Self::OF_NVLINK));
        let all = Self::ALL.iter().map(|(_, name, meaning)| (*name, *meaning));
        all.chain(nvlink)
    }

    /// What it means, in words.
    pub(crate) fn meaning(self) -> &'static str {
        let found = Self::ALL.iter().find(|(link, ..)| *link == self);
        found.map_or(Self::OF_NVLINK, |(_, _, meaning)| meaning)
    }

    /// By the paths from the host bridge down. None where one of them has no place.
    pub(super) fn between(one: &Device, other: &Device, has_nodes: bool) -> Option<Self> {
        if one.path.is_empty() || other.path.is_empty() {
            return None;
        }
        let pairs = one.path.iter().zip(&other.path);
        let shared = pairs.take_while(|(a, b)| a == b).count();
        if shared >= 2 {
            // A switch has a bridge for each of its ports: the shared one leads up, one leads down to each device.
            let bridges = |path: &[String]| path.len().saturating_sub(shared + 1);
            let most = bridges(&one.path).max(bridges(&other.path));
            return Some(if most <= 1 { Self::Pix } else { Self::Pxb });
        }
        if shared == 1 {
            return Some(Self::Phb);
        }
        match (one.node, other.node) {
            (Some(a), Some(b)) if a == b => Some(Self::Node),
            (None, _) | (_, None) if !has_nodes => Some(Self::Node),
            _ => Some(Self::Sys),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, Self::ALL.iter().find(|(link, ..)| link == self)) {
            (Self::Nv(count), _) => f.pad(&format!("NV{count}")),
            (_, found) => f.pad(found.map_or("?", |(_, name, _)| name)),
        }
    }
}

impl Serialize for Link {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
