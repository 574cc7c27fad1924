//! Endpoints as configurations and registrations name them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use kvcache_core::{Error, ErrorKind, Result};
use tokio::net::{TcpListener, TcpStream, UnixStream};

use super::{Halves, Listener, halves, unix_halves};

/// The longest path of a unix socket that systems take.
const PATH_BYTES_MAX: usize = 107;

/// An endpoint as configurations and registrations name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `tcp://HOST:PORT`
    Tcp {
        /// A name or an address, without brackets.
        host: String,
        port: u16,
    },
    /// `ipc://PATH`
    Ipc(PathBuf),
}

impl FromStr for Endpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let malformed = || {
            Error::invalid(
                "endpoint",
                format!("{text:?}"),
                "tcp://HOST:PORT or ipc://PATH",
            )
        };
        if let Some(path) = text.strip_prefix("ipc://") {
            let is_path = !path.is_empty() && path.len() <= PATH_BYTES_MAX;
            return is_path
                .then(|| Self::Ipc(path.into()))
                .ok_or_else(malformed);
        }
        let address = text.strip_prefix("tcp://").ok_or_else(malformed)?;
        let (host, port) = address.rsplit_once(':').ok_or_else(malformed)?;
        let bare = host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let host = bare.unwrap_or(host);
        let is_host = !host.is_empty()
            && !host.contains(['/', '[', ']'])
            && (bare.is_some() || !host.contains(':'));
        match port.parse() {
            Ok(port) if is_host => Ok(Self::Tcp {
                host: host.to_owned(),
                port,
            }),
            _ => Err(malformed()),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Ipc(path) => write!(f, "ipc://{}", path.display()),
        }
    }
}

impl Endpoint {
    /// # Errors
    /// `PeerLost` when nobody listens there.
    pub(in crate::zmtp) async fn open(&self) -> Result<Halves> {
        let refused = |error| Error::new(ErrorKind::PeerLost, "connect").with_source(error);
        match self {
            Self::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await;
                Ok(halves(stream.map_err(refused)?))
            }
            Self::Ipc(path) => {
                let stream = UnixStream::connect(path).await;
                Ok(unix_halves(stream.map_err(refused)?))
            }
        }
    }
}

impl Listener {
    /// Binds a TCP endpoint; `*` stands for every interface, port 0 for any free one.
    ///
    /// # Errors
    /// `Invalid` for an endpoint of another kind; `Io` naming it when it cannot be bound.
    pub(crate) async fn bind(endpoint: &Endpoint) -> Result<Self> {
        let Endpoint::Tcp { host, port } = endpoint else {
            return Err(Error::invalid("endpoint", endpoint, "tcp://HOST:PORT"));
        };
        let host = if host == "*" { "0.0.0.0" } else { host };
        let bound = TcpListener::bind((host, *port)).await;
        bound
            .map(Self::Tcp)
            .map_err(|error| Error::io(format!("listen for publishers on {endpoint}"), error))
    }

    /// The endpoint with the port that was really bound.
    ///
    /// # Errors
    /// `Io` when the system does not tell.
    pub(crate) fn endpoint(&self) -> Result<Endpoint> {
        let address = match self {
            Self::Tcp(listener) => listener.local_addr(),
            Self::Ipc(_) => Err(std::io::ErrorKind::Unsupported.into()),
        };
        let address = address.map_err(|error| Error::io("address of a bound listener", error))?;
        Ok(Endpoint::Tcp {
            host: address.ip().to_string(),
            port: address.port(),
        })
    }
}
