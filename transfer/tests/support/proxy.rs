//! A TCP proxy that stalls or cuts what goes through it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use kvfabric_transfer::Agent;

use super::{OPEN, Pair, Way};

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
    /// Bytes after which everything is held back, counted likewise.
    patience: Mutex<Option<u64>>,
    passed: AtomicU64,
    refuses: AtomicBool,
    /// A byte of what passes next is changed.
    damages: AtomicBool,
}

/// Listens before it knows where to pass things on, so that its address can be advertised by the target.
pub(crate) struct Proxy {
    listener: TcpListener,
    shared: Arc<Shared>,
}

/// A pair whose traffic goes through a proxy, and no other way.
pub(crate) fn proxied(bytes: u64) -> (Pair, Proxy) {
    proxied_from(Way::Tcp.agent("initiator"), bytes)
}

/// The same with an initiator of one's own.
pub(crate) fn proxied_from(initiator: Agent, bytes: u64) -> (Pair, Proxy) {
    let proxy = Proxy::new();
    let target = Way::Tcp
        .builder("target")
        .tcp_advertise(Some(proxy.address()))
        .build()
        .unwrap();
    proxy.run(target.tcp_address().unwrap());
    (Pair::of(initiator, target, bytes, OPEN), proxy)
}

impl Proxy {
    pub(crate) fn new() -> Self {
        let listener = TcpListener::bind(super::loopback()).unwrap();
        let shared = Shared {
            mode: Mutex::new((Mode::Pass, Vec::new())),
            changed: Condvar::new(),
            budget: Mutex::new(None),
            patience: Mutex::new(None),
            passed: AtomicU64::new(0),
            refuses: AtomicBool::new(false),
            damages: AtomicBool::new(false),
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
                if shared.refuses.load(Ordering::SeqCst) {
                    continue;
                }
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

    /// Holds everything back once about this many bytes more have passed.
    pub(crate) fn stall_after(&self, bytes: u64) {
        *self.shared.patience.lock().unwrap() = Some(bytes);
    }

    /// Bytes that went through it so far, both ways.
    pub(crate) fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::SeqCst)
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

    /// Changes the last byte of what passes next, whichever way.
    pub(crate) fn damage(&self) {
        self.shared.damages.store(true, Ordering::SeqCst);
    }

    /// Ends the oldest connection now.
    pub(crate) fn cut_one(&self) {
        let mut state = self.shared.mode.lock().unwrap();
        // One towards each side.
        for stream in state.1.drain(..2) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Ends all connections now, and those that come later at once.
    pub(crate) fn refuse(&self) {
        self.shared.refuses.store(true, Ordering::SeqCst);
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

    fn wear(&self, bytes: u64) {
        let mut patience = self.patience.lock().unwrap();
        if let Some(left) = &mut *patience {
            *left = left.saturating_sub(bytes);
            if *left == 0 {
                *patience = None;
                self.mode.lock().unwrap().0 = Mode::Stall;
            }
        }
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
        shared.passed.fetch_add(count as u64, Ordering::SeqCst);
        if !shared.spend(count as u64) {
            shared.cut();
            break;
        }
        shared.wear(count as u64);
        if shared.damages.swap(false, Ordering::SeqCst) {
            bytes[count - 1] ^= 1;
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
