//! What is told of the way to a peer.

use std::net::SocketAddr;

/// One of several network connections to a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionReport {
    /// Where it leads.
    pub to: SocketAddr,
    /// Bytes sent so far, requests and answers included.
    pub sent: u64,
    /// Bytes received so far, likewise.
    pub received: u64,
    /// Why it can't be used any more; none if it can.
    pub lost: Option<String>,
}

/// Which way bytes go to a peer, and why not another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathReport {
    /// The backend in use; none when the peer can't be reached.
    pub backend: Option<&'static str>,
    /// What is worth knowing about the connection; empty without one.
    pub why: String,
    /// The network connections of the backend in use; empty for those that have none to tell of.
    pub connections: Vec<ConnectionReport>,
    /// Backends that would have been preferred, with what kept them from being used.
    pub refused: Vec<(&'static str, String)>,
}
