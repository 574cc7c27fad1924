//! Whether a request that matters more is done before others that were posted before it.

use std::borrow::Borrow;
use std::time::Duration;

use kvfabric_transfer::Request;

use super::WAIT;

/// A busy machine may let offloads through before the fetch is posted, or before anybody looks at it.
const ROUNDS: usize = 5;

/// When a request was done, by its agent's clock.
fn done_at(request: &Request) -> Duration {
    request.wait(WAIT).unwrap();
    let telemetry = request.telemetry().unwrap();
    telemetry.posted + telemetry.transfer
}

/// Posts offloads and then a fetch, in rounds until the fetch was done before most of the offloads that it found under way.
/// Done in the order of their posts it is behind all of them in every round, and this fails.
pub(crate) fn overtakes<T: Borrow<Request>>(what: &str, mut post: impl FnMut() -> (Vec<T>, T)) {
    let mut seen = Vec::new();
    for _ in 0..ROUNDS {
        let (offloads, fetch) = post();
        let fetch = fetch.borrow();
        let fetched = done_at(fetch);
        let posted = fetch.telemetry().unwrap().posted;
        let ends = offloads.iter().map(|one| done_at(one.borrow()));
        let found: Vec<_> = ends.filter(|end| *end > posted).collect();
        let before = found.iter().filter(|end| **end < fetched).count();
        if found.len() >= 4 && before <= found.len() / 2 {
            return;
        }
        seen.push((found.len(), before));
    }
    let none: [(usize, usize); 0] = [];
    assert_eq!(
        seen, none,
        "{what}: offloads under way, and done before the fetch"
    );
}
