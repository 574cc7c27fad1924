//! Parts of requests that go to peers by requests of their own.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kvcache_core::Result;

use super::{Priority, Request, RequestCore, Route, check_notification};
use crate::agent::{AgentCore, PeerCore};
use crate::plan::Plan;

impl Request {
    /// A part of another request that moves and is paced, too: to a peer, with what to tell it afterwards, and a deadline.
    pub(crate) fn half(
        agent: &Arc<AgentCore>,
        peer: &Arc<PeerCore>,
        (plan, priority): (Plan, Priority),
        (notification, deadline): (Option<Bytes>, Duration),
    ) -> Result<Self> {
        check_notification(notification.as_ref())?;
        let ends = [plan.extents.len()];
        let core = RequestCore::new(plan, &ends, priority, agent, Some(peer));
        Ok(Self {
            core: Arc::new(core.unpaced()),
            agent: agent.clone(),
            route: Route::Peer(peer.clone()),
            notification,
            deadline,
        })
    }
}
