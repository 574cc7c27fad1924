//! What the library has to say beside its results, on standard error: a program in C or Python hears of it nowhere else.

use std::io;
use std::sync::Once;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// The variable that says from which level on.
const VARIABLE: &str = "KVFABRIC_LOG";

/// Begins to write, once in a process, unless the program has a subscriber of its own: warnings and errors, or what
/// `KVFABRIC_LOG` says (`off`, `error`, `warn`, `info`, `debug`, `trace`, or by part, as in `warn,kvfabric_transfer=debug`).
pub(crate) fn start() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let wanted = std::env::var(VARIABLE).ok();
        let (targets, complaint) = targets(wanted.as_deref());
        let lines = fmt::layer().with_ansi(false).with_writer(|| Unlocked);
        let begun = tracing_subscriber::registry()
            .with(lines)
            .with(targets)
            .try_init();
        if let (Ok(()), Some(complaint)) = (begun, complaint) {
            tracing::warn!("{complaint}");
        }
    });
}

/// What is written, and what is wrong with what was wanted.
fn targets(wanted: Option<&str>) -> (Targets, Option<String>) {
    let usual = Targets::new().with_default(LevelFilter::WARN);
    let Some(wanted) = wanted.filter(|wanted| !wanted.is_empty()) else {
        return (usual, None);
    };
    // A word alone would be taken for a part of a program, of which all is written.
    let mut words = wanted.split(',').filter(|part| !part.contains('='));
    let why = match words.find(|word| word.parse::<LevelFilter>().is_err()) {
        Some(word) => format!("{word:?} is no level"),
        None => match wanted.parse() {
            Ok(targets) => return (targets, None),
            Err(error) => error.to_string(),
        },
    };
    let complaint = format!("{VARIABLE}: {wanted:?}: {why}; taken as \"warn\"");
    (usual, Some(complaint))
}

/// Standard error without the lock that Rust's own has: in a forked child nobody might let go of that. A line comes as
/// one write.
struct Unlocked;

impl io::Write for Unlocked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::io::write(io::stderr(), bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    /// Nothing, a level, levels by part, and nonsense.
    #[test]
    fn a_level_is_what_was_wanted_or_warn_with_a_complaint() {
        let shown = |wanted, target: &str, level| {
            let (targets, complaint) = targets(wanted);
            assert_eq!(complaint, None, "{wanted:?}");
            targets.would_enable(target, &level)
        };
        for unset in [None, Some("")] {
            assert!(shown(unset, "kvfabric_tiers", Level::WARN));
            assert!(!shown(unset, "kvfabric_tiers", Level::INFO));
        }
        assert!(!shown(Some("off"), "kvfabric_tiers", Level::ERROR));
        let parts = Some("error,kvfabric_transfer=debug");
        assert!(shown(parts, "kvfabric_transfer::agent", Level::DEBUG));
        assert!(!shown(parts, "kvfabric_tiers", Level::WARN));
        for nonsense in ["loud", "warn,loud", "kvfabric_tiers=loud"] {
            let (usual, complaint) = targets(Some(nonsense));
            assert!(usual.would_enable("kvfabric_tiers", &Level::WARN));
            let complaint = complaint.expect("a complaint");
            let named = format!("KVFABRIC_LOG: {nonsense:?}: ");
            assert!(complaint.starts_with(&named), "{complaint}");
        }
    }
}
