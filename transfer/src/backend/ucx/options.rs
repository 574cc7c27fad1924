//! What UCX is told.

/// How UCX is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UcxOptions {
    /// Settings of UCX, by their names without `UCX_`, such as `("TLS", "rc,ud,self")`; they win over the environment's.
    /// `ucx_info -c` lists them.
    pub settings: Vec<(String, String)>,
}

/// UCX caches registrations with the device beyond the life of the memory, and watches the C library for memory that goes.
/// It does not see memory that is given back by system calls, as ours is: what is mapped there next would be read and
/// written in pages that are gone. So each region is registered for itself, which we do once anyway. 1.13 has the first
/// setting of this, later ones the second; each with its name in the environment.
const UNCACHED: [(&str, &str, &str); 2] = [
    ("REG_METHODS", "IB_REG_METHODS", "direct"),
    ("RCACHE_ENABLE", "RCACHE_ENABLE", "n"),
];

impl UcxOptions {
    /// The settings, with ours where nobody has said otherwise; `version` is UCX's, `said` tells what the environment has.
    pub(super) fn complete(
        &self,
        version: &str,
        said: impl Fn(&str) -> bool,
    ) -> Vec<(String, String)> {
        let (name, outside, value) = UNCACHED[usize::from(!version.starts_with("1.13."))];
        let mut settings = self.settings.clone();
        if !said(outside) && settings.iter().all(|(known, _)| known != name) {
            settings.push((name.to_owned(), value.to_owned()));
        }
        settings
    }
}

/// Whether this system has RDMA devices: without, UCX would warn of settings that nothing uses.
pub(super) fn has_rdma() -> bool {
    let devices = std::fs::read_dir("/sys/class/infiniband");
    devices.is_ok_and(|mut devices| devices.next().is_some())
}

/// Whether the environment has a setting of UCX.
pub(super) fn is_in_environment(name: &str) -> bool {
    std::env::var_os(format!("UCX_{name}")).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each version has its name of it; what was said, in either place, stays.
    #[test]
    fn registrations_are_not_cached_unless_somebody_says_so() {
        let none = UcxOptions::default();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let direct = [pair("REG_METHODS", "direct")];
        assert_eq!(none.complete("1.13.1", |_| false), direct);
        let newer = [pair("RCACHE_ENABLE", "n")];
        assert_eq!(none.complete("1.22.0", |_| false), newer);
        assert!(none.complete("1.13.1", |_| true).is_empty());
        let settings = vec![pair("REG_METHODS", "rcache")];
        let said = UcxOptions {
            settings: settings.clone(),
        };
        assert_eq!(said.complete("1.13.1", |_| false), settings);
    }
}
