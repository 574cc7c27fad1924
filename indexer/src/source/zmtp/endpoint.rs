//! Where a publisher is, or where publishers come to.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use kvcache_core::{Error, ErrorKind, Result};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixStream};

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

/// The two directions of a stream.
pub(super) type Halves = (
    Box<dyn AsyncRead + Send + Sync + Unpin>,
    Box<dyn AsyncWrite + Send + Sync + Unpin>,
);

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
    pub(super) async fn open(&self) -> Result<Halves> {
        let refused = |error| Error::new(ErrorKind::PeerLost, "connect").with_source(error);
        match self {
            Self::Tcp { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await;
                Ok(halves(stream.map_err(refused)?))
            }
            Self::Ipc(path) => {
                let (reader, writer) = UnixStream::connect(path)
                    .await
                    .map_err(refused)?
                    .into_split();
                Ok((Box::new(reader), Box::new(writer)))
            }
        }
    }
}

fn halves(stream: TcpStream) -> Halves {
    // Without it small requests wait for acknowledgements; nothing else depends on it.
    let _ = stream.set_nodelay(true);
    let (reader, writer) = stream.into_split();
    (Box::new(reader), Box::new(writer))
}

/// Where publishers connect to.
#[derive(Debug)]
pub(crate) struct Listener(TcpListener);

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
            .map(Self)
            .map_err(|error| Error::io(format!("listen for publishers on {endpoint}"), error))
    }

    /// The endpoint with the port that was really bound.
    ///
    /// # Errors
    /// `Io` when the system does not tell.
    pub(crate) fn endpoint(&self) -> Result<Endpoint> {
        let address = self
            .0
            .local_addr()
            .map_err(|error| Error::io("address of a bound listener", error))?;
        Ok(Endpoint::Tcp {
            host: address.ip().to_string(),
            port: address.port(),
        })
    }

    /// The next publisher, and where it comes from.
    ///
    /// # Errors
    /// `Io` when the system cannot accept now.
    pub(crate) async fn accept(&self) -> Result<(Halves, String)> {
        let (stream, from) = self
            .0
            .accept()
            .await
            .map_err(|error| Error::io("accept a publisher", error))?;
        Ok((halves(stream), format!("tcp://{from}")))
    }
}
