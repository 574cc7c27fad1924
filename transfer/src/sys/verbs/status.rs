//! How work ended, in our words.

use kvcache_core::{Error, ErrorKind, Result};

use super::generated::ibverbs as ffi;

/// The kind of error that a status of a work completion is, and what it says.
fn meaning(status: ffi::ibv_wc_status) -> (ErrorKind, &'static str) {
    use ErrorKind::{Corrupt, Denied, Internal, Invalid, Io, PeerLost};
    match status {
        ffi::IBV_WC_LOC_LEN_ERR => (Internal, "a message is longer than its buffer"),
        // What soft-RoCE says when its link is down.
        ffi::IBV_WC_LOC_QP_OP_ERR => (Io, "the device could not send it"),
        ffi::IBV_WC_LOC_EEC_OP_ERR
        | ffi::IBV_WC_LOC_RDD_VIOL_ERR
        | ffi::IBV_WC_REM_INV_RD_REQ_ERR
        | ffi::IBV_WC_INV_EECN_ERR
        | ffi::IBV_WC_INV_EEC_STATE_ERR => (Internal, "an error of datagram connections"),
        ffi::IBV_WC_LOC_PROT_ERR => (Invalid, "the local memory is not registered"),
        ffi::IBV_WC_WR_FLUSH_ERR => (PeerLost, "the queue pair was in error"),
        ffi::IBV_WC_MW_BIND_ERR => (Internal, "a memory window was not bound"),
        ffi::IBV_WC_BAD_RESP_ERR => (Corrupt, "the peer answered with another operation"),
        ffi::IBV_WC_LOC_ACCESS_ERR => (Invalid, "the local memory may not be written"),
        // Ranges are checked before, so nobody has asked for something wrong. Soft-RoCE says it when a link goes down in the
        // middle of a write.
        ffi::IBV_WC_REM_INV_REQ_ERR => (Io, "the peer's device refused the request"),
        ffi::IBV_WC_REM_ACCESS_ERR => (Denied, "the peer's memory may not be used so"),
        ffi::IBV_WC_REM_OP_ERR => (PeerLost, "the peer's device could not do it"),
        ffi::IBV_WC_RETRY_EXC_ERR => (PeerLost, "the peer's device does not answer"),
        ffi::IBV_WC_RNR_RETRY_EXC_ERR => (PeerLost, "the peer takes no messages"),
        ffi::IBV_WC_REM_ABORT_ERR => (PeerLost, "the peer gave the work up"),
        ffi::IBV_WC_FATAL_ERR => (Io, "the device failed"),
        ffi::IBV_WC_RESP_TIMEOUT_ERR => (PeerLost, "the answer took too long"),
        _ => (Io, "an error of the device"),
    }
}

/// # Errors
/// Any status but success; the text has its number, and the vendor's code.
pub(super) fn outcome(status: ffi::ibv_wc_status, vendor: u32) -> Result<()> {
    if status == ffi::IBV_WC_SUCCESS {
        return Ok(());
    }
    let (kind, text) = meaning(status);
    let text = format!("verbs: {text} (status {status}, vendor code {vendor:#x})");
    Err(Error::new(kind, text))
}

/// Whether work ended only because other work had failed before.
pub(super) fn is_flushed(status: ffi::ibv_wc_status) -> bool {
    status == ffi::IBV_WC_WR_FLUSH_ERR
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each status that the headers know, with what a caller can do about it; and one that they do not know.
    #[test]
    fn every_status_has_a_kind_and_keeps_its_vendor_code() {
        use ErrorKind::{Corrupt, Denied, Internal, Invalid, Io, PeerLost};
        assert!(outcome(ffi::IBV_WC_SUCCESS, 0).is_ok());
        let kinds = [
            (ffi::IBV_WC_LOC_LEN_ERR, Internal),
            (ffi::IBV_WC_LOC_QP_OP_ERR, Io),
            (ffi::IBV_WC_LOC_EEC_OP_ERR, Internal),
            (ffi::IBV_WC_LOC_PROT_ERR, Invalid),
            (ffi::IBV_WC_WR_FLUSH_ERR, PeerLost),
            (ffi::IBV_WC_MW_BIND_ERR, Internal),
            (ffi::IBV_WC_BAD_RESP_ERR, Corrupt),
            (ffi::IBV_WC_LOC_ACCESS_ERR, Invalid),
            (ffi::IBV_WC_REM_INV_REQ_ERR, Io),
            (ffi::IBV_WC_REM_ACCESS_ERR, Denied),
            (ffi::IBV_WC_REM_OP_ERR, PeerLost),
            (ffi::IBV_WC_RETRY_EXC_ERR, PeerLost),
            (ffi::IBV_WC_RNR_RETRY_EXC_ERR, PeerLost),
            (ffi::IBV_WC_LOC_RDD_VIOL_ERR, Internal),
            (ffi::IBV_WC_REM_INV_RD_REQ_ERR, Internal),
            (ffi::IBV_WC_REM_ABORT_ERR, PeerLost),
            (ffi::IBV_WC_INV_EECN_ERR, Internal),
            (ffi::IBV_WC_INV_EEC_STATE_ERR, Internal),
            (ffi::IBV_WC_FATAL_ERR, Io),
            (ffi::IBV_WC_RESP_TIMEOUT_ERR, PeerLost),
            (ffi::IBV_WC_GENERAL_ERR, Io),
            (ffi::IBV_WC_TM_ERR, Io),
            (ffi::IBV_WC_TM_RNDV_INCOMPLETE, Io),
            (9999, Io),
        ];
        // They are numbered without a gap, so none is left out.
        let numbers = kinds.iter().map(|(status, _)| *status);
        let known = ffi::IBV_WC_SUCCESS + 1..=ffi::IBV_WC_TM_RNDV_INCOMPLETE;
        assert!(numbers.take(known.clone().count()).eq(known));
        for (status, kind) in kinds {
            let error = outcome(status, 0x81).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            let text = error.to_string();
            assert!(text.contains(&format!("status {status},")), "{text}");
            assert!(text.contains("vendor code 0x81"), "{text}");
            assert_eq!(is_flushed(status), status == ffi::IBV_WC_WR_FLUSH_ERR);
        }
    }
}
