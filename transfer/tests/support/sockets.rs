//! Sockets of another process, shut down from outside: what a broken link looks like to both ends.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{OwnedFd, RawFd};
use std::process::Child;

use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketType, getsockname, shutdown, sockopt,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// All sockets of a process, with their numbers there.
fn sockets(child: &Child) -> Vec<(RawFd, OwnedFd)> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).unwrap();
    let folder = format!("/proc/{}/fd", child.id());
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        // It may be closed by now.
        let Ok(target) = std::fs::read_link(entry.path()) else {
            continue;
        };
        if !target.to_string_lossy().starts_with("socket:") {
            continue;
        }
        let number = entry.file_name().to_string_lossy().parse().unwrap();
        if let Ok(socket) = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) {
            found.push((number, socket));
        }
    }
    found.sort_by_key(|(number, _)| *number);
    found
}

fn cut(socket: &OwnedFd) {
    // The other side may have been faster.
    let _ = shutdown(socket, Shutdown::Both);
}

/// Breaks what a process accepted on its `which`-th listening Unix socket, in the order of their numbers; with `door`
/// nobody is let in there any more.
pub(crate) fn cut_unix(child: &Child, which: usize, door: bool) {
    let mut by_name: BTreeMap<Vec<u8>, Vec<(RawFd, OwnedFd)>> = BTreeMap::new();
    for (number, socket) in sockets(child) {
        let family = sockopt::socket_domain(&socket).unwrap();
        if family != AddressFamily::UNIX
            || sockopt::socket_type(&socket).unwrap() != SocketType::SEQPACKET
        {
            continue;
        }
        let name = SocketAddrUnix::try_from(getsockname(&socket).unwrap()).unwrap();
        let name = name.abstract_name().unwrap_or_default().to_vec();
        by_name.entry(name).or_default().push((number, socket));
    }
    let listens = |socket: &OwnedFd| sockopt::socket_acceptconn(socket).unwrap();
    let mut doors: Vec<_> = by_name
        .into_values()
        .filter_map(|sockets| {
            let door = sockets.iter().find(|(_, socket)| listens(socket))?.0;
            Some((door, sockets))
        })
        .collect();
    doors.sort_by_key(|(number, _)| *number);
    for (_, socket) in &doors[which].1 {
        if door || !listens(socket) {
            cut(socket);
        }
    }
}

/// Breaks all internet connections of a process but those at this address.
pub(crate) fn cut_all_but(child: &Child, address: SocketAddr) {
    for (_, socket) in sockets(child) {
        let name = getsockname(&socket).unwrap();
        // A library that listens need not bear that it stops.
        let connected = !sockopt::socket_acceptconn(&socket).unwrap();
        if connected && SocketAddr::try_from(name).is_ok_and(|name| name != address) {
            cut(&socket);
        }
    }
}
