//! Whether files go to memory of GPUs past host memory.

use kvcache_core::Result;
use kvfabric_transfer::{StorageBounce, StorageReport, storage_probe};

use super::{Finding, State};

const WHAT: &str = "gpu: files past host memory (cuFile)";

pub(super) fn look() -> Finding {
    finding(storage_probe())
}

fn finding(probe: Result<StorageReport>) -> Finding {
    let report = match probe {
        Ok(report) => report,
        Err(error) => return Finding::new(WHAT, State::Absent, error.context().to_owned(), ""),
    };
    let (found, advice) = match report.bounce {
        StorageBounce::Never if report.reached.is_empty() => (
            format!("{report}, and its compatibility mode is off"),
            "it refuses all files, which then go through the agent's own pinned memory: nvidia_fs, or PCI P2PDMA of kernel and driver (use_pci_p2pdma in cufile.json)",
        ),
        StorageBounce::Never => {
            return Finding::ok(WHAT, format!("{report}; compatibility mode off"));
        }
        StorageBounce::Allowed => (
            format!("{report}; compatibility mode allowed"),
            "files go through the agent's own pinned memory, as cuFile may bounce and not tell: CUFILE_ALLOW_COMPAT_MODE=false, and storage \"direct\"",
        ),
        StorageBounce::Always => (
            format!("{report}; compatibility mode always"),
            "costs a copy through host memory: nvidia_fs, or PCI P2PDMA of kernel and driver (use_pci_p2pdma in cufile.json), and no force_compat_mode",
        ),
    };
    Finding::new(WHAT, State::Hint, found, advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only what goes past host memory for sure is called good.
    #[test]
    fn what_may_bounce_is_no_good_finding() {
        let report = |reached: &[&'static str], bounce| {
            finding(Ok(StorageReport {
                version: Some((1, 14)),
                module: Some((2, 22)),
                reached: reached.to_vec(),
                bounce,
            }))
        };
        let good = report(&["NVMe"], StorageBounce::Never);
        assert_eq!(good.state, State::Ok);
        assert_eq!(
            good.found,
            "cuFile 1.14, nvidia-fs 2.22, NVMe; compatibility mode off"
        );
        for (reached, bounce, words) in [
            (&[][..], StorageBounce::Never, "use_pci_p2pdma"),
            (
                &["NVMe"],
                StorageBounce::Allowed,
                "CUFILE_ALLOW_COMPAT_MODE=false",
            ),
            (&["NVMe"], StorageBounce::Always, "force_compat_mode"),
        ] {
            let finding = report(reached, bounce);
            assert_eq!(finding.state, State::Hint, "{}", finding.found);
            assert!(finding.advice.contains(words), "{}", finding.advice);
        }
    }
}
