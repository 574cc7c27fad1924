//! Where a block's bytes can be.

use std::fmt;

/// A level of the memory hierarchy, fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Tier {
    /// The engine's accelerator memory (HBM).
    Device = 0,
    /// Host DRAM.
    Host = 1,
    /// Local NVMe.
    Disk = 2,
    /// The shared object store.
    Object = 3,
}

impl Tier {
    /// Every tier, fastest first.
    pub const ALL: [Self; 4] = [Self::Device, Self::Host, Self::Disk, Self::Object];

    /// The name in metrics, JSON and gRPC answers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "hbm",
            Self::Host => "dram",
            Self::Disk => "nvme",
            Self::Object => "object",
        }
    }

    /// The `medium` that names this tier in vLLM's KV events; `OBJ` is llm-d's name for object stores.
    #[must_use]
    pub const fn medium(self) -> &'static str {
        match self {
            Self::Device => "GPU",
            Self::Host => "CPU",
            Self::Disk => "STORAGE",
            Self::Object => "OBJ",
        }
    }

    /// Whether every pod can reach what is stored there, so that it belongs to no single one.
    #[must_use]
    pub const fn is_shared(self) -> bool {
        matches!(self, Self::Object)
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
