//! A Unix socket between two agents of one host: datagrams, kept in order, with file descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use kvcache_core::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::message::{MESSAGE_BYTES_MAX, Message};

/// How long a peer may leave its messages unread before it counts as lost.
const UNREAD_MAX: Duration = Duration::from_secs(2);

/// One end of the socket, and the process at the other end.
pub(super) struct Link {
    socket: OwnedFd,
    /// Readable once the other process is dead.
    process: OwnedFd,
    pid: i32,
}

impl Link {
    /// # Errors
    /// [`ErrorKind::Denied`] when the other process runs as another user.
    pub(super) fn new(socket: OwnedFd) -> Result<Self> {
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
        let pid = credentials.pid;
        let process = pidfd_open(pid, PidfdFlags::NONBLOCK)
            .map_err(|e| Error::io("watch the other process", e.into()))?;
        Ok(Self {
            socket,
            process,
            pid: Pid::as_raw(Some(pid)),
        })
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(super) fn process(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends one message, waiting a little for room when the other side is slow to read.
    pub(super) fn send(&self, message: &Message, file: Option<BorrowedFd<'_>>) -> Result<()> {
        let bytes = message.encode();
        loop {
            match self.try_send(&bytes, file) {
                Ok(()) => return Ok(()),
                Err(Errno::AGAIN) => self.wait_for_room()?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(lost("send to the peer").with_source(io(error))),
            }
        }
    }

    fn try_send(&self, bytes: &[u8], file: Option<BorrowedFd<'_>>) -> rustix::io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
        if !files.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&files));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, flags)?;
        Ok(())
    }

    fn wait_for_room(&self) -> Result<()> {
        let timeout = Timespec {
            tv_sec: UNREAD_MAX.as_secs() as i64,
            tv_nsec: UNREAD_MAX.subsec_nanos().into(),
        };
        let mut polled = [PollFd::from_borrowed_fd(self.socket(), PollFlags::OUT)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) => Err(lost("the peer does not read its messages")),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(lost("wait for the peer to read").with_source(io(error))),
        }
    }

    /// Takes the next message; none when nothing is there now.
    ///
    /// # Errors
    /// [`ErrorKind::PeerLost`] at the end, other kinds for malformed messages.
    pub(super) fn receive(&self) -> Result<Option<(Message, Option<OwnedFd>)>> {
        let mut bytes = [0; MESSAGE_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let slices = &mut [IoSliceMut::new(&mut bytes)];
        let received = loop {
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
        Ok(Some((Message::decode(&bytes[..received.bytes])?, file)))
    }
}

fn lost(text: &'static str) -> Error {
    Error::new(ErrorKind::PeerLost, text)
}

fn io(error: Errno) -> std::io::Error {
    error.into()
}
