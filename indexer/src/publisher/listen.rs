//! Binds the sockets of a publisher before its thread starts, so that errors name the address and free ports are known.

use std::io::ErrorKind as IoKind;
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use kvcache_core::{Error, ErrorKind, Result};

use crate::zmtp::Listener;

/// A bound endpoint; unix sockets are unlinked when it is dropped.
pub(super) enum Listening {
    Tcp(TcpListener),
    Ipc(UnixListener, PathBuf),
}

impl Listening {
    /// Binds `tcp://HOST:PORT` (`*` for every interface, port 0 for any free one) or `ipc://PATH`.
    pub(super) fn bind(endpoint: &str) -> Result<Self> {
        if let Some(address) = endpoint.strip_prefix("tcp://") {
            let (host, port) = split_address(endpoint, address)?;
            let host = if host == "*" { "0.0.0.0" } else { host };
            let listener =
                TcpListener::bind((host, port)).map_err(|error| bind_error(endpoint, error))?;
            Ok(Self::Tcp(listener))
        } else if let Some(path) = endpoint
            .strip_prefix("ipc://")
            .filter(|path| !path.is_empty())
        {
            let listener = bind_unix(Path::new(path)).map_err(|e| bind_error(endpoint, e))?;
            Ok(Self::Ipc(listener, PathBuf::from(path)))
        } else {
            let accepted = "tcp://HOST:PORT or ipc://PATH";
            Err(Error::invalid(
                "publisher endpoint",
                format!("{endpoint:?}"),
                accepted,
            ))
        }
    }

    /// The endpoint as a subscriber connects to it.
    pub(super) fn endpoint(&self) -> Result<String> {
        match self {
            Self::Tcp(listener) => listener
                .local_addr()
                .map(|address| format!("tcp://{address}"))
                .map_err(|error| Error::io("address of a bound publisher", error)),
            Self::Ipc(_, path) => Ok(format!("ipc://{}", path.display())),
        }
    }

    /// The same socket, for a runtime to accept on.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn share(&self) -> std::io::Result<Listener> {
        match self {
            Self::Tcp(listener) => {
                let listener = listener.try_clone()?;
                listener.set_nonblocking(true)?;
                tokio::net::TcpListener::from_std(listener).map(Listener::Tcp)
            }
            Self::Ipc(listener, _) => {
                let listener = listener.try_clone()?;
                listener.set_nonblocking(true)?;
                tokio::net::UnixListener::from_std(listener).map(Listener::Ipc)
            }
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Self::Ipc(_, path) = self {
            // Somebody may have removed it already; nothing is lost then.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn split_address<'a>(endpoint: &str, address: &'a str) -> Result<(&'a str, u16)> {
    address
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse().ok()?)))
        .map(|(host, port)| (host.trim_start_matches('[').trim_end_matches(']'), port))
        .filter(|(host, _)| !host.is_empty())
        .ok_or_else(|| {
            Error::invalid(
                "publisher endpoint",
                format!("{endpoint:?}"),
                "tcp://HOST:PORT",
            )
        })
}

fn bind_error(endpoint: &str, error: std::io::Error) -> Error {
    let context = match error.kind() {
        IoKind::AddrInUse => format!("bind publisher to {endpoint}: the address is in use"),
        _ => format!("bind publisher to {endpoint}"),
    };
    Error::new(ErrorKind::Io, context).with_source(error)
}

/// Binds a unix socket; a file left behind by a dead process is replaced, a live listener is not.
fn bind_unix(path: &Path) -> std::io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == IoKind::AddrInUse => match UnixStream::connect(path) {
            Err(refused) if refused.kind() == IoKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)
            }
            _ => Err(error),
        },
        bound => bound,
    }
}
