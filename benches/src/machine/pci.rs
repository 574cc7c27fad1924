//! One PCI device by its address: how it is connected, and what bridges do with what passes them.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Lanes, text};

/// Where the extended capabilities begin; only root may read from there on.
const EXTENDED: usize = 0x100;
/// Access control services.
const ACS: u16 = 0x000d;
/// Requests, and completions, of one device to another below the bridge go up to the processor first.
const REDIRECTS: u16 = 0b1100;

/// How a device is connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pci {
    now: Lanes,
    most: Lanes,
    node: String,
}

impl Pci {
    /// Reads `sys` below `root`. What is not told is empty.
    pub(crate) fn read(root: &Path, address: &str) -> Self {
        let folder = folder(root, address);
        let fact = |file: &str| text(&folder.join(file));
        let lanes = |which: &str| Lanes {
            speed: fact(&format!("{which}_link_speed")),
            width: fact(&format!("{which}_link_width")),
        };
        Self {
            now: lanes("current"),
            most: lanes("max"),
            node: fact("numa_node"),
        }
    }
}

impl fmt::Display for Pci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.now.width.is_empty() {
            return f.write_str("link not told");
        }
        let Self { now, most, node } = self;
        write!(
            f,
            "{} lanes at {} now, at most {} at {}; memory node {node}",
            now.width, now.speed, most.width, most.speed
        )
    }
}

/// What a bridge does with requests between two devices below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turning {
    /// They take the short way.
    Direct,
    /// They go up to the processor and come back.
    Redirected,
    /// Who asks may not read it.
    NotTold,
}

/// Reads it from a bridge's configuration.
pub(crate) fn turning(root: &Path, address: &str) -> Turning {
    let config = fs::read(folder(root, address).join("config")).unwrap_or_default();
    let word = |at: usize| {
        let bytes = config.get(at..at + 2)?;
        Some(u16::from_le_bytes([bytes[0], bytes[1]]))
    };
    let mut at = EXTENDED;
    // A list that goes in circles ends here.
    for _ in 0..64 {
        let (Some(id), Some(next)) = (word(at), word(at + 2)) else {
            return Turning::NotTold;
        };
        if id == ACS {
            return match word(at + 6) {
                Some(control) if control & REDIRECTS != 0 => Turning::Redirected,
                Some(_) => Turning::Direct,
                None => Turning::NotTold,
            };
        }
        // The upper twelve bits: where the next one is.
        at = usize::from(next >> 4);
        if at < EXTENDED {
            return Turning::Direct;
        }
    }
    Turning::NotTold
}

fn folder(root: &Path, address: &str) -> PathBuf {
    let folder = root.join("sys/bus/pci/devices");
    // The driver's tools write hexadecimal digits large, the kernel small.
    folder.join(address.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::super::tree::Tree;
    use super::*;

    /// With letters in the address, as the driver writes them; and one that is not there.
    #[test]
    fn a_device_tells_its_lanes() {
        let tree = Tree::new(&["0-3"]);
        tree.gpu("pci0000:a0/0000:ab:00.0", 0);
        let pci = Pci::read(tree.root(), "0000:AB:00.0").to_string();
        assert_eq!(
            pci,
            "16 lanes at 32.0 GT/s PCIe now, at most 16 at 32.0 GT/s PCIe; memory node 0"
        );
        let none = Pci::read(tree.root(), "0000:01:00.0").to_string();
        assert_eq!(none, "link not told");
    }

    /// A list of two capabilities, the second of which is asked for; one without it; and the part that everybody may read.
    #[test]
    fn a_bridge_tells_whether_requests_turn_below_it() {
        let tree = Tree::new(&["0-3"]);
        tree.gpu("pci0000:00/0000:00:05.0", 0);
        let path = tree.root().join("sys/bus/pci/devices/0000:00:05.0/config");
        let mut config = vec![0_u8; 4096];
        // Advanced error reporting, then the services at 0x148.
        config[0x100..0x104].copy_from_slice(&[0x01, 0x00, 0x81, 0x14]);
        config[0x148..0x14c].copy_from_slice(&[0x0d, 0x00, 0x01, 0x00]);
        let told = |config: &[u8]| {
            fs::write(&path, config).unwrap();
            turning(tree.root(), "0000:00:05.0")
        };
        assert_eq!(told(&config), Turning::Direct);
        config[0x14e] = 0x1d;
        assert_eq!(told(&config), Turning::Redirected);
        assert_eq!(told(&config[..64]), Turning::NotTold);
        // A list that ends before.
        config[0x103] = 0;
        config[0x102] = 1;
        assert_eq!(told(&config), Turning::Direct);
        // One that leads back to itself.
        config[0x102..0x104].copy_from_slice(&[0x01, 0x10]);
        assert_eq!(told(&config), Turning::NotTold);
    }
}
