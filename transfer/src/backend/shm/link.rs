//! A Unix socket between two agents of one host: datagrams, kept in order, with file descriptors.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvcache_core::{Error, ErrorKind, Result};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::message::{MESSAGE_BYTES_MAX, Message};
use crate::reactor::{Interest, Reactor, Source, Token};

/// Messages that may wait for room in the socket; above it, sending is refused.
const UNSENT_MAX: usize = 8192;

/// Messages that one peer gets handled before others get their turn.
pub(super) const TURN_MESSAGES: usize = 64;

struct Unsent {
    bytes: Vec<u8>,
    file: Option<OwnedFd>,
}

#[derive(Default)]
struct State {
    unsent: VecDeque<Unsent>,
    /// Of the socket, and of the process.
    tokens: [Option<Token>; 2],
}

/// One end of the socket, and the process at the other end.
pub(super) struct Link {
    socket: OwnedFd,
    /// Readable once the other process is dead.
    process: OwnedFd,
    pid: i32,
    reactor: Arc<Reactor>,
    state: Mutex<State>,
    /// Where messages are received.
    buffer: Mutex<Box<[u8]>>,
}

impl Link {
    /// # Errors
    /// [`ErrorKind::Denied`] when the other process runs as another user.
    pub(super) fn new(socket: OwnedFd, reactor: &Arc<Reactor>) -> Result<Self> {
        let credentials = rustix::net::sockopt::socket_peercred(&socket)
            .map_err(|e| Error::io("credentials of the other process", e.into()))?;
        let (own, other) = (rustix::process::geteuid(), credentials.uid);
        if own != other && !own.is_root() && !other.is_root() {
            let text = format!(
                "the other process runs as user {}, this one as {}",
                other.as_raw(),
                own.as_raw()
            );
            return Err(Error::new(ErrorKind::Denied, text));
        }
        let process = pidfd_open(credentials.pid, PidfdFlags::NONBLOCK)
            .map_err(|e| Error::io("watch the other process", e.into()))?;
        Ok(Self {
            socket,
            process,
            pid: Pid::as_raw(Some(credentials.pid)),
            reactor: reactor.clone(),
            state: Mutex::default(),
            buffer: Mutex::new(vec![0; MESSAGE_BYTES_MAX].into()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Has the reactor tell of messages, and of the other process's death.
    pub(super) fn watch(&self, messages: Arc<dyn Source>, death: Arc<dyn Source>) -> Result<()> {
        let mut state = self.lock();
        let token = self
            .reactor
            .add(self.socket.as_fd(), Interest::READABLE, messages)?;
        state.tokens[0] = Some(token);
        let death = self
            .reactor
            .add(self.process.as_fd(), Interest::READABLE, death);
        match death {
            Ok(token) => state.tokens[1] = Some(token),
            Err(error) => {
                state.tokens[0] = None;
                self.reactor.remove(token, self.socket.as_fd());
                return Err(error);
            }
        }
        Ok(())
    }

    /// Nothing is sent or received any more.
    pub(super) fn ignore_messages(&self) {
        let mut state = self.lock();
        state.unsent.clear();
        if let Some(token) = state.tokens[0].take() {
            self.reactor.remove(token, self.socket.as_fd());
        }
    }

    /// The other process's death no longer matters.
    pub(super) fn ignore_death(&self) {
        if let Some(token) = self.lock().tokens[1].take() {
            self.reactor.remove(token, self.process.as_fd());
        }
    }

    /// Sends one message, or keeps it until there is room. Never blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when too many wait, [`ErrorKind::PeerLost`] when nobody listens.
    pub(super) fn send(&self, message: &Message, file: Option<OwnedFd>) -> Result<()> {
        let bytes = message.encode();
        let mut state = self.lock();
        if state.unsent.is_empty() {
            match self.try_send(&bytes, file.as_ref().map(AsFd::as_fd)) {
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(lost("send to the peer").with_source(io(error))),
                Ok(()) => return Ok(()),
            }
        }
        if state.unsent.len() >= UNSENT_MAX {
            let text = format!("the peer leaves {UNSENT_MAX} messages unread");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        let Some(token) = state.tokens[0] else {
            return Err(lost("the path is closed"));
        };
        state.unsent.push_back(Unsent { bytes, file });
        self.reactor.modify(
            token,
            self.socket.as_fd(),
            Interest {
                readable: true,
                writable: true,
            },
        );
        Ok(())
    }

    /// There is room in the socket: sends what waits.
    pub(super) fn flush(&self) -> Result<()> {
        let mut state = self.lock();
        while let Some(next) = state.unsent.front() {
            match self.try_send(&next.bytes, next.file.as_ref().map(AsFd::as_fd)) {
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(lost("send to the peer").with_source(io(error))),
                Ok(()) => state.unsent.pop_front(),
            };
        }
        if let Some(token) = state.tokens[0] {
            self.reactor
                .modify(token, self.socket.as_fd(), Interest::READABLE);
        }
        Ok(())
    }

    fn try_send(&self, bytes: &[u8], file: Option<BorrowedFd<'_>>) -> rustix::io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files = file.as_slice();
        if !files.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(files));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, flags)
            {
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
                Ok(_) => return Ok(()),
            }
        }
    }

    /// Takes the next message; none when nothing is there now.
    ///
    /// # Errors
    /// [`ErrorKind::PeerLost`] at the end, other kinds for malformed messages.
    pub(super) fn receive(&self) -> Result<Option<(Message, Option<OwnedFd>)>> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            let slices = &mut [IoSliceMut::new(&mut buffer)];
            match rustix::net::recvmsg(&self.socket, slices, &mut ancillary, flags) {
                Ok(received) => break received,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(lost("receive from the peer").with_source(io(error))),
            }
        };
        let files = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        // Those that nobody asked for are closed here.
        let file = files.flatten().next();
        if received.bytes == 0 {
            return Err(lost("the peer closed the path"));
        }
        if received.flags.contains(ReturnFlags::TRUNC) {
            let text = format!("a message of more than {MESSAGE_BYTES_MAX} bytes");
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        Ok(Some((Message::decode(&buffer[..received.bytes])?, file)))
    }
}

fn lost(text: &'static str) -> Error {
    Error::new(ErrorKind::PeerLost, text)
}

fn io(error: Errno) -> std::io::Error {
    error.into()
}
