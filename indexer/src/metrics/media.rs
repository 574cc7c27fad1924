//! Events about media that nobody has told of: by name, so that an operator can.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::names::add;

/// The most unknown media that have series of their own: publishers name them, and they may name anything.
pub(crate) const MEDIA_MAX: usize = 64;
/// The longest name that has a series of its own, in bytes.
const NAME_MAX: usize = 64;
/// What stands for all others.
const OTHER: &str = "other";

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct MediumLabel {
    medium: String,
}

/// How often which unknown medium was named.
#[derive(Default)]
pub(super) struct MediaMetrics {
    events: Family<MediumLabel, Counter>,
    names: Mutex<BTreeSet<String>>,
}

impl MediaMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let to = registry.sub_registry_with_prefix("kvfabric_indexer");
        let help = "Events about media that are neither known nor configured";
        add(to, "unknown_medium_events", help, &self.events);
        // So that a rate has a beginning.
        drop(self.events.get_or_create(&MediumLabel {
            medium: OTHER.to_owned(),
        }));
    }

    /// Counts events about an unknown medium; true when it has not been named before.
    pub(super) fn unknown(&self, medium: &str, events: u32) -> bool {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let is_plain =
            medium.len() <= NAME_MAX && medium.bytes().all(|byte| byte.is_ascii_graphic());
        let has_own = is_plain && (names.contains(medium) || names.len() < MEDIA_MAX);
        let medium = if has_own { medium } else { OTHER };
        let label = MediumLabel {
            medium: medium.to_owned(),
        };
        self.events.get_or_create(&label).inc_by(events.into());
        has_own && names.insert(medium.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    /// More names than may have series, one of them twice, and some that are no names.
    #[test]
    fn a_publisher_cannot_make_series_without_end() {
        let metrics = MediaMetrics::default();
        assert!(metrics.unknown("POOL-0", 2));
        assert!(!metrics.unknown("POOL-0", 1));
        for name in 1..2 * MEDIA_MAX {
            metrics.unknown(&format!("POOL-{name}"), 1);
        }
        assert!(!metrics.unknown("two words", 1));
        assert!(!metrics.unknown(&"x".repeat(NAME_MAX + 1), 1));
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let mut page = String::new();
        encode(&mut page, &registry).unwrap();
        let series: Vec<_> = page.lines().filter(|line| line.contains('{')).collect();
        assert_eq!(series.len(), MEDIA_MAX + 1, "{page}");
        let named = |name: &str, events: usize| {
            let line = format!("{{medium=\"{name}\"}} {events}");
            assert!(page.contains(&line), "{page}");
        };
        named("POOL-0", 3);
        named("POOL-63", 1);
        named(OTHER, MEDIA_MAX + 2);
    }
}
