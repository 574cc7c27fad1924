//! A TCP proxy that stalls or cuts what goes through it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

/// What is done with bytes that arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Pass,
    /// Held back until the mode changes.
    Stall,
}

struct Shared {
    mode: Mutex<(Mode, Vec<TcpStream>)>,
    changed: Condvar,
    /// Bytes after which everything is cut, counted over both directions.
    budget: Mutex<Option<u64>>,
}

/// Listens before it knows where to pass things on, so that its address can be advertised by the target.
pub(crate) struct Proxy {
    listener: TcpListener,
    shared: Arc<Shared>,
}

impl Proxy {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind(super::loopback()).unwrap();
        let shared = Shared {
            mode: Mutex::new((Mode::Pass, Vec::new())),
            changed: Condvar::new(),
            budget: Mutex::new(None),
        };
        Self {
            listener,
            shared: Arc::new(shared),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// Passes connections on to `target`, from a thread that lives as long as the process.
    pub(crate) fn run(&self, target: SocketAddr) {
        let listener = self.listener.try_clone().unwrap();
        let shared = self.shared.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                let server = TcpStream::connect(target).unwrap();
                let mut state = shared.mode.lock().unwrap();
                state
                    .1
                    .extend([client.try_clone().unwrap(), server.try_clone().unwrap()]);
                drop(state);
                let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let one = shared.clone();
                thread::spawn(move || pass(from, to, &one));
                let other = shared.clone();
                thread::spawn(move || pass(server, client, &other));
            }
        });
    }

    /// Holds everything back from now on.
    pub(crate) fn stall(&self) {
        self.shared.mode.lock().unwrap().0 = Mode::Stall;
    }

    /// Passes things on again.
    pub(crate) fn resume(&self) {
        self.shared.mode.lock().unwrap().0 = Mode::Pass;
        self.shared.changed.notify_all();
    }

    /// Ends all connections now.
    pub(crate) fn cut(&self) {
        self.shared.cut();
    }

    /// Ends all connections once this many bytes more have passed.
    pub(crate) fn cut_after(&self, bytes: u64) {
        *self.shared.budget.lock().unwrap() = Some(bytes);
    }
}

impl Shared {
    fn cut(&self) {
        *self.budget.lock().unwrap() = None;
        for stream in self.mode.lock().unwrap().1.drain(..) {
            // Closed by the other side already: just as well.
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
    }

    /// Whether the budget allows it.
    fn spend(&self, bytes: u64) -> bool {
        match &mut *self.budget.lock().unwrap() {
            None => true,
            Some(left) => {
                *left = left.saturating_sub(bytes);
                *left > 0
            }
        }
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, shared: &Shared) {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let count = match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        if !shared.spend(count as u64) {
            shared.cut();
            break;
        }
        let state = shared.mode.lock().unwrap();
        let state = shared
            .changed
            .wait_while(state, |state| state.0 == Mode::Stall && !state.1.is_empty())
            .unwrap();
        drop(state);
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}
