//! Threads of the fabric that stand still as long as a test wants it.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};

use super::WAIT;

/// Whoever wakes it is held until the test lets go.
struct Holds(Mutex<(Sender<()>, Receiver<()>)>);

impl Wake for Holds {
    fn wake(self: Arc<Self>) {
        let (came, gone) = &*self.0.lock().unwrap();
        // Nobody waits for it in a test that has failed.
        let _ = came.send(());
        let _ = gone.recv();
    }
}

/// The test's end of it; dropped, it lets go.
pub(crate) struct Held {
    came: Receiver<()>,
    _go: Sender<()>,
}

impl Held {
    pub(crate) fn wait(&self) {
        self.came.recv_timeout(WAIT).unwrap();
    }
}

/// Holds the thread that resolves a future; none if it is resolved.
pub(crate) fn hold<F: Future + Unpin>(future: &mut F) -> Option<Held> {
    let ((says, came), (_go, gone)) = (channel(), channel());
    let waker = Waker::from(Arc::new(Holds(Mutex::new((says, gone)))));
    let polled = std::pin::Pin::new(future).poll(&mut Context::from_waker(&waker));
    polled.is_pending().then_some(Held { came, _go })
}
