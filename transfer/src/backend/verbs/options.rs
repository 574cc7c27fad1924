//! How RDMA is used.

use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use kvcache_core::{Error, Result};

/// How queue pairs are made. The defaults are right for most networks; what came of them is in the path report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerbsOptions {
    /// The ports that may be used, with commas between them, each a device, such as `mlx5_0`, or device and port, such as
    /// `mlx5_0:2`. None: of those that are up all that are as near as the nearest one.
    pub device: Option<String>,
    /// How many ports are used at most, the nearest first, of equals those that come first in `device`; 1 to 8. To each peer
    /// there are as many rails as both sides have ports; large requests go over all of them, small ones over the first.
    pub rails: u8,
    /// What ports should be near to: the PCI address of a device, such as `0000:3b:00.0` for a GPU. None: the memory node
    /// whose processors alone this process may use, if it is bound to one.
    pub near: Option<String>,
    /// The entry of each port's GID table. None: RoCE v2 with an IPv4 address first, then RoCE v2, then any; on InfiniBand
    /// the first.
    pub gid_index: Option<u8>,
    /// How queue pairs are connected; the same on both sides.
    pub connect: VerbsConnect,
    /// Where peers ask for connections, by TCP. None: the IP addresses of the GIDs, any free port; on InfiniBand, whose GIDs
    /// are no addresses, it must be said.
    pub listen: Option<SocketAddr>,
    /// The most bytes of content in a packet: 256, 512, 1024, 2048 or 4096. None: what both ports do.
    pub mtu: Option<u32>,
    /// The traffic class of packets (in RoCE v2 its upper six bits are the DSCP).
    pub traffic_class: u8,
    /// The service level, which InfiniBand and priority flow control by VLAN go by; up to 15. By rdma_cm the route has it: it
    /// must be 0 then.
    pub service_level: u8,
    /// A packet that is not acknowledged is sent again after 4.096 µs × 2^this; 1 to 31.
    pub timeout: u8,
    /// How often it is sent again before the peer is given up; up to 7.
    pub retries: u8,
    /// How long the thread looks for completions before it sleeps, while work is under way. 0: it sleeps at once.
    pub polling: Duration,
}

/// How the two queue pairs of a rail learn of each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VerbsConnect {
    /// Both sides tell each other by TCP: numbers, GIDs, LIDs. What there is between them must need no more: RoCE v2 by IP,
    /// or one subnet of InfiniBand.
    #[default]
    Exchange,
    /// Through librdmacm: the kernel finds the way from IP address to IP address, on InfiniBand the subnet manager's path
    /// record, and sees to it that both are connected. TCP only says where, and stays as a sign of life.
    RdmaCm,
}

impl VerbsConnect {
    /// All ways, by their names.
    const NAMES: [(&str, Self); 2] = [("exchange", Self::Exchange), ("rdma_cm", Self::RdmaCm)];

    /// Its name, in settings and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Exchange => "exchange",
            Self::RdmaCm => "rdma_cm",
        }
    }
}

impl FromStr for VerbsConnect {
    type Err = Error;

    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] for what is no way's name.
    fn from_str(name: &str) -> Result<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        let names = Self::NAMES.map(|(known, _)| known);
        found
            .map(|(_, way)| *way)
            .ok_or_else(|| Error::invalid("verbs connect", name, names))
    }
}

impl Default for VerbsOptions {
    fn default() -> Self {
        Self {
            device: None,
            rails: 4,
            near: None,
            gid_index: None,
            connect: VerbsConnect::Exchange,
            listen: None,
            mtu: None,
            traffic_class: 0,
            service_level: 0,
            // 67 ms: most devices wait up to four times as long, eight times in all.
            timeout: 14,
            retries: 7,
            polling: Duration::from_micros(20),
        }
    }
}

/// The most ports that an agent uses.
pub(super) const RAILS_MAX: u8 = 8;

/// How long nothing of a rail may end while something is under way on it, at least.
const PATIENCE_MIN: Duration = Duration::from_secs(15);

/// The least and the greatest MTU that verbs know, by their number of it.
const MTU_NUMBERS: std::ops::RangeInclusive<u8> = 1..=5;

/// Bytes, of the number that verbs have for an MTU.
pub(super) fn mtu_bytes(number: u8) -> u32 {
    128 << u32::from(number.clamp(*MTU_NUMBERS.start(), *MTU_NUMBERS.end()))
}

impl VerbsOptions {
    /// The number that verbs have for the greatest MTU that is allowed.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`], here and below, for what no device takes.
    pub(super) fn mtu_number(&self) -> Result<u8> {
        let Some(wanted) = self.mtu else {
            return Ok(*MTU_NUMBERS.end());
        };
        let found = MTU_NUMBERS
            .clone()
            .find(|&number| mtu_bytes(number) == wanted);
        found.ok_or_else(|| Error::invalid("verbs mtu", wanted, [256, 512, 1024, 2048, 4096]))
    }

    pub(super) fn check(&self) -> Result<()> {
        let within = |name: &str, value: u8, accepted: std::ops::RangeInclusive<u8>| {
            if accepted.contains(&value) {
                return Ok(());
            }
            Err(Error::invalid(name, value, accepted))
        };
        within("verbs timeout", self.timeout, 1..=31)?;
        within("verbs retries", self.retries, 0..=7)?;
        within("verbs service level", self.service_level, 0..=15)?;
        if self.connect == VerbsConnect::RdmaCm {
            within("verbs service level by rdma_cm", self.service_level, 0..=0)?;
        }
        within("verbs rails", self.rails, 1..=RAILS_MAX)?;
        self.places()?;
        self.mtu_number().map(|_| ())
    }

    /// How long nothing of a rail may end while something is under way on it: twice as long as any device takes to give the peer
    /// up, which may be four times what it was told. Some never give it up: soft-RoCE tries for ever when it was told seven
    /// times.
    pub(super) fn patience(&self) -> Duration {
        let once = Duration::from_nanos(4096 << self.timeout.min(31));
        let times = u32::from(self.retries) + 1;
        PATIENCE_MIN.max(2 * 4 * times * once)
    }

    /// The devices that may be used, each with the port that is wanted if any is; all if there are none.
    pub(super) fn places(&self) -> Result<Vec<(&str, Option<u8>)>> {
        let Some(all) = self.device.as_deref() else {
            return Ok(Vec::new());
        };
        all.split(',').map(|one| place(one.trim())).collect()
    }
}

fn place(one: &str) -> Result<(&str, Option<u8>)> {
    let wrong = || Error::invalid("verbs device", one, "DEVICE or DEVICE:PORT");
    let (device, port) = match one.split_once(':') {
        None => (one, None),
        Some((device, port)) => {
            let port = port.parse().ok().filter(|&port: &u8| port > 0);
            (device, Some(port.ok_or_else(wrong)?))
        }
    };
    match device.is_empty() {
        true => Err(wrong()),
        false => Ok((device, port)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What no device takes is refused by name, before any is opened.
    #[test]
    fn options_that_cannot_work_are_refused_by_name() {
        let default = VerbsOptions::default();
        default.check().unwrap();
        assert_eq!(default.mtu_number().unwrap(), 5);
        let refused = [
            (
                VerbsOptions {
                    timeout: 32,
                    ..default.clone()
                },
                "timeout",
            ),
            (
                VerbsOptions {
                    timeout: 0,
                    ..default.clone()
                },
                "timeout",
            ),
            (
                VerbsOptions {
                    retries: 8,
                    ..default.clone()
                },
                "retries",
            ),
            (
                VerbsOptions {
                    service_level: 16,
                    ..default.clone()
                },
                "service level",
            ),
            (
                VerbsOptions {
                    mtu: Some(1500),
                    ..default.clone()
                },
                "mtu",
            ),
            (
                VerbsOptions {
                    rails: 0,
                    ..default.clone()
                },
                "rails",
            ),
            (
                VerbsOptions {
                    rails: 9,
                    ..default.clone()
                },
                "rails",
            ),
            (
                VerbsOptions {
                    device: Some("mlx5_0,".to_owned()),
                    ..default.clone()
                },
                "device",
            ),
        ];
        for (options, name) in refused {
            let error = options.check().unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    /// Devices alone, with a port, several, and a port that is none.
    #[test]
    fn devices_may_come_with_their_ports() {
        let place = |text: &str| VerbsOptions {
            device: Some(text.to_owned()),
            ..VerbsOptions::default()
        };
        assert_eq!(place("mlx5_0").places().unwrap(), [("mlx5_0", None)]);
        assert_eq!(
            place("mlx5_0:2, mlx5_1").places().unwrap(),
            [("mlx5_0", Some(2)), ("mlx5_1", None)]
        );
        assert_eq!(VerbsOptions::default().places().unwrap(), []);
        for wrong in [
            "mlx5_0:",
            "mlx5_0:0",
            "mlx5_0:x",
            "mlx5_0:1:1",
            "",
            ":1",
            "a,,b",
        ] {
            assert!(place(wrong).places().is_err(), "{wrong}");
        }
    }

    /// Each size that verbs know, there and back.
    #[test]
    fn mtus_have_numbers() {
        for (number, bytes) in [(1, 256), (2, 512), (3, 1024), (4, 2048), (5, 4096)] {
            let mtu = Some(bytes);
            let options = VerbsOptions {
                mtu,
                ..VerbsOptions::default()
            };
            assert_eq!(options.mtu_number().unwrap(), number);
            assert_eq!(mtu_bytes(number), bytes);
        }
    }
}
