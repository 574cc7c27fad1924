//! What a GID is, and what the system says about it beside its bytes.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

/// Which way packets to a GID travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GidKind {
    /// InfiniBand, or RoCE without IP, which no router passes on.
    Local,
    /// RoCE over UDP and IP.
    RoceV2,
}

/// An entry of a port's GID table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gid {
    pub(crate) index: u8,
    pub(crate) bytes: [u8; 16],
    pub(crate) kind: GidKind,
}

impl Gid {
    /// The IP address that it stands for, if it stands for one that a socket can be bound to without naming a card.
    pub(crate) fn ip(&self) -> Option<IpAddr> {
        let address = Ipv6Addr::from(self.bytes);
        match address.to_ipv4_mapped() {
            Some(address) => Some(IpAddr::V4(address)),
            None if self.kind == GidKind::RoceV2 && !address.is_unicast_link_local() => {
                Some(IpAddr::V6(address))
            }
            None => None,
        }
    }
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = Ipv6Addr::from(self.bytes);
        match address.to_ipv4_mapped() {
            Some(address) => write!(f, "{address}"),
            None => write!(f, "{address}"),
        }?;
        match self.kind {
            GidKind::RoceV2 => write!(f, " (index {}, RoCE v2)", self.index),
            GidKind::Local => write!(f, " (index {})", self.index),
        }
    }
}

/// The kind of an entry; none where it is empty. `root` is the device's folder in `/sys/class/infiniband`.
pub(super) fn gid_kind(root: &Path, port: u8, index: u8) -> Option<GidKind> {
    let file = root.join(format!("ports/{port}/gid_attrs/types/{index}"));
    let text = std::fs::read_to_string(file).ok()?;
    Some(match text.trim() {
        "RoCE v2" => GidKind::RoceV2,
        _ => GidKind::Local,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(address: &str, kind: GidKind) -> Gid {
        let address: Ipv6Addr = address.parse().unwrap();
        Gid {
            index: 1,
            bytes: address.octets(),
            kind,
        }
    }

    /// An IPv4 address inside, a routable IPv6 one, and those that name no address to listen on.
    #[test]
    fn gids_tell_their_ip_address() {
        let mapped = gid("::ffff:10.9.0.1", GidKind::RoceV2);
        assert_eq!(mapped.ip(), Some("10.9.0.1".parse().unwrap()));
        assert_eq!(mapped.to_string(), "10.9.0.1 (index 1, RoCE v2)");
        let routed = gid("fd00::7", GidKind::RoceV2);
        assert_eq!(routed.ip(), Some("fd00::7".parse().unwrap()));
        assert_eq!(gid("fe80::1", GidKind::RoceV2).ip(), None);
        let infiniband = gid("fd00::7", GidKind::Local);
        assert_eq!(infiniband.ip(), None);
        assert_eq!(infiniband.to_string(), "fd00::7 (index 1)");
    }

    /// As the kernel writes them, with an entry that is empty: reading that fails there.
    #[test]
    fn kinds_are_read_from_the_system() {
        let folder = tempfile::tempdir().unwrap();
        let types = folder.path().join("ports/1/gid_attrs/types");
        std::fs::create_dir_all(&types).unwrap();
        std::fs::write(types.join("0"), "IB/RoCE v1\n").unwrap();
        std::fs::write(types.join("1"), "RoCE v2\n").unwrap();
        let kinds: Vec<_> = (0..3).map(|i| gid_kind(folder.path(), 1, i)).collect();
        assert_eq!(kinds, [Some(GidKind::Local), Some(GidKind::RoceV2), None]);
    }
}
