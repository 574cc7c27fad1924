//! Peer services of nodes, for whoever has no node.

use std::ffi::{c_char, c_void};
use std::sync::Arc;

use kvfabric::config::parse_identity;
use kvfabric::life::Life;
use kvfabric::{PeerConnection, PinId};

use crate::boundary::{Handle, Out, boundary, enter, into_raw, milliseconds, slice, take, text};
use crate::status::kvf_status;
use crate::task::{Work, kvf_task};

/// A connection to a node's peer service.
pub struct kvf_service {
    connection: Arc<PeerConnection>,
}

impl Handle for kvf_service {
    const NAME: &'static str = "service";

    fn life(&self) -> &Arc<Life> {
        self.connection.life()
    }
}

impl kvf_service {
    fn task(&self, work: Work) -> *mut kvf_task {
        kvf_task::begin(self.life(), self.connection.clone(), work)
    }
}

/// Takes the way to a node's peer service, "host:port": for a process that has no node, such as a scheduler that asks what a
/// worker's node could get. Nothing is connected before the first question, and a connection that is lost is made again by
/// the next one.
///
/// KVF_INVALID for a malformed address.
///
/// # Safety
/// Each pointer is null or valid: `address` a string, `service_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_service_connect(
    address: *const c_char,
    service_out: *mut *mut kvf_service,
) -> kvf_status {
    boundary(|| {
        // SAFETY: null or a string, by contract.
        let address = unsafe { text(address, "address") }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(service_out, "service_out") }?;
        let connection = Arc::new(PeerConnection::connect(address)?);
        out.write(into_raw(kvf_service { connection }));
        Ok(())
    })
}

/// Begins to find out how much of a run of blocks the node could get, by the names that kvf_names_pack has packed; see
/// kvf_task_reach.
///
/// By the task: KVF_UNSUPPORTED from a node without an engine section, KVF_PEER_LOST when it cannot be reached, KVF_TIMEOUT
/// after `deadline_ms`.
///
/// # Safety
/// Each pointer is null or valid: `service` live, `names` for `len` reads, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_service_locate(
    service: *const kvf_service,
    names: *const c_void,
    len: usize,
    deadline_ms: u32,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        let service = enter(service, "service")?;
        // SAFETY: null or readable for `len` bytes, by contract.
        let names = unsafe { slice(names.cast::<u8>(), len, "names") }?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(task_out, "task_out") }?;
        let deadline = milliseconds(deadline_ms);
        let located = service.connection.locate(names, deadline);
        out.write(service.task(Work::Locate(located)));
        Ok(())
    })
}

/// Begins to let go of what the node has kept by kvf_node_pin. `model_identity` is the node's, 64 hexadecimal digits. A pin that
/// has ended is no failure.
///
/// KVF_INVALID for what is no identity; by the task, KVF_DENIED for another one than the node's, else as kvf_service_locate.
///
/// # Safety
/// Each pointer is null or valid: `service` live, `model_identity` a string, `task_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_service_unpin(
    service: *const kvf_service,
    pin: u64,
    model_identity: *const c_char,
    deadline_ms: u32,
    task_out: *mut *mut kvf_task,
) -> kvf_status {
    boundary(|| {
        let service = enter(service, "service")?;
        // SAFETY: null or a string, by contract.
        let identity = parse_identity(unsafe { text(model_identity, "model_identity") }?)?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(task_out, "task_out") }?;
        let (pin, deadline) = (PinId(pin), milliseconds(deadline_ms));
        let unpinned = service.connection.unpin(pin, identity, deadline);
        out.write(service.task(Work::End(unpinned)));
        Ok(())
    })
}

/// Closes a connection. Tasks in progress go on.
///
/// # Safety
/// `service` is null or live, and not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_service_free(service: *mut kvf_service) -> kvf_status {
    boundary(|| take(service, "service", |_| Ok(())))
}
