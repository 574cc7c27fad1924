//! Which ports, in which order, and which GID of each.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::near::{Nearness, Place};
use super::options::VerbsOptions;
use crate::sys::verbs::{Context, Gid, GidKind, Port, device_names};

/// A port to use, and the address that it has.
pub(super) struct Chosen {
    pub(super) context: Arc<Context>,
    pub(super) port: Port,
    pub(super) gid: Gid,
    pub(super) nearness: Nearness,
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

/// Opens the ports to use, the nearest first; never none.
///
/// # Errors
/// [`ErrorKind::Unsupported`] when there is none, which says why: no libibverbs, no device, no port that is up; or when one
/// that is named is not there.
pub(super) fn ports(options: &VerbsOptions) -> Result<Vec<Chosen>> {
    let root = Path::new("/");
    let place = Place::of(options.near.as_deref(), root)?;
    let wanted = options.places()?;
    let mut names: Vec<String> = Vec::new();
    match wanted.is_empty() {
        true => names = device_names()?,
        false => {
            for (name, _) in &wanted {
                if !names.iter().any(|known| known == name) {
                    names.push((*name).to_owned());
                }
            }
        }
    }
    if names.is_empty() {
        return Err(Error::new(ErrorKind::Unsupported, "no RDMA device"));
    }
    let mut found = Vec::new();
    for name in names {
        let context = Arc::new(Context::open(&name)?);
        let nearness = place.nearness(&name);
        for port in context.ports()? {
            found.push((context.clone(), port, nearness));
        }
    }
    let sketches: Vec<Sketch<'_>> = found
        .iter()
        .map(|(context, port, nearness)| Sketch {
            device: context.name(),
            port: port.number,
            is_up: port.is_active,
            nearness: *nearness,
        })
        .collect();
    let picked = pick(&sketches, &wanted, options.rails.into())?;
    let mut found: Vec<_> = found.into_iter().map(Some).collect();
    let mut chosen = Vec::new();
    let mut lacking = None;
    for at in picked {
        let Some((context, port, nearness)) = found.get_mut(at).and_then(Option::take) else {
            continue;
        };
        match gid(&port.gids, port.is_ethernet, options.gid_index) {
            Ok(gid) => chosen.push(Chosen {
                context,
                port,
                gid,
                nearness,
            }),
            Err(error) => {
                let error = error.at(format!("{}:{}", context.name(), port.number));
                if options.gid_index.is_some() {
                    return Err(error);
                }
                tracing::warn!(%error, "an RDMA port is not used");
                lacking = Some(error);
            }
        }
    }
    match lacking {
        Some(error) if chosen.is_empty() => Err(error),
        _ => Ok(chosen),
    }
}

/// What a choice goes by.
#[derive(Clone, Copy, Debug)]
struct Sketch<'a> {
    device: &'a str,
    port: u8,
    is_up: bool,
    nearness: Nearness,
}

/// Which of the ports to use, in order: of those that are wanted the nearest; where none are named, only those that are as
/// near as the nearest one.
fn pick(ports: &[Sketch<'_>], wanted: &[(&str, Option<u8>)], most: usize) -> Result<Vec<usize>> {
    let name = |at: usize| format!("{}:{}", ports[at].device, ports[at].port);
    let fits = |at: usize, (device, port): &(&str, Option<u8>)| {
        ports[at].device == *device && port.is_none_or(|port| port == ports[at].port)
    };
    let mut all: Vec<usize> = Vec::new();
    for one in wanted {
        let of_it: Vec<usize> = (0..ports.len()).filter(|&at| fits(at, one)).collect();
        if of_it.is_empty() {
            let (device, port) = one;
            let port = port.map_or_else(String::new, |port| format!(":{port}"));
            let text = format!("no RDMA port \"{device}{port}\"");
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        all.extend(
            of_it
                .into_iter()
                .filter(|at| !all.contains(at))
                .collect::<Vec<_>>(),
        );
    }
    if wanted.is_empty() {
        all = (0..ports.len()).collect();
    }
    let (mut up, down): (Vec<usize>, Vec<usize>) = all.into_iter().partition(|&at| ports[at].is_up);
    let down: Vec<String> = down.into_iter().map(name).collect();
    if !wanted.is_empty() && !up.is_empty() && !down.is_empty() {
        tracing::warn!(
            down = down.join(", "),
            "RDMA ports that are not up are not used"
        );
    }
    up.sort_by_key(|&at| ports[at].nearness);
    let Some(nearest) = up.first().map(|&at| ports[at].nearness) else {
        let text = format!("no RDMA port is up; down: {}", down.join(", "));
        return Err(Error::new(ErrorKind::Unsupported, text));
    };
    if wanted.is_empty() {
        up.retain(|&at| ports[at].nearness == nearest);
    }
    up.truncate(most);
    Ok(up)
}

/// Where peers ask for connections: at each of the ports' addresses, or where it is said.
///
/// # Errors
/// [`ErrorKind::Invalid`] when that is neither said nor any GID's.
pub(super) fn listen(options: &VerbsOptions, gids: &[Gid]) -> Result<Vec<SocketAddr>> {
    if let Some(said) = options.listen {
        return Ok(vec![said]);
    }
    let mut all: Vec<SocketAddr> = Vec::new();
    for ip in gids.iter().filter_map(Gid::ip) {
        let address = SocketAddr::new(ip, 0);
        if !all.contains(&address) {
            all.push(address);
        }
    }
    if all.is_empty() {
        let names: Vec<String> = gids.iter().map(ToString::to_string).collect();
        let text = format!(
            "GID {} is no IP address: say where verbs listen",
            names.join(", ")
        );
        return Err(Error::new(ErrorKind::Invalid, text));
    }
    Ok(all)
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

    /// Of a machine with near, far and dead ports: which are used, by what is wanted.
    #[test]
    fn the_nearest_ports_are_used_and_no_more_than_wanted() {
        use Nearness::{Far, Node, Switch};
        let sketch = |device, port, is_up, nearness| Sketch {
            device,
            port,
            is_up,
            nearness,
        };
        let ports = [
            sketch("mlx5_0", 1, true, Far),
            sketch("mlx5_1", 1, true, Node),
            sketch("mlx5_2", 1, true, Switch),
            sketch("mlx5_2", 2, true, Switch),
            sketch("mlx5_3", 1, false, Switch),
        ];
        let picked = |wanted: &[(&str, Option<u8>)], most| pick(&ports, wanted, most).unwrap();
        assert_eq!(picked(&[], 8), [2, 3]);
        assert_eq!(picked(&[], 1), [2]);
        let named = [("mlx5_0", None), ("mlx5_1", Some(1)), ("mlx5_2", None)];
        assert_eq!(picked(&named, 8), [2, 3, 1, 0]);
        assert_eq!(picked(&named, 3), [2, 3, 1]);
        // As near as each other: in the order in which they are named, each once, without those that are down.
        let named = [("mlx5_2", Some(2)), ("mlx5_3", None), ("mlx5_2", None)];
        assert_eq!(picked(&named, 8), [3, 2]);
        for (wanted, text) in [
            (("mlx5_3", None), "down: mlx5_3:1"),
            (("mlx5_9", None), "\"mlx5_9\""),
            (("mlx5_0", Some(2)), "\"mlx5_0:2\""),
        ] {
            let error = pick(&ports, &[wanted], 8).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    /// On InfiniBand all are of one kind, and the first is the port's own.
    #[test]
    fn infiniband_ports_use_their_first_gid() {
        let table = [
            entry(0, "fe80::2", GidKind::Local),
            entry(1, "fd00::2", GidKind::Local),
        ];
        assert_eq!(gid(&table, false, None).unwrap().index, 0);
        let nowhere = listen(&VerbsOptions::default(), &table[..1]).unwrap_err();
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
        let other = gid(&table(), true, Some(5)).unwrap();
        let all = [chosen, other, chosen];
        let own = listen(&VerbsOptions::default(), &all).unwrap();
        let expected = ["10.0.0.1:0", "10.0.0.2:0"].map(|text| text.parse().unwrap());
        assert_eq!(own, expected);
        let said = VerbsOptions {
            listen: Some("127.0.0.1:7".parse().unwrap()),
            ..VerbsOptions::default()
        };
        assert_eq!(
            listen(&said, &all).unwrap(),
            ["127.0.0.1:7".parse().unwrap()]
        );
    }
}
