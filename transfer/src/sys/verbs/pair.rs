//! A queue pair of the reliable kind, with a completion queue of its own.

use std::ptr::NonNull;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};

use super::events::Channel;
use super::generated::ibverbs as ffi;
use super::library::{check, last};
use super::memory::{Domain, Memory};
use super::slots::Slots;
use super::status;

/// Set in the number of work that receives.
const RECEIVES: u64 = 1 << 32;

/// Completions that are taken at a time.
const BATCH: usize = 32;

/// How much work a queue pair has room for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Depth {
    pub(crate) sends: u32,
    pub(crate) receives: u32,
}

/// One end of a connection, as the other end must know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) pair: u32,
    /// The number of the first packet that it sends: 24 bits.
    pub(crate) first: u32,
    pub(crate) lid: u16,
    pub(crate) gid: [u8; 16],
}

/// How a queue pair reaches its peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairSettings {
    pub(crate) port: u8,
    pub(crate) gid_index: u8,
    /// Packets are addressed by GID; by LID otherwise.
    pub(crate) is_global: bool,
    /// As the enumeration of verbs has it.
    pub(crate) mtu: u8,
    pub(crate) traffic_class: u8,
    pub(crate) service_level: u8,
    /// 4.096 µs × 2^this until a packet that is not acknowledged is sent again.
    pub(crate) timeout: u8,
    pub(crate) retries: u8,
    /// Reads under way to the peer.
    pub(crate) reads: u8,
    /// Reads of the peer's that are answered at once.
    pub(crate) reads_served: u8,
}

/// Bytes of registered memory.
pub(crate) struct Place {
    pub(crate) memory: Arc<Memory>,
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

/// Bytes of a peer's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Far {
    pub(crate) address: u64,
    pub(crate) key: u32,
}

/// What a queue pair does with a place.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    Read(Far),
    Write(Far),
    Send,
}

/// Work that is over.
pub(crate) struct Finished<T> {
    /// As it was posted with.
    pub(crate) tag: T,
    pub(crate) outcome: Result<()>,
    /// It failed only because other work had failed before.
    pub(crate) is_flushed: bool,
    /// Bytes of a message that was received; none for work that was not to receive one.
    pub(crate) received: Option<u32>,
}

/// What is held until work is over.
struct Held<T> {
    tag: T,
    _memory: Arc<Memory>,
}

/// A queue pair; its work is told apart by what it was posted with.
pub(crate) struct Pair<T> {
    domain: Arc<Domain>,
    /// Kept open for the queue.
    _channel: Arc<Channel>,
    raw: NonNull<ffi::ibv_qp>,
    queue: NonNull<ffi::ibv_cq>,
    sends: Slots<Held<T>>,
    receives: Slots<Held<T>>,
    /// It was destroyed.
    is_gone: bool,
}

// SAFETY: one thread at a time uses it, by `&mut self`; the library does not care which.
unsafe impl<T: Send> Send for Pair<T> {}

fn lacking(call: &str) -> Error {
    let text = format!("verbs: the device's provider has no {call}");
    Error::new(ErrorKind::Unsupported, text)
}

impl<T> Pair<T> {
    /// Makes one that is connected to nobody; events of its queue carry `number`.
    pub(crate) fn new(
        domain: &Arc<Domain>,
        channel: &Arc<Channel>,
        number: u64,
        depth: Depth,
    ) -> Result<Self> {
        let context = &domain.context;
        let calls = &context.library.calls;
        let entries = (depth.sends + depth.receives).cast_signed();
        // SAFETY: device and channel are open and kept so; the queue's word is a number, never used as an address.
        let queue = unsafe {
            calls.ibv_create_cq(
                context.raw.as_ptr(),
                entries,
                std::ptr::without_provenance_mut(number as usize),
                channel.raw.as_ptr(),
                0,
            )
        };
        let queue = NonNull::new(queue).ok_or_else(|| last("make a completion queue"))?;
        // SAFETY: a structure of numbers and pointers, for all of which zero is a value.
        let mut wanted: ffi::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        (wanted.send_cq, wanted.recv_cq) = (queue.as_ptr(), queue.as_ptr());
        wanted.qp_type = ffi::IBV_QPT_RC;
        wanted.cap.max_send_wr = depth.sends;
        wanted.cap.max_recv_wr = depth.receives;
        (wanted.cap.max_send_sge, wanted.cap.max_recv_sge) = (1, 1);
        // SAFETY: the domain is kept; the queue lives until the pair is gone; the structure is read during the call.
        let raw = unsafe { calls.ibv_create_qp(domain.raw.as_ptr(), &raw mut wanted) };
        let Some(raw) = NonNull::new(raw) else {
            let error = last("make a queue pair");
            // SAFETY: made above; no queue pair uses it.
            unsafe { calls.ibv_destroy_cq(queue.as_ptr()) };
            return Err(error);
        };
        Ok(Self {
            domain: domain.clone(),
            _channel: channel.clone(),
            raw,
            queue,
            sends: Slots::new(depth.sends),
            receives: Slots::new(depth.receives),
            is_gone: false,
        })
    }

    /// Its number at the device.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: the queue pair lives as long as this.
        unsafe { self.raw.as_ref() }.qp_num
    }

    pub(super) fn modify(
        &mut self,
        doing: &str,
        attributes: &mut ffi::ibv_qp_attr,
        mask: u32,
    ) -> Result<()> {
        // SAFETY: the queue pair lives; the mask says which attributes are read.
        let code = unsafe {
            self.domain.context.library.calls.ibv_modify_qp(
                self.raw.as_ptr(),
                attributes,
                mask.cast_signed(),
            )
        };
        check(doing, code)
    }

    pub(super) fn attributes(state: ffi::ibv_qp_state) -> ffi::ibv_qp_attr {
        // SAFETY: a structure of numbers, for all of which zero is a value.
        let mut attributes: ffi::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attributes.qp_state = state;
        attributes
    }

    /// Lets it take places for messages, and be used by a peer once it is connected.
    pub(crate) fn prepare(&mut self, port: u8) -> Result<()> {
        let mut attributes = Self::attributes(ffi::IBV_QPS_INIT);
        attributes.port_num = port;
        attributes.qp_access_flags = ffi::IBV_ACCESS_REMOTE_READ | ffi::IBV_ACCESS_REMOTE_WRITE;
        let mask = ffi::IBV_QP_STATE
            | ffi::IBV_QP_PKEY_INDEX
            | ffi::IBV_QP_PORT
            | ffi::IBV_QP_ACCESS_FLAGS;
        self.modify("make a queue pair ready", &mut attributes, mask)
    }

    /// Ends all work: what is posted finishes as flushed, and nothing is sent or answered any more.
    pub(crate) fn stop(&mut self) -> Result<()> {
        let mut attributes = Self::attributes(ffi::IBV_QPS_ERR);
        self.modify("stop a queue pair", &mut attributes, ffi::IBV_QP_STATE)
    }

    /// How much more can be posted, other than receiving.
    pub(crate) fn room(&self) -> usize {
        self.sends.room()
    }

    /// Whether nothing is under way but receiving.
    pub(crate) fn is_drained(&self) -> bool {
        self.sends.is_empty()
    }

    /// Whether no place for a message is offered.
    pub(crate) fn takes_nothing(&self) -> bool {
        self.receives.is_empty()
    }

    /// Posts work, which finishes with this tag.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] without [`Pair::room`], [`ErrorKind::Invalid`] beyond the memory's end; nothing is posted then.
    pub(crate) fn post(&mut self, work: Work, place: Place, tag: T) -> Result<()> {
        let post = self.operations().post_send;
        let post = post.ok_or_else(|| lacking("post_send"))?;
        let (mut list, held) = held(place, tag)?;
        let Ok(slot) = self.sends.take(held) else {
            let text = "verbs: the send queue is full";
            return Err(Error::new(ErrorKind::Busy, text));
        };
        // SAFETY: a structure of numbers and pointers, for all of which zero is a value.
        let mut request: ffi::ibv_send_wr = unsafe { std::mem::zeroed() };
        request.wr_id = slot.into();
        request.sg_list = &raw mut list;
        request.num_sge = 1;
        request.send_flags = ffi::IBV_SEND_SIGNALED;
        request.opcode = match work {
            Work::Read(_) => ffi::IBV_WR_RDMA_READ,
            Work::Write(_) => ffi::IBV_WR_RDMA_WRITE,
            Work::Send => ffi::IBV_WR_SEND,
        };
        if let Work::Read(far) | Work::Write(far) = work {
            request.wr.rdma = ffi::ibv_send_wr__bindgen_ty_2__bindgen_ty_1 {
                remote_addr: far.address,
                rkey: far.key,
            };
        }
        let mut bad = std::ptr::null_mut();
        // SAFETY: the queue pair lives; the request and its list are read during the call; the memory that it names is held
        // until the work is over or the queue pair is gone.
        let code = unsafe { post(self.raw.as_ptr(), &raw mut request, &raw mut bad) };
        let posted = check("post work", code);
        if posted.is_err() {
            self.sends.give(slot);
        }
        posted
    }

    /// Offers a place for one message.
    ///
    /// # Errors
    /// As [`Pair::post`].
    pub(crate) fn receive(&mut self, place: Place, tag: T) -> Result<()> {
        let post = self.operations().post_recv;
        let post = post.ok_or_else(|| lacking("post_recv"))?;
        let (mut list, held) = held(place, tag)?;
        let Ok(slot) = self.receives.take(held) else {
            let text = "verbs: the receive queue is full";
            return Err(Error::new(ErrorKind::Busy, text));
        };
        let mut request = ffi::ibv_recv_wr {
            wr_id: u64::from(slot) | RECEIVES,
            next: std::ptr::null_mut(),
            sg_list: &raw mut list,
            num_sge: 1,
        };
        let mut bad = std::ptr::null_mut();
        // SAFETY: as in `post`.
        let code = unsafe { post(self.raw.as_ptr(), &raw mut request, &raw mut bad) };
        let posted = check("offer a place for a message", code);
        if posted.is_err() {
            self.receives.give(slot);
        }
        posted
    }

    fn operations(&self) -> &ffi::ibv_context_ops {
        // SAFETY: the device is open as long as the domain that is made of it, and its table never changes.
        &unsafe { self.domain.context.raw.as_ref() }.ops
    }

    /// What is over since the last time, up to a batch.
    pub(crate) fn poll(&mut self, finished: &mut Vec<Finished<T>>) -> Result<usize> {
        let poll = self.operations().poll_cq;
        let poll = poll.ok_or_else(|| lacking("poll_cq"))?;
        // SAFETY: numbers and a union of numbers, for all of which zero is a value.
        let mut over: [ffi::ibv_wc; BATCH] = unsafe { std::mem::zeroed() };
        // SAFETY: the queue lives, and there is room for as many as are asked for.
        let count = unsafe { poll(self.queue.as_ptr(), BATCH as i32, over.as_mut_ptr()) };
        let Ok(count) = usize::try_from(count) else {
            let text = "verbs: the completion queue is broken";
            return Err(Error::new(ErrorKind::Io, text));
        };
        for entry in over.iter().take(count) {
            let slot = entry.wr_id as u32;
            let receives = entry.wr_id & RECEIVES != 0;
            let held = if receives {
                self.receives.give(slot)
            } else {
                self.sends.give(slot)
            };
            let Some(held) = held else {
                let text = format!("verbs: work {:#x} is over, and was not posted", entry.wr_id);
                return Err(Error::new(ErrorKind::Io, text));
            };
            finished.push(Finished {
                tag: held.tag,
                outcome: status::outcome(entry.status, entry.vendor_err),
                is_flushed: status::is_flushed(entry.status),
                received: receives.then_some(entry.byte_len),
            });
        }
        Ok(count)
    }

    /// Has the channel tell of the next completion. One that came before is not told: poll once more.
    pub(crate) fn arm(&mut self) -> Result<()> {
        let arm = self.operations().req_notify_cq;
        let arm = arm.ok_or_else(|| lacking("req_notify_cq"))?;
        // SAFETY: the queue lives.
        let code = unsafe { arm(self.queue.as_ptr(), 0) };
        check("wait for completions", code)
    }
}

/// The list of one place, and what holds it.
fn held<T>(place: Place, tag: T) -> Result<(ffi::ibv_sge, Held<T>)> {
    let list = ffi::ibv_sge {
        addr: place.memory.at(place.offset, place.len.into())?,
        length: place.len,
        lkey: place.memory.local_key,
    };
    let held = Held {
        tag,
        _memory: place.memory,
    };
    Ok((list, held))
}

impl<T> Pair<T> {
    /// Whether the device still has it.
    fn exists(&self) -> bool {
        self.domain.context.process.is_current() && !self.is_gone
    }

    #[expect(
        clippy::mem_forget,
        reason = "memory that may be in use is leaked, never freed"
    )]
    fn destroy(&mut self) {
        if !self.exists() {
            return;
        }
        self.is_gone = true;
        let calls = &self.domain.context.library.calls;
        // SAFETY: made by `new`, destroyed once, here: `is_gone` was not set before.
        let code = unsafe { calls.ibv_destroy_qp(self.raw.as_ptr()) };
        if code != 0 {
            tracing::error!(code, "a queue pair was not destroyed; its memory is kept");
            std::mem::forget(std::mem::replace(&mut self.sends, Slots::new(0)));
            std::mem::forget(std::mem::replace(&mut self.receives, Slots::new(0)));
            return;
        }
        // SAFETY: made by `new`, destroyed once, here; the queue pair that used it is gone, and every event of it was
        // acknowledged when it was got.
        let code = unsafe { calls.ibv_destroy_cq(self.queue.as_ptr()) };
        if code != 0 {
            tracing::warn!(code, "destroy a completion queue");
        }
    }
}

impl<T: Copy> Pair<T> {
    /// Destroys it: the device touches no memory for it any more. What was posted, other than to receive, and was not found to
    /// be over.
    pub(crate) fn end(mut self) -> Vec<T> {
        let left = self.sends.iter().map(|held| held.tag).collect();
        self.destroy();
        left
    }
}

impl<T> Drop for Pair<T> {
    fn drop(&mut self) {
        self.destroy();
    }
}
