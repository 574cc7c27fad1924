//! Where a publisher is, or where publishers come to.

use kvcache_core::{Error, Result};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

#[cfg(feature = "server")]
pub(crate) use place::Endpoint;

#[cfg(feature = "server")]
mod place;

/// The two directions of a stream.
pub(crate) type Halves = (
    Box<dyn AsyncRead + Send + Sync + Unpin>,
    Box<dyn AsyncWrite + Send + Sync + Unpin>,
);

fn halves(stream: TcpStream) -> Halves {
    // Without it small requests wait for acknowledgements; nothing else depends on it.
    let _ = stream.set_nodelay(true);
    let (reader, writer) = stream.into_split();
    (Box::new(reader), Box::new(writer))
}

fn unix_halves(stream: UnixStream) -> Halves {
    let (reader, writer) = stream.into_split();
    (Box::new(reader), Box::new(writer))
}

/// Where peers connect to.
#[derive(Debug)]
pub(crate) enum Listener {
    /// On a port.
    Tcp(TcpListener),
    /// On a path.
    #[cfg_attr(not(feature = "client"), allow(dead_code))]
    Ipc(UnixListener),
}

impl Listener {
    /// The next peer, and where it comes from.
    ///
    /// # Errors
    /// `Io` when the system cannot accept now.
    pub(crate) async fn accept(&self) -> Result<(Halves, String)> {
        let failed = |error| Error::io("accept a peer", error);
        match self {
            Self::Tcp(listener) => {
                let (stream, from) = listener.accept().await.map_err(failed)?;
                Ok((halves(stream), format!("tcp://{from}")))
            }
            Self::Ipc(listener) => {
                let (stream, _) = listener.accept().await.map_err(failed)?;
                // Those who connect have no path.
                Ok((unix_halves(stream), "ipc://".to_owned()))
            }
        }
    }
}
