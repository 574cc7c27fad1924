//! What the figures were measured on.

use std::fs;

use serde::{Deserialize, Serialize};

/// The machine and how busy it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Host {
    /// The processor's name.
    pub(crate) cpu: String,
    /// Hardware threads that this process may use.
    pub(crate) cores: usize,
    /// Memory of the machine.
    pub(crate) memory_bytes: u64,
    /// The kernel's release.
    pub(crate) kernel: String,
    /// Threads that ran or waited to, the mean of the minute before the run.
    pub(crate) load: f64,
}

impl Host {
    /// Reads what `/proc` says; what it does not say is `unknown` or 0.
    pub(crate) fn read() -> Self {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self {
            cpu: field(&text("/proc/cpuinfo"), "model name")
                .unwrap_or("unknown")
                .to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kibibytes(&text("/proc/meminfo"), "MemTotal"),
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: text("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or(0.0),
        }
    }
}

/// Bytes of memory that this process has in use now.
pub(crate) fn resident_bytes() -> u64 {
    kibibytes(
        &fs::read_to_string("/proc/self/status").unwrap_or_default(),
        "VmRSS",
    )
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn kibibytes(text: &str, name: &str) -> u64 {
    field(text, name)
        .and_then(|value| value.strip_suffix(" kB")?.trim().parse::<u64>().ok())
        .map_or(0, |count| count * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads this machine: every Linux tells its memory, its kernel and this process's size.
    #[test]
    fn the_host_is_described() {
        let host = Host::read();
        assert!(host.cores >= 1 && host.memory_bytes > 0 && !host.kernel.is_empty());
        assert!(resident_bytes() > 0 && resident_bytes() < host.memory_bytes);
    }

    /// Cuts a value out of text as the kernel writes it.
    #[test]
    fn a_field_of_proc_is_found_by_its_whole_name() {
        let text = "MemTotalX: 1 kB\nMemTotal:       12 kB\n";
        assert_eq!(kibibytes(text, "MemTotal"), 12 * 1024);
        assert_eq!(kibibytes(text, "Mem"), 0);
    }
}
