//! A Unix socket between two agents of one host: datagrams, kept in order, with file descriptors.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvcache_core::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::message::{MESSAGE_BYTES_MAX, Message};
use crate::look::Look;
use crate::reactor::{Interest, Reactor, Source, Token};
use crate::region::RegionId;
use crate::sys::process::credentials;

/// Messages that may wait for room in the socket; above it, sending is refused.
const UNSENT_MAX: usize = 8192;

const ROOT: u32 = 0;

/// What ended a wait.
pub(super) enum Wake {
    /// There is a message, or the end of them.
    Message,
    /// The other process is dead.
    Death,
    TimeOut,
}

struct Unsent {
    bytes: Vec<u8>,
    file: Option<OwnedFd>,
    /// It is sent although nothing else is any more.
    is_last_word: bool,
}

/// A message that came.
pub(super) struct Received {
    pub(super) message: Message,
    /// The descriptor that came along; an error when this process had none left for it.
    pub(super) file: Result<Option<OwnedFd>>,
}

#[derive(Default)]
struct State {
    unsent: VecDeque<Unsent>,
    /// Of the socket, and of the process.
    tokens: [Option<Token>; 2],
    /// Of the socket, while nothing but last words waits for room in it.
    parting: Option<Token>,
}

/// One end of the socket, and the process at the other end.
pub(crate) struct Link {
    socket: OwnedFd,
    /// Readable once the other process is dead.
    process: OwnedFd,
    pid: i32,
    uid: u32,
    reactor: Arc<Reactor>,
    state: Mutex<State>,
    /// Where messages are received.
    buffer: Mutex<Box<[u8]>>,
}

impl Link {
    /// # Errors
    /// [`ErrorKind::Denied`] when the other process runs as another user, or cannot be told from others.
    pub(crate) fn new(socket: OwnedFd, reactor: &Arc<Reactor>) -> Result<Self> {
        let found = credentials(socket.as_fd())
            .map_err(|e| Error::io("credentials of the other process", e))?;
        let (own, other) = (rustix::process::geteuid().as_raw(), found.uid);
        if own != other && own != ROOT && other != ROOT {
            let text = format!("the other process runs as user {other}, this one as {own}");
            return Err(Error::new(ErrorKind::Denied, text));
        }
        let Some(pid) = found.pid.and_then(Pid::from_raw) else {
            let text = "the other process is in another pid namespace, invisible from this one";
            return Err(Error::new(ErrorKind::Denied, text));
        };
        let process = pidfd_open(pid, PidfdFlags::NONBLOCK)
            .map_err(|e| Error::io("watch the other process", e.into()))?;
        Ok(Self {
            socket,
            process,
            pid: Pid::as_raw(Some(pid)),
            uid: found.uid,
            reactor: reactor.clone(),
            state: Mutex::default(),
            buffer: Mutex::new(vec![0; MESSAGE_BYTES_MAX].into()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// The effective user of the other process.
    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    /// Waits until there is a message, if it `listens`, or the other process is dead. Only for when the reactor has
    /// ended.
    pub(super) fn wait(&self, until: Instant, listens: bool) -> Wake {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut watched = [
                PollFd::new(&self.process, PollFlags::IN),
                PollFd::new(&self.socket, PollFlags::IN),
            ];
            let watched = &mut watched[..if listens { 2 } else { 1 }];
            match poll(watched, Some(&left)) {
                Err(Errno::INTR) => {}
                Ok(0) | Err(_) => return Wake::TimeOut,
                Ok(_) if !watched[0].revents().is_empty() => return Wake::Death,
                Ok(_) => return Wake::Message,
            }
        }
    }

    /// Reads the agent's sockets in the calling thread until `done`, in place of the reactor's.
    pub(super) fn assist(&self, until: Instant, look: &Look<'_>, done: &dyn Fn() -> bool) {
        self.reactor.lead(until, look, done);
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

    /// Nothing is received any more, and nothing sent but last words.
    pub(super) fn ignore_messages(self: &Arc<Self>) {
        let mut state = self.lock();
        state.unsent.retain(|unsent| unsent.is_last_word);
        if let Some(token) = state.tokens[0].take() {
            self.reactor.remove(token, self.socket.as_fd());
        }
        self.part(&mut state);
    }

    /// Keeps the socket until last words that wait for room in it are sent.
    fn part(self: &Arc<Self>, state: &mut State) {
        if state.unsent.is_empty() || state.parting.is_some() {
            return;
        }
        let interest = Interest {
            readable: false,
            writable: true,
        };
        let parting = Arc::new(Parting(self.clone()));
        match self.reactor.add(self.socket.as_fd(), interest, parting) {
            Ok(token) => state.parting = Some(token),
            Err(error) => {
                tracing::warn!(%error, pid = self.pid, "a peer is not told what is let go of");
            }
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
        let mut state = self.lock();
        let unsent = Unsent {
            bytes: message.encode(),
            file,
            is_last_word: false,
        };
        let Some(unsent) = self.send_now(&state, unsent)? else {
            return Ok(());
        };
        if state.unsent.len() >= UNSENT_MAX {
            let text = format!("the peer leaves {UNSENT_MAX} messages unread");
            return Err(Error::new(ErrorKind::Busy, text));
        }
        let Some(token) = state.tokens[0] else {
            return Err(lost("the path is closed"));
        };
        self.keep(&mut state, token, unsent);
        Ok(())
    }

    /// Tells that a region is used no more, whatever else the peer leaves unread and after the path has ended, too: its
    /// owner waits for that, and for the end of this process otherwise.
    pub(super) fn send_last_word(self: &Arc<Self>, region: RegionId) {
        let mut state = self.lock();
        let unsent = Unsent {
            bytes: Message::Unmapped { region }.encode(),
            file: None,
            is_last_word: true,
        };
        // The peer may be gone: then there is nobody to tell.
        let Ok(Some(unsent)) = self.send_now(&state, unsent) else {
            return;
        };
        match state.tokens[0] {
            Some(token) => self.keep(&mut state, token, unsent),
            None => {
                state.unsent.push_back(unsent);
                self.part(&mut state);
            }
        }
    }

    /// Gives back what the socket has no room for now.
    fn send_now(&self, state: &State, unsent: Unsent) -> Result<Option<Unsent>> {
        if !state.unsent.is_empty() {
            return Ok(Some(unsent));
        }
        match self.try_send(&unsent.bytes, unsent.file.as_ref().map(AsFd::as_fd)) {
            Err(Errno::AGAIN) => Ok(Some(unsent)),
            Err(error) => Err(lost("send to the peer").with_source(io(error))),
            Ok(()) => Ok(None),
        }
    }

    fn keep(&self, state: &mut State, token: Token, unsent: Unsent) {
        state.unsent.push_back(unsent);
        let interest = Interest {
            readable: true,
            writable: true,
        };
        self.reactor.modify(token, self.socket.as_fd(), interest);
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
    pub(super) fn receive(&self) -> Result<Option<Received>> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut is_reset = false;
        let received = loop {
            let slices = &mut [IoSliceMut::new(&mut buffer)];
            match rustix::net::recvmsg(&self.socket, slices, &mut ancillary, flags) {
                Ok(received) => break received,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                // The peer has closed its end with something unread. That is told once, and before what it has sent.
                Err(Errno::CONNRESET) if !is_reset => is_reset = true,
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
        let message = Message::decode(&buffer[..received.bytes])?;
        let file = if file.is_none() && received.flags.contains(ReturnFlags::CTRUNC) {
            let text =
                "this process has no file descriptors left to receive one (Too many open files)";
            Err(Error::new(ErrorKind::Io, text))
        } else {
            Ok(file)
        };
        Ok(Some(Received { message, file }))
    }
}

/// The socket of a path that has ended, while last words wait for room in it.
struct Parting(Arc<Link>);

impl Source for Parting {
    fn ready(&self, _readiness: Interest) {
        let link = &self.0;
        let failed = link.flush().is_err();
        let mut state = link.lock();
        if failed {
            state.unsent.clear();
        }
        if state.unsent.is_empty()
            && let Some(token) = state.parting.take()
        {
            link.reactor.remove(token, link.socket.as_fd());
        }
    }

    fn orphaned(&self) {}
}

fn lost(text: &'static str) -> Error {
    Error::new(ErrorKind::PeerLost, text)
}

fn io(error: Errno) -> std::io::Error {
    error.into()
}

#[cfg(test)]
mod tests;
