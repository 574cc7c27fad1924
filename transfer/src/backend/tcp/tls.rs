//! TLS 1.3 over a connection, with certificates on both sides. Bytes are copied once more than without.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::net::RecvFlags;
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

use super::frame::{MAGIC, encode_welcome};
use crate::sys::memory::{Sink, Span};
use crate::sys::socket;

/// Bytes that are encrypted at once: what one record holds.
const RECORD_BYTES: usize = 16 << 10;

/// Encrypted bytes that may wait for room in the socket.
const UNSENT_BYTES_MAX: usize = 512 << 10;

/// Who an agent is to its peers over TLS, and whom it believes. All of it is PEM.
#[derive(Clone)]
pub struct TlsOptions {
    /// Certificates of the authorities that peers' certificates must come from.
    pub authorities: Vec<u8>,
    /// The agent's own certificate, then those between it and the authority. Its alternative names must contain the agent's
    /// name, as a DNS name.
    pub certificates: Vec<u8>,
    /// The key of the agent's certificate.
    pub key: Vec<u8>,
}

impl TlsOptions {
    /// Reads the three from files.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::Denied`] or [`ErrorKind::Io`] with the path of what cannot be read.
    pub fn from_files(authorities: &Path, certificates: &Path, key: &Path) -> Result<Self> {
        let read =
            |path: &Path| std::fs::read(path).map_err(|e| Error::io(path.display().to_string(), e));
        Ok(Self {
            authorities: read(authorities)?,
            certificates: read(certificates)?,
            key: read(key)?,
        })
    }
}

impl fmt::Debug for TlsOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the key.
        f.debug_struct("TlsOptions").finish_non_exhaustive()
    }
}

/// Both sides' part of it, checked.
#[derive(Clone)]
pub(super) struct TlsConfig {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl TlsConfig {
    /// # Errors
    /// [`ErrorKind::Invalid`] with what is wrong with which of the three.
    pub(super) fn new(options: &TlsOptions) -> Result<Self> {
        let invalid = |what: &'static str| {
            move |error: &dyn fmt::Display| {
                Error::new(ErrorKind::Invalid, format!("TLS {what}: {error}"))
            }
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&options.authorities, "authorities")? {
            roots
                .add(certificate)
                .map_err(|e| invalid("authorities")(&e))?;
        }
        let (roots, chain) = (
            Arc::new(roots),
            certificates(&options.certificates, "certificates")?,
        );
        let key = PrivateKeyDer::from_pem_slice(&options.key).map_err(|e| invalid("key")(&e))?;
        // By name: a library must not decide the process-wide provider.
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = &[&rustls::version::TLS13];
        let own = invalid("certificates and key");
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(versions)
            .and_then(|builder| {
                builder
                    .with_root_certificates(roots.clone())
                    .with_client_auth_cert(chain.clone(), key.clone_key())
            })
            .map_err(|e| own(&e))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|e| invalid("authorities")(&e))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .and_then(|builder| {
                builder
                    .with_client_cert_verifier(verifier)
                    .with_single_cert(chain, key)
            })
            .map_err(|e| own(&e))?;
        // Nobody resumes.
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    /// The side that connects, on a stream that still blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Denied`] with why the peer is not believed, or does not speak TLS.
    pub(super) fn connect(&self, stream: &mut TcpStream, name: &str) -> Result<ClientConnection> {
        let server = ServerName::try_from(name.to_owned()).map_err(|_| {
            let text = format!("agent name {name:?} cannot be in a certificate: it is no DNS name");
            Error::new(ErrorKind::Invalid, text)
        })?;
        let mut session = ClientConnection::new(self.client.clone(), server)
            .map_err(|e| Error::new(ErrorKind::Denied, format!("TLS: {e}")))?;
        while session.is_handshaking() {
            session.complete_io(stream).map_err(|e| not_believed(&e))?;
        }
        Ok(session)
    }

    /// The side that accepts.
    pub(super) fn accept(&self) -> Result<Session> {
        let session = ServerConnection::new(self.server.clone())
            .map_err(|e| Error::new(ErrorKind::Denied, format!("TLS: {e}")))?;
        Ok(Session::new(session.into()))
    }
}

fn certificates(pem: &[u8], what: &str) -> Result<Vec<CertificateDer<'static>>> {
    let invalid =
        |text: &dyn fmt::Display| Error::new(ErrorKind::Invalid, format!("TLS {what}: {text}"));
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| invalid(&e))?;
    if found.is_empty() {
        return Err(invalid(&"no certificate in it"));
    }
    Ok(found)
}

/// Why a handshake failed, seen from the side that connects.
fn not_believed(error: &io::Error) -> Error {
    let tls = error
        .get_ref()
        .and_then(|e| e.downcast_ref::<rustls::Error>());
    let text = match tls {
        Some(rustls::Error::InvalidMessage(_)) => {
            "the peer does not answer in TLS: it is not set up for it".to_owned()
        }
        _ => format!("TLS handshake with the peer: {error}"),
    };
    Error::new(ErrorKind::Denied, text)
}

/// Why there is no welcome after a handshake that this side has finished: the other side may look at certificates later.
/// None if it is only late.
pub(super) fn not_welcome(error: &io::Error) -> Option<Error> {
    if let io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut = error.kind() {
        return None;
    }
    let text = format!("the peer does not accept this agent's certificate: {error}");
    Some(Error::new(ErrorKind::Denied, text))
}

/// The encryption of one connection.
pub(super) struct Session(Mutex<rustls::Connection>);

impl Session {
    pub(super) fn new(mut session: rustls::Connection) -> Self {
        session.set_buffer_limit(Some(UNSENT_BYTES_MAX));
        Self(Mutex::new(session))
    }

    fn lock(&self) -> MutexGuard<'_, rustls::Connection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the certificate that the other side has shown is that of an agent of this name.
    pub(super) fn check_name(&self, name: &str) -> Result<()> {
        let session = self.lock();
        let certificate = session.peer_certificates().and_then(<[_]>::first);
        let denied = |text: &dyn fmt::Display| {
            let text = format!("the certificate is not agent {name:?}'s: {text}");
            Error::new(ErrorKind::Denied, text)
        };
        let certificate = certificate.ok_or_else(|| denied(&"there is none"))?;
        let parsed = ParsedCertificate::try_from(certificate).map_err(|e| denied(&e))?;
        let server = ServerName::try_from(name).map_err(|e| denied(&e))?;
        verify_server_name(&parsed, &server).map_err(|e| denied(&e))
    }

    /// Encrypts as much as may wait, and sends what fits now. How much was taken.
    pub(super) fn send(&self, socket: BorrowedFd<'_>, spans: &[Span<'_>]) -> io::Result<usize> {
        let mut session = self.lock();
        let (mut record, mut taken) = ([0; RECORD_BYTES], 0);
        'spans: for span in spans {
            let mut at = 0;
            while at < span.len() {
                let count = span.copy_out(at, &mut record);
                let accepted = session.writer().write(&record[..count])?;
                (at, taken) = (at + accepted, taken + accepted);
                if accepted < count {
                    break 'spans;
                }
            }
        }
        flush(&mut session, socket)?;
        match taken {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            taken => Ok(taken),
        }
    }

    /// Sends what is encrypted. Whether that is all of it.
    pub(super) fn flush(&self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        flush(&mut self.lock(), socket)
    }

    /// Fills the sinks in order with what is there. Less than they hold means that there is nothing more; 0 is the end.
    pub(super) fn receive(&self, socket: BorrowedFd<'_>, sinks: &[Sink<'_>]) -> io::Result<usize> {
        let mut session = self.lock();
        if session.is_handshaking() {
            turn_away_plain(socket)?;
        }
        let mut filler = Filler {
            sinks,
            at: 0,
            got: 0,
        };
        loop {
            let ended = filler.take(&mut session)?;
            if filler.sinks.is_empty() || ended {
                return Ok(filler.got);
            }
            match session.read_tls(&mut Socket(socket)) {
                Ok(0) => return Ok(filler.got),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && filler.got > 0 => {
                    return Ok(filler.got);
                }
                Err(e) => return Err(e),
            }
            let processed = session.process_new_packets();
            // Also what tells the other side why it is not believed.
            flush(&mut session, socket)?;
            processed.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        }
    }
}

/// Somebody who does not speak TLS is told so in a way that he understands.
fn turn_away_plain(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut first = [0; MAGIC.len()];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let (_, count) = rustix::net::recv(socket, &mut first, flags)?;
    if count < first.len() || first != MAGIC {
        return Ok(());
    }
    let text = "this agent speaks TLS only, and was greeted without";
    let welcome = encode_welcome(&Err(Error::new(ErrorKind::Denied, text)));
    // Whoever is gone needs no answer.
    let _ = socket::send(socket, &[Span::of_bytes(&welcome)]);
    Err(io::Error::new(io::ErrorKind::InvalidData, text))
}

fn flush(session: &mut rustls::Connection, socket: BorrowedFd<'_>) -> io::Result<bool> {
    while session.wants_write() {
        match session.write_tls(&mut Socket(socket)) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Sinks that are not full.
struct Filler<'a> {
    sinks: &'a [Sink<'a>],
    /// Bytes of the first one that are.
    at: usize,
    got: usize,
}

impl Filler<'_> {
    /// Takes what is decrypted. Whether the other side has said that nothing follows.
    fn take(&mut self, session: &mut rustls::Connection) -> io::Result<bool> {
        let mut record = [0; RECORD_BYTES];
        while let Some(sink) = self.sinks.first() {
            let room = (sink.len() - self.at).min(RECORD_BYTES);
            match session.reader().read(&mut record[..room]) {
                Ok(0) => return Ok(true),
                Ok(count) => {
                    sink.copy_in(self.at, &record[..count]);
                    (self.at, self.got) = (self.at + count, self.got + count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(true),
                Err(error) => return Err(error),
            }
            if self.at == sink.len() {
                self.sinks = &self.sinks[1..];
                self.at = 0;
            }
        }
        Ok(false)
    }
}

/// A socket as TLS wants it; never blocks.
struct Socket<'a>(BorrowedFd<'a>);

impl Read for Socket<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        socket::receive(self.0, &[Sink::of_bytes(bytes)])
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        socket::send(self.0, &[Span::of_bytes(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let spans: Vec<Span<'_>> = slices
            .iter()
            .take(socket::SPANS_MAX)
            .map(|slice| Span::of_bytes(slice))
            .collect();
        socket::send(self.0, &spans)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
