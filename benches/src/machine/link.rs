//! How near two devices are, in the words of `nvidia-smi topo`.

use serde::Serialize;

use super::Device;

/// What lies between two devices; the nearer, the smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Link {
    /// They are one.
    #[serde(rename = "X")]
    Same,
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
    /// All, with what they mean.
    pub(crate) const LEGEND: [(Self, &'static str); 6] = [
        (Self::Same, "itself"),
        (Self::Pix, "at most one PCI switch between them"),
        (Self::Pxb, "several PCI switches, and not the host bridge"),
        (Self::Phb, "the host bridge of a processor"),
        (Self::Node, "host bridges of one memory node"),
        (Self::Sys, "the link between processors"),
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Same => "X",
            Self::Pix => "PIX",
            Self::Pxb => "PXB",
            Self::Phb => "PHB",
            Self::Node => "NODE",
            Self::Sys => "SYS",
        }
    }

    /// What it means, in words.
    pub(crate) fn meaning(self) -> &'static str {
        let found = Self::LEGEND.iter().find(|(link, _)| *link == self);
        found.map_or("", |(_, meaning)| meaning)
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
