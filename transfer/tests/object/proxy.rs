//! An HTTP proxy before an object store that fails it in every way a network and a server do.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::PATIENCE;

/// What becomes of one request.
pub(crate) enum Action {
    /// It is passed on, and its answer back.
    Pass,
    /// The proxy answers so, and the server does not hear of it.
    Answer(&'static str),
    /// So many bytes of its body are passed on; then this is done, and both connections end.
    CutRequest(usize, Box<dyn FnOnce() + Send>),
    /// So many bytes of the answer's body are passed back; then this is done, and both connections end.
    CutAnswer(usize, Box<dyn FnOnce() + Send>),
    /// The answer's body comes in pieces of so many bytes, with a pause after each.
    Trickle(usize, Duration),
    /// The last byte of its body is changed.
    Damage,
}

/// A request's first line and headers.
pub(crate) struct Head(String);

impl Head {
    pub(crate) fn is(&self, method: &str) -> bool {
        self.0.starts_with(&format!("{method} "))
    }

    /// Whether a line begins so, in lower case.
    pub(crate) fn has(&self, line: &str) -> bool {
        self.0.to_lowercase().contains(&format!("\r\n{line}"))
    }

    /// Whether the target has this in it.
    pub(crate) fn asks(&self, text: &str) -> bool {
        self.line().contains(text)
    }

    /// Method and target.
    pub(crate) fn line(&self) -> &str {
        self.0.split(" HTTP/").next().unwrap_or_default()
    }

    fn length(&self) -> usize {
        let text = self.0.to_lowercase();
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix("content-length:"));
        value.map_or(0, |value| value.trim().parse().expect("a length"))
    }
}

type Rule = Box<dyn FnMut(&Head) -> Action + Send>;

struct Shared {
    server: Mutex<SocketAddr>,
    rule: Mutex<Rule>,
    /// What was asked for, and when.
    log: Mutex<Vec<(String, Instant)>>,
    stopped: Mutex<bool>,
    stop: Condvar,
    closed: AtomicBool,
    tls: Option<Arc<rustls::ServerConfig>>,
}

/// Ends with the test.
pub(crate) struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

impl Proxy {
    /// Passes everything on to `server`.
    pub(crate) fn new(server: SocketAddr) -> Self {
        Self::start(server, None)
    }

    /// Speaks TLS as `localhost`.
    pub(crate) fn with_tls(server: SocketAddr) -> Self {
        let certificates = CertificateDer::pem_slice_iter(include_bytes!("../tls/store.pem"));
        let certificates: Result<Vec<_>, _> = certificates.collect();
        let key = PrivateKeyDer::from_pem_slice(include_bytes!("../tls/store.key")).expect("key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(certificates.expect("certificates"), key)
            .expect("certificate");
        Self::start(server, Some(Arc::new(config)))
    }

    fn start(server: SocketAddr, tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("port");
        let address = listener.local_addr().expect("address");
        let shared = Arc::new(Shared {
            server: Mutex::new(server),
            rule: Mutex::new(Box::new(|_| Action::Pass)),
            log: Mutex::default(),
            stopped: Mutex::new(false),
            stop: Condvar::new(),
            closed: AtomicBool::new(false),
            tls,
        });
        let of_thread = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming() {
                if of_thread.closed.load(Ordering::Acquire) {
                    return;
                }
                let (Ok(client), shared) = (client, Arc::clone(&of_thread)) else {
                    return;
                };
                // A connection that was to fail, did.
                thread::spawn(move || drop(accept(client, &shared)));
            }
        });
        Self { address, shared }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// What becomes of requests from now on.
    pub(crate) fn rule(&self, rule: impl FnMut(&Head) -> Action + Send + 'static) {
        *self.shared.rule.lock().expect("rule") = Box::new(rule);
    }

    /// Passes requests on to another server from now on.
    pub(crate) fn redirect(&self) -> impl Fn(SocketAddr) + Send + 'static {
        let shared = Arc::clone(&self.shared);
        move |server| *shared.server.lock().expect("server") = server
    }

    /// The requests so far that begin with this method and have this in their target, and when they came.
    pub(crate) fn seen(&self, method: &str, text: &str) -> Vec<Instant> {
        let log = self.shared.log.lock().expect("log");
        log.iter()
            .filter(|(line, _)| line.starts_with(method) && line.contains(text))
            .map(|(_, when)| *when)
            .collect()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        *self.shared.stopped.lock().expect("flag") = true;
        self.shared.stop.notify_all();
        self.shared.closed.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        drop(TcpStream::connect(self.address));
    }
}

fn accept(client: TcpStream, shared: &Shared) -> io::Result<()> {
    client.set_read_timeout(Some(PATIENCE))?;
    let raw = client.try_clone()?;
    let stream: Box<dyn Stream> = match &shared.tls {
        None => Box::new(client),
        Some(config) => {
            let connection =
                rustls::ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
            Box::new(rustls::StreamOwned::new(connection, client))
        }
    };
    let served = serve(stream, shared);
    raw.shutdown(Shutdown::Both)?;
    served
}

fn read_head(stream: &mut dyn Stream) -> io::Result<Head> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    String::from_utf8(head).map(Head).map_err(io::Error::other)
}

fn serve(mut client: Box<dyn Stream>, shared: &Shared) -> io::Result<()> {
    let head = read_head(&mut *client)?;
    let line = (head.line().to_owned(), Instant::now());
    shared.log.lock().expect("log").push(line);
    let action = (shared.rule.lock().expect("rule"))(&head);
    let mut body = vec![0; head.length()];
    if let Action::CutRequest(bytes, then) = action {
        let mut server = forward(shared, &head)?;
        let bytes = bytes.min(body.len());
        client.read_exact(&mut body[..bytes])?;
        server.write_all(&body[..bytes])?;
        then();
        return server.shutdown(Shutdown::Both);
    }
    client.read_exact(&mut body)?;
    if let Action::Answer(answer) = action {
        return client.write_all(answer.as_bytes());
    }
    if let (Action::Damage, Some(last)) = (&action, body.last_mut()) {
        *last ^= 1;
    }
    let mut server: Box<dyn Stream> = Box::new(forward(shared, &head)?);
    server.write_all(&body)?;
    client.write_all(read_head(&mut *server)?.0.as_bytes())?;
    match action {
        Action::CutAnswer(bytes, then) => {
            let mut part = vec![0; bytes];
            server.read_exact(&mut part)?;
            client.write_all(&part)?;
            client.flush()?;
            then();
        }
        Action::Trickle(bytes, pause) => {
            let mut rest = Vec::new();
            server.read_to_end(&mut rest)?;
            for piece in rest.chunks(bytes) {
                client.write_all(piece)?;
                let stopped = shared.stopped.lock().expect("flag");
                if *shared.stop.wait_timeout(stopped, pause).expect("flag").0 {
                    return Ok(());
                }
            }
        }
        _ => {
            io::copy(&mut server, &mut client)?;
        }
    }
    client.flush()
}

/// Connects to the server and sends the head; the server is to end the connection after its answer.
fn forward(shared: &Shared, head: &Head) -> io::Result<TcpStream> {
    let mut server = TcpStream::connect(*shared.server.lock().expect("server"))?;
    server.set_read_timeout(Some(PATIENCE))?;
    let text = head.0.trim_end();
    write!(server, "{text}\r\nconnection: close\r\n\r\n")?;
    Ok(server)
}
