//! Which device, port and GID.

use std::net::SocketAddr;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::options::VerbsOptions;
use crate::sys::verbs::{Context, Gid, GidKind, Port, device_names};

/// A port to use, and the address that it has.
pub(super) struct Chosen {
    pub(super) context: Arc<Context>,
    pub(super) port: Port,
    pub(super) gid: Gid,
}

/// The best entry of a GID table, or the wanted one.
///
/// # Errors
/// [`ErrorKind::Invalid`] when the wanted entry is empty, [`ErrorKind::Unsupported`] when all are.
pub(super) fn gid(gids: &[Gid], is_ethernet: bool, wanted: Option<u8>) -> Result<Gid> {
    if let Some(wanted) = wanted {
        let found = gids.iter().find(|gid| gid.index == wanted);
        let indexes = || gids.iter().map(|gid| gid.index).collect::<Vec<_>>();
        return found
            .copied()
            .ok_or_else(|| Error::invalid("verbs gid index", wanted, indexes()));
    }
    // Of equals the first.
    let rank = |gid: &&Gid| match (gid.kind, gid.ip()) {
        _ if !is_ethernet => 0,
        (GidKind::RoceV2, Some(ip)) if ip.is_ipv4() => 0,
        (GidKind::RoceV2, Some(_)) => 1,
        (GidKind::RoceV2, None) => 2,
        (GidKind::Local, _) => 3,
    };
    let best = gids.iter().min_by_key(rank).copied();
    best.ok_or_else(|| Error::new(ErrorKind::Unsupported, "the port has no GID"))
}

/// Opens the wanted port, or the first that is up.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when there is none, which says why: no libibverbs, no device, no port that is up.
pub(super) fn port(options: &VerbsOptions) -> Result<Chosen> {
    let (device, port) = options.place()?;
    let names = match device {
        Some(device) => vec![device.to_owned()],
        None => device_names()?,
    };
    if names.is_empty() {
        return Err(Error::new(ErrorKind::Unsupported, "no RDMA device"));
    }
    let mut down = Vec::new();
    for name in names {
        let context = Arc::new(Context::open(&name)?);
        for found in context.ports()? {
            if port.is_some_and(|port| port != found.number) {
                continue;
            }
            if !found.is_active {
                down.push(format!("{name}:{}", found.number));
                continue;
            }
            let gid = gid(&found.gids, found.is_ethernet, options.gid_index)
                .map_err(|e| e.at(format!("{name}:{}", found.number)))?;
            return Ok(Chosen {
                context,
                port: found,
                gid,
            });
        }
    }
    let text = match (&options.device, down.is_empty()) {
        (Some(wanted), true) => format!("no RDMA port {wanted:?}"),
        (_, _) => format!("no RDMA port is up; down: {}", down.join(", ")),
    };
    Err(Error::new(ErrorKind::Unsupported, text))
}

/// Where peers ask for connections.
///
/// # Errors
/// [`ErrorKind::Invalid`] when that is neither said nor the GID's.
pub(super) fn listen(options: &VerbsOptions, gid: &Gid) -> Result<SocketAddr> {
    let own = gid.ip().map(|ip| SocketAddr::new(ip, 0));
    options.listen.or(own).ok_or_else(|| {
        let text = format!("GID {gid} is no IP address: say where verbs listen");
        Error::new(ErrorKind::Invalid, text)
    })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn entry(index: u8, address: &str, kind: GidKind) -> Gid {
        let address: Ipv6Addr = address.parse().unwrap();
        let bytes = address.octets();
        Gid { index, bytes, kind }
    }

    /// The table of an Ethernet port as Linux fills it: version 1 and 2 of each address, link-local ones first.
    fn table() -> Vec<Gid> {
        vec![
            entry(0, "fe80::1", GidKind::Local),
            entry(1, "fe80::1", GidKind::RoceV2),
            entry(2, "fd00::1", GidKind::RoceV2),
            entry(3, "::ffff:10.0.0.1", GidKind::Local),
            entry(4, "::ffff:10.0.0.1", GidKind::RoceV2),
            entry(5, "::ffff:10.0.0.2", GidKind::RoceV2),
        ]
    }

    /// The table is cut down from its best entry to its worst.
    #[test]
    fn a_routable_address_goes_before_others() {
        let mut left = table();
        for expected in [4, 5, 2, 1, 0, 3] {
            let best = gid(&left, true, None).unwrap();
            assert_eq!(best.index, expected);
            left.retain(|gid| gid.index != expected);
        }
        let error = gid(&left, true, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }

    /// On InfiniBand all are of one kind, and the first is the port's own.
    #[test]
    fn infiniband_ports_use_their_first_gid() {
        let table = [
            entry(0, "fe80::2", GidKind::Local),
            entry(1, "fd00::2", GidKind::Local),
        ];
        assert_eq!(gid(&table, false, None).unwrap().index, 0);
        let nowhere = listen(&VerbsOptions::default(), &table[0]).unwrap_err();
        assert_eq!(nowhere.kind(), ErrorKind::Invalid);
    }

    /// What is said counts, unless there is nothing.
    #[test]
    fn a_wanted_gid_is_used_or_refused() {
        assert_eq!(gid(&table(), true, Some(1)).unwrap().index, 1);
        let error = gid(&table(), true, Some(9)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("gid index"), "{error}");
        let chosen = gid(&table(), true, None).unwrap();
        let own = listen(&VerbsOptions::default(), &chosen).unwrap();
        assert_eq!(own, "10.0.0.1:0".parse().unwrap());
        let said = VerbsOptions {
            listen: Some("127.0.0.1:7".parse().unwrap()),
            ..VerbsOptions::default()
        };
        assert_eq!(
            listen(&said, &chosen).unwrap(),
            "127.0.0.1:7".parse().unwrap()
        );
    }
}
