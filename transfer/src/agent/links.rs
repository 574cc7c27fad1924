//! The ways to a peer: which are connected, which were refused, and which were left because they failed or stood still.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use kvcache_core::{Error, Result};

use super::own::{not_reached, unmoved};
use super::path::PathReport;
use crate::backend::{Backend, Channel, NOT_WANTED};
use crate::descriptor::Target;
use crate::plan::Plan;

/// How long a way that failed is left alone at first. It doubles with each failure that follows soon.
const BACK_OFF_FIRST: Duration = Duration::from_secs(1);

/// The longest that a way is left alone.
const BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// One way to the peer.
struct Link {
    name: &'static str,
    state: LinkState,
    left: Option<Left>,
}

enum LinkState {
    Untried,
    Connected(Arc<dyn Channel>),
    Refused(String),
}

/// That a way which had been used was left.
#[derive(Clone)]
struct Left {
    why: String,
    /// Others go first until then.
    until: Instant,
    back_off: Duration,
    /// Somebody tries it again, or has since.
    is_tried: bool,
}

impl Link {
    fn is_left(&self, now: Instant) -> bool {
        self.left.as_ref().is_some_and(|left| now < left.until)
    }

    fn usable(&self) -> Option<&Arc<dyn Channel>> {
        match &self.state {
            LinkState::Connected(channel) if channel.check().is_ok() => Some(channel),
            _ => None,
        }
    }

    /// Why it is not the one in use; none if nothing was found wrong with it.
    fn reason(&self, plan: &Plan) -> Option<String> {
        if !plan.wants(self.name) {
            return Some(NOT_WANTED.to_owned());
        }
        if let Some(left) = &self.left
            && let Some(wait) = left.until.checked_duration_since(Instant::now())
        {
            let seconds = wait.as_secs() + 1;
            return Some(format!("left: {}; tried again in {seconds} s", left.why));
        }
        match &self.state {
            LinkState::Untried => Some("not tried".to_owned()),
            LinkState::Refused(reason) => Some(reason.clone()),
            LinkState::Connected(channel) => {
                let lost = channel.check().err().map(|error| error.to_string());
                lost.or_else(|| refusal(&**channel, plan))
            }
        }
    }
}

/// The ways to a peer, best first.
#[derive(Default)]
pub(super) struct Links {
    all: RwLock<Vec<Link>>,
    /// Whether any was left, so that nobody has to ask for the time as long as none was.
    any_left: AtomicBool,
}

impl Links {
    fn read(&self) -> RwLockReadGuard<'_, Vec<Link>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<Link>> {
        self.all.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn any_left(&self) -> bool {
        self.any_left.load(Ordering::Acquire)
    }

    /// The best connection that serves the plan, other than `but` and those whose way was left.
    pub(super) fn connected(
        &self,
        plan: &Plan,
        but: Option<&Arc<dyn Backend>>,
    ) -> Option<Arc<dyn Channel>> {
        let now = self.any_left().then(Instant::now);
        let links = self.read();
        let here = links
            .iter()
            .filter(|link| now.is_none_or(|now| !link.is_left(now)));
        let serves = |channel: &&Arc<dyn Channel>| {
            refusal(&***channel, plan).is_none() && !is_same(channel, but)
        };
        here.filter_map(Link::usable).find(serves).cloned()
    }

    /// The connection of a way, if it can be used.
    pub(super) fn usable(&self, position: usize) -> Option<Arc<dyn Channel>> {
        self.read().get(position)?.usable().cloned()
    }

    /// Whether others go before this way for now.
    pub(super) fn is_left(&self, position: usize) -> bool {
        self.any_left()
            && self
                .read()
                .get(position)
                .is_some_and(|link| link.is_left(Instant::now()))
    }

    /// All ways that there are, in order.
    pub(super) fn know(&self, names: impl ExactSizeIterator<Item = &'static str>) {
        if self.read().len() >= names.len() {
            return;
        }
        let mut links = self.write();
        let known = links.len();
        links.extend(names.skip(known).map(|name| Link {
            name,
            state: LinkState::Untried,
            left: None,
        }));
    }

    /// What came of connecting over a way, which is known.
    pub(super) fn set(&self, position: usize, connected: Result<&Arc<dyn Channel>, &Error>) {
        let state = match connected {
            Ok(channel) => LinkState::Connected(channel.clone()),
            Err(reason) => LinkState::Refused(reason.to_string()),
        };
        let mut links = self.write();
        let Some(link) = links.get_mut(position) else {
            return;
        };
        let before = std::mem::replace(&mut link.state, state);
        drop(links);
        // Without the lock: the last user of a connection ends it.
        drop(before);
    }

    /// A connection failed or stands still: others go before its way for a while. Whether it was still that way's.
    pub(super) fn leave(&self, failed: &Arc<dyn Backend>, why: &str) -> bool {
        let now = Instant::now();
        let mut links = self.write();
        let link = links.iter_mut().find(|link| match &link.state {
            LinkState::Connected(channel) => is_same(channel, Some(failed)),
            _ => false,
        });
        let Some(link) = link else {
            return false;
        };
        // All that was under way fails at once, and counts once.
        if link.is_left(now) {
            return true;
        }
        let back_off = match &link.left {
            Some(left) if now < left.until + BACK_OFF_MAX => (left.back_off * 2).min(BACK_OFF_MAX),
            _ => BACK_OFF_FIRST,
        };
        tracing::warn!(way = link.name, why, ?back_off, "a way to a peer is left");
        link.left = Some(Left {
            why: why.to_owned(),
            until: now + back_off,
            back_off,
            is_tried: false,
        });
        self.any_left.store(true, Ordering::Release);
        true
    }

    /// A way that was left is used all the same: there is no other.
    pub(super) fn take_back(&self, position: usize) {
        if let Some(link) = self.write().get_mut(position)
            && let Some(left) = &mut link.left
        {
            left.until = left.until.min(Instant::now());
        }
    }

    /// The ways better than the one in use that were left, are not connected, and whose time has come: for whoever asks
    /// first.
    pub(super) fn due(&self, used: &Arc<dyn Channel>) -> Vec<usize> {
        if !self.any_left() {
            return Vec::new();
        }
        let now = Instant::now();
        let is_due = |link: &Link| {
            let due = |left: &Left| left.until <= now && !left.is_tried;
            link.left.as_ref().is_some_and(due) && link.usable().is_none()
        };
        let better =
            |link: &Link| !matches!(&link.state, LinkState::Connected(c) if Arc::ptr_eq(c, used));
        let links = self.read();
        if !links.iter().take_while(|link| better(link)).any(is_due) {
            return Vec::new();
        }
        drop(links);
        let mut links = self.write();
        let count = links.iter().take_while(|link| better(link)).count();
        let mut found = Vec::new();
        for (position, link) in links.iter_mut().take(count).enumerate() {
            if is_due(link)
                && let Some(left) = &mut link.left
            {
                left.is_tried = true;
                found.push(position);
            }
        }
        found
    }

    /// A way that was left was tried again in vain: it is left alone for longer.
    pub(super) fn leave_longer(&self, position: usize, why: &str) {
        if let Some(link) = self.write().get_mut(position)
            && let Some(left) = &mut link.left
        {
            let back_off = (left.back_off * 2).min(BACK_OFF_MAX);
            *left = Left {
                why: why.to_owned(),
                until: Instant::now() + back_off,
                back_off,
                is_tried: false,
            };
        }
    }

    /// Something new is known of the peer: what was refused is tried again.
    pub(super) fn forgive(&self) {
        for link in self.write().iter_mut() {
            if matches!(link.state, LinkState::Refused(_)) {
                (link.state, link.left) = (LinkState::Untried, None);
            }
        }
    }

    /// Forgets all ways: those that were connected.
    pub(super) fn take(&self) -> Vec<Arc<dyn Channel>> {
        let links = std::mem::take(&mut *self.write());
        self.any_left.store(false, Ordering::Release);
        let states = links.into_iter().map(|link| link.state);
        states
            .filter_map(|state| match state {
                LinkState::Connected(channel) => Some(channel),
                _ => None,
            })
            .collect()
    }

    /// What was chosen for a plan, and what kept better ways from being chosen.
    pub(super) fn explain(&self, chosen: Result<Arc<dyn Channel>>, plan: &Plan) -> PathReport {
        let links = self.read();
        let mut refused = Vec::new();
        for link in links.iter() {
            if let (Ok(chosen), LinkState::Connected(channel)) = (&chosen, &link.state)
                && Arc::ptr_eq(chosen, channel)
            {
                break;
            }
            refused.extend(link.reason(plan).map(|reason| (link.name, reason)));
        }
        PathReport {
            backend: chosen.as_ref().ok().map(|channel| channel.name()),
            connections: chosen
                .as_ref()
                .map_or_else(|_| Vec::new(), |channel| channel.connections()),
            why: chosen.map_or_else(|_| String::new(), |channel| channel.detail()),
            refused,
        }
    }
}

/// Whether both are the same connection.
pub(super) fn is_same(channel: &Arc<dyn Channel>, other: Option<&Arc<dyn Backend>>) -> bool {
    other.is_some_and(|other| std::ptr::addr_eq(Arc::as_ptr(channel), Arc::as_ptr(other)))
}

/// Why a channel cannot carry this plan; none if it can.
pub(super) fn refusal(channel: &dyn Channel, plan: &Plan) -> Option<String> {
    let kinds = channel.capabilities();
    let far = |target: &Target| match target {
        Target::Local(_) => None,
        Target::Remote(region) => {
            let reached = not_reached(region, kinds.remote).map_or(Ok(()), Err);
            reached.and_then(|()| channel.reaches(region)).err()
        }
    };
    let unable = channel.refusal(plan);
    unable
        .or_else(|| unmoved(&plan.local, kinds.local))
        .or_else(|| plan.remote.iter().find_map(far))
}
