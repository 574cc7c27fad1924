//! Devices, and what they and their ports can do.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::ptr::NonNull;

use kvcache_core::{Error, ErrorKind, Result};

use super::facts::{Gid, gid_kind};
use super::generated::ibverbs as ffi;
use super::library::{Library, check, last};
use crate::sys::fork::Process;

/// Entries of a GID table that are looked at: the first ones are the port's own addresses.
const GIDS_MAX: u8 = 128;

/// Where the system tells of devices.
const ROOT: &str = "/sys/class/infiniband";

/// A list of devices, given back when dropped.
struct Devices {
    library: &'static Library,
    raw: NonNull<*mut ffi::ibv_device>,
    count: usize,
}

impl Devices {
    /// None where the system has no RDMA at all.
    fn list(library: &'static Library) -> Option<Self> {
        let mut count = 0;
        // SAFETY: the count is writable; the list is given back by `drop`.
        let raw = unsafe { library.calls.ibv_get_device_list(&raw mut count) };
        Some(Self {
            library,
            raw: NonNull::new(raw)?,
            count: usize::try_from(count).unwrap_or(0),
        })
    }

    fn at(&self, position: usize) -> *mut ffi::ibv_device {
        assert!(position < self.count, "the list has {} devices", self.count);
        // SAFETY: within the list, which has as many entries, and lives as long as this.
        let entry = unsafe { self.raw.as_ptr().add(position) };
        // SAFETY: as above: an entry of the list.
        unsafe { *entry }
    }

    fn name(&self, position: usize) -> String {
        // SAFETY: a device of the list, which is not given back yet.
        let name = unsafe { self.library.calls.ibv_get_device_name(self.at(position)) };
        // SAFETY: a terminated text of the device.
        let name = unsafe { CStr::from_ptr(name) };
        name.to_string_lossy().into_owned()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // SAFETY: got by `list`, given back once; what was opened of it stays open.
        unsafe { self.library.calls.ibv_free_device_list(self.raw.as_ptr()) };
    }
}

/// The names of the RDMA devices of this system; none where it has no RDMA.
///
/// # Errors
/// [`ErrorKind::Unsupported`] without libibverbs.
pub(crate) fn device_names() -> Result<Vec<String>> {
    let Some(devices) = Devices::list(Library::get()?) else {
        return Ok(Vec::new());
    };
    Ok((0..devices.count).map(|at| devices.name(at)).collect())
}

/// What a device can do at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Work requests in a queue of a queue pair.
    pub(crate) work: u32,
    /// Entries of a completion queue.
    pub(crate) completions: u32,
    /// Reads of a peer that a queue pair answers at once.
    pub(crate) reads_served: u8,
    /// Reads that a queue pair has under way at once.
    pub(crate) reads: u8,
}

/// What a port is and does.
#[derive(Clone, Debug)]
pub(crate) struct Port {
    pub(crate) number: u8,
    pub(crate) is_active: bool,
    /// Packets carry an IP header, or are addressed like that: peers are told by GID, never by LID.
    pub(crate) is_ethernet: bool,
    pub(crate) lid: u16,
    /// Bytes of a packet's content, as the enumeration of verbs has them.
    pub(crate) mtu: u8,
    /// Bytes in one operation.
    pub(crate) message_bytes_max: u32,
    /// Those that are set.
    pub(crate) gids: Vec<Gid>,
}

/// An open device.
pub(crate) struct Context {
    pub(super) library: &'static Library,
    pub(super) process: Process,
    pub(super) raw: NonNull<ffi::ibv_context>,
    name: String,
}

// SAFETY: the calls of libibverbs may be made from any thread, several at a time; what the pointer points to is the
// device's, and lives until it is closed by `drop`.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// # Errors
    /// [`ErrorKind::Unsupported`] without libibverbs, or without such a device; [`ErrorKind::Io`] when the system refuses
    /// it.
    pub(crate) fn open(name: &str) -> Result<Self> {
        let library = Library::get()?;
        let found = Devices::list(library).and_then(|devices| {
            let at = (0..devices.count).find(|&at| devices.name(at) == name)?;
            Some((devices, at))
        });
        let Some((devices, at)) = found else {
            let text = format!("no RDMA device {name:?} in this system");
            return Err(Error::new(ErrorKind::Unsupported, text));
        };
        // SAFETY: a device of a list that is not given back yet.
        let raw = unsafe { library.calls.ibv_open_device(devices.at(at)) };
        let raw = NonNull::new(raw).ok_or_else(|| last(&format!("open {name}")))?;
        Ok(Self {
            library,
            process: Process::current(),
            raw,
            name: name.to_owned(),
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn limits(&self) -> Result<Limits> {
        let mut raw = std::mem::MaybeUninit::<ffi::ibv_device_attr>::zeroed();
        // SAFETY: the device is open, and the result is writable.
        let code = unsafe {
            self.library
                .calls
                .ibv_query_device(self.raw.as_ptr(), raw.as_mut_ptr())
        };
        check("ask for the device's limits", code)?;
        // SAFETY: numbers, for all of which zero is a value; filled above.
        let raw = unsafe { raw.assume_init() };
        let count = |value: i32| u32::try_from(value).unwrap_or(0);
        let few = |value: i32| u8::try_from(value.max(0)).unwrap_or(u8::MAX);
        Ok(Limits {
            work: count(raw.max_qp_wr),
            completions: count(raw.max_cqe),
            reads_served: few(raw.max_qp_rd_atom),
            reads: few(raw.max_qp_init_rd_atom),
        })
    }

    /// All ports, the first one's number being 1.
    pub(crate) fn ports(&self) -> Result<Vec<Port>> {
        let mut raw = std::mem::MaybeUninit::<ffi::ibv_device_attr>::zeroed();
        // SAFETY: the device is open, and the result is writable.
        let code = unsafe {
            self.library
                .calls
                .ibv_query_device(self.raw.as_ptr(), raw.as_mut_ptr())
        };
        check("ask for the device's ports", code)?;
        // SAFETY: as in `limits`.
        let count = unsafe { raw.assume_init() }.phys_port_cnt;
        (1..=count).map(|number| self.port(number)).collect()
    }

    /// Whether a port is up now.
    ///
    /// # Errors
    /// What the device says.
    pub(crate) fn is_up(&self, number: u8) -> Result<bool> {
        let raw = self.port_attributes(number)?;
        Ok(raw.state == ffi::IBV_PORT_ACTIVE)
    }

    fn port_attributes(&self, number: u8) -> Result<ffi::ibv_port_attr> {
        let mut raw = std::mem::MaybeUninit::<ffi::ibv_port_attr>::zeroed();
        // SAFETY: the device is open; the call fills a part of the structure that it has had from the first, all of what
        // is read below, and leaves the rest.
        let code = unsafe {
            self.library
                .calls
                .ibv_query_port(self.raw.as_ptr(), number, raw.as_mut_ptr().cast())
        };
        check(&format!("ask for port {number}"), code)?;
        // SAFETY: as in `limits`.
        Ok(unsafe { raw.assume_init() })
    }

    fn port(&self, number: u8) -> Result<Port> {
        let raw = self.port_attributes(number)?;
        let entries = u8::try_from(raw.gid_tbl_len.max(0)).unwrap_or(GIDS_MAX);
        let gids = (0..entries.min(GIDS_MAX))
            .filter_map(|index| self.gid(number, index))
            .collect();
        Ok(Port {
            number,
            is_active: raw.state == ffi::IBV_PORT_ACTIVE,
            is_ethernet: u32::from(raw.link_layer) == ffi::IBV_LINK_LAYER_ETHERNET,
            lid: raw.lid,
            mtu: u8::try_from(raw.active_mtu).unwrap_or(0),
            message_bytes_max: raw.max_msg_sz,
            gids,
        })
    }

    fn gid(&self, port: u8, index: u8) -> Option<Gid> {
        let root = PathBuf::from(ROOT).join(&self.name);
        let kind = gid_kind(&root, port, index)?;
        let mut raw = std::mem::MaybeUninit::<ffi::ibv_gid>::zeroed();
        // SAFETY: the device is open, and the result is writable.
        let code = unsafe {
            self.library.calls.ibv_query_gid(
                self.raw.as_ptr(),
                port,
                index.into(),
                raw.as_mut_ptr(),
            )
        };
        // SAFETY: bytes, for which zero is a value.
        let raw = unsafe { raw.assume_init() };
        // SAFETY: the union's other form are the same bytes as two numbers.
        let bytes = unsafe { raw.raw };
        (code == 0 && bytes != [0; 16]).then_some(Gid { index, bytes, kind })
    }

    /// Readable when there is something for [`Context::notice`](super::events).
    pub(crate) fn notice_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the device is open.
        let fd = unsafe { self.raw.as_ref() }.async_fd;
        // SAFETY: the descriptor is the device's, open for as long as that is.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if !self.process.is_current() {
            return;
        }
        // SAFETY: opened by `open`, closed only here; all that was made of it holds this and is gone.
        let code = unsafe { self.library.calls.ibv_close_device(self.raw.as_ptr()) };
        if code != 0 {
            tracing::warn!(code, device = self.name, "close an RDMA device");
        }
    }
}
