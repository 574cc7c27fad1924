//! What only the inside can provoke: panics, and the numbers of error kinds.

use std::ffi::{CStr, c_char};
use std::ptr::null_mut;

use kvfabric::ErrorKind;

use crate::agent::{
    kvf_agent, kvf_agent_create, kvf_agent_free, kvf_agent_metadata, kvf_agent_receive,
};
use crate::agent_options::kvf_agent_options;
use crate::boundary::{boundary, enter};
use crate::region::{kvf_region, kvf_region_allocate, kvf_region_free, kvf_region_id};
use crate::status::{kvf_last_error, kvf_status, kvf_status_name};

fn text(text: *const c_char) -> String {
    // SAFETY: every text of this library ends with a NUL and is still valid: no call was made since.
    unsafe { CStr::from_ptr(text) }.to_str().unwrap().to_owned()
}

fn create(name: &CStr) -> *mut kvf_agent {
    // SAFETY: numbers and pointers, all of which may be zero.
    let mut options: kvf_agent_options = unsafe { std::mem::zeroed() };
    options.size = size_of::<kvf_agent_options>();
    options.name = name.as_ptr();
    let mut agent = null_mut();
    // SAFETY: both are locals, and the name is a string.
    let status = unsafe { kvf_agent_create(&raw const options, &raw mut agent) };
    assert_eq!(status, kvf_status::KVF_OK);
    agent
}

/// Walks through all kinds; a kind that gets a number without a status here fails.
#[test]
fn each_error_kind_has_the_status_of_its_number_and_name() {
    let kinds = [
        ErrorKind::Invalid,
        ErrorKind::Busy,
        ErrorKind::Corrupt,
        ErrorKind::PeerLost,
        ErrorKind::Unsupported,
        ErrorKind::Timeout,
        ErrorKind::Cancelled,
        ErrorKind::Version,
        ErrorKind::NoSpace,
        ErrorKind::Denied,
        ErrorKind::Poisoned,
        ErrorKind::NotFound,
        ErrorKind::Io,
        ErrorKind::Forked,
        ErrorKind::Internal,
    ];
    assert_eq!(kinds.len() + 1, kvf_status::ALL.len());
    for (position, status) in kvf_status::ALL.into_iter().enumerate() {
        assert_eq!(status as usize, position);
    }
    for kind in kinds {
        let status = kvf_status::of_kind(kind);
        assert_eq!(status as u32, kind.code());
        assert_eq!(text(kvf_status_name(status as u32)), kind.name());
    }
}

/// Panics inside a call on an agent, then uses the agent and a region of it; both are leaked, as promised.
#[test]
fn a_panic_poisons_all_handles_of_the_agent_and_no_other() {
    let (agent, other) = (create(c"panics"), create(c"other"));
    let mut region: *mut kvf_region = null_mut();
    // SAFETY: a live agent and a local.
    let status = unsafe { kvf_region_allocate(agent, 4096, 0, &raw mut region) };
    assert_eq!(status, kvf_status::KVF_OK);

    let status = boundary(|| {
        let _agent = enter(agent.cast_const(), "agent")?;
        panic!("a promise was broken")
    });
    assert_eq!(status, kvf_status::KVF_INTERNAL);
    assert_eq!(text(kvf_last_error()), "panicked: a promise was broken");

    let (mut len, mut id) = (0_usize, 0_u64);
    // SAFETY: a live agent and a local; no buffer is given.
    let status = unsafe { kvf_agent_metadata(agent, null_mut(), 0, &raw mut len) };
    assert_eq!(status, kvf_status::KVF_INTERNAL);
    assert!(text(kvf_last_error()).contains("earlier panic"));
    // SAFETY: a live region and a local.
    let status = unsafe { kvf_region_id(region, &raw mut id) };
    assert_eq!(status, kvf_status::KVF_INTERNAL);
    // SAFETY: a live region, which is not used again.
    assert_eq!(unsafe { kvf_region_free(region) }, kvf_status::KVF_INTERNAL);
    // SAFETY: a live agent, which is not used again.
    assert_eq!(unsafe { kvf_agent_free(agent) }, kvf_status::KVF_INTERNAL);

    // SAFETY: a live agent and a local; no buffer is given.
    let status = unsafe { kvf_agent_metadata(other, null_mut(), 0, &raw mut len) };
    assert_eq!(status, kvf_status::KVF_OK);
    // SAFETY: a live agent, which is not used again.
    assert_eq!(unsafe { kvf_agent_free(other) }, kvf_status::KVF_OK);
}

/// Two threads wait at once; one message goes to exactly one of them, and the other is not left waiting behind it.
#[test]
fn threads_that_receive_share_the_messages() {
    let agent = create(c"shared");
    let entered = enter(agent.cast_const(), "agent").map_err(drop).unwrap();
    let peer = entered.agent.load_peer(&entered.agent.metadata()).unwrap();
    let receive = |address: usize| {
        let mut byte = 0_u8;
        let mut len = 0;
        let buffer = (&raw mut byte).cast();
        let agent = address as *const kvf_agent;
        // SAFETY: the agent outlives the threads; the rest are locals.
        let status =
            unsafe { kvf_agent_receive(agent, 20_000, null_mut(), 0, buffer, 1, &raw mut len) };
        assert_eq!((status, len), (kvf_status::KVF_OK, 1));
        byte
    };
    let address = agent as usize;
    let mut received = std::thread::scope(|scope| {
        let threads = [0; 4].map(|_| scope.spawn(move || receive(address)));
        for message in [&b"a"[..], b"b", b"c", b"d"] {
            let request = entered
                .agent
                .notify(&peer, message.to_vec().into())
                .unwrap();
            request.wait(std::time::Duration::from_secs(20)).unwrap();
        }
        threads.map(|thread| thread.join().unwrap())
    });
    received.sort_unstable();
    assert_eq!(&received, b"abcd");
    drop(entered);
    // SAFETY: a live agent, which is not used again.
    assert_eq!(unsafe { kvf_agent_free(agent) }, kvf_status::KVF_OK);
}
