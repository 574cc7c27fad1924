//! How a queue pair is connected to another one.

use kvcache_core::{Error, ErrorKind, Result};

use super::cm::Id;
use super::generated::ibverbs as ffi;
use super::pair::{End, Pair, PairSettings};

/// How long a peer that is not ready is to wait before it tries again: 0.64 ms, as verbs number it.
const NOT_READY_TIMER: u8 = 12;

/// Tried again for ever when the peer is not ready: messages are bounded otherwise.
const NOT_READY_RETRIES: u8 = 7;

/// What must be known to connect a queue pair.
const CONNECTING: ffi::ibv_qp_attr_mask = ffi::IBV_QP_STATE
    | ffi::IBV_QP_AV
    | ffi::IBV_QP_PATH_MTU
    | ffi::IBV_QP_DEST_QPN
    | ffi::IBV_QP_RQ_PSN
    | ffi::IBV_QP_MAX_DEST_RD_ATOMIC
    | ffi::IBV_QP_MIN_RNR_TIMER;

/// How a queue pair that was connected by IP address reaches its peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reached {
    /// The entry of the port's GID table; none if packets are addressed by LID alone.
    pub(crate) gid_index: Option<u8>,
    /// As the enumeration of verbs has it.
    pub(crate) mtu: u8,
    pub(crate) traffic_class: u8,
    pub(crate) service_level: u8,
}

impl<T> Pair<T> {
    /// Connects it, after [`Pair::prepare`]; `first` is the number of the first packet that it sends.
    pub(crate) fn connect(&mut self, peer: &End, first: u32, how: &PairSettings) -> Result<()> {
        let mut attributes = Self::attributes(ffi::IBV_QPS_RTR);
        attributes.path_mtu = how.mtu.into();
        attributes.dest_qp_num = peer.pair;
        attributes.rq_psn = peer.first;
        attributes.max_dest_rd_atomic = how.reads_served;
        attributes.min_rnr_timer = NOT_READY_TIMER;
        attributes.ah_attr.port_num = how.port;
        attributes.ah_attr.dlid = peer.lid;
        attributes.ah_attr.sl = how.service_level;
        if how.is_global {
            attributes.ah_attr.is_global = 1;
            attributes.ah_attr.grh.dgid = ffi::ibv_gid { raw: peer.gid };
            attributes.ah_attr.grh.sgid_index = how.gid_index;
            attributes.ah_attr.grh.hop_limit = 64;
            attributes.ah_attr.grh.traffic_class = how.traffic_class;
        }
        self.modify(
            "connect a queue pair to the peer's",
            &mut attributes,
            CONNECTING,
        )?;
        self.let_send(first, how)
    }

    fn let_send(&mut self, first: u32, how: &PairSettings) -> Result<()> {
        let mut attributes = Self::attributes(ffi::IBV_QPS_RTS);
        attributes.sq_psn = first;
        attributes.timeout = how.timeout;
        attributes.retry_cnt = how.retries;
        attributes.rnr_retry = NOT_READY_RETRIES;
        attributes.max_rd_atomic = how.reads;
        let mask = ffi::IBV_QP_STATE
            | ffi::IBV_QP_SQ_PSN
            | ffi::IBV_QP_TIMEOUT
            | ffi::IBV_QP_RETRY_CNT
            | ffi::IBV_QP_RNR_RETRY
            | ffi::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify("let a queue pair send", &mut attributes, mask)
    }

    /// Connects it, after [`Pair::prepare`], the way that the kernel has found to its peer: addresses, packet numbers, partition
    /// and the greatest MTU are the connection's, all else is as it is wanted.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] over iWARP; [`ErrorKind::Io`] when the connection is of another port, or the system refuses it.
    pub(crate) fn connect_by(&mut self, id: &Id, how: &PairSettings) -> Result<Reached> {
        let (ready, _) = id.attributes(ffi::IBV_QPS_INIT)?;
        let (mut attributes, given) = id.attributes(ffi::IBV_QPS_RTR)?;
        if given & ffi::IBV_QP_AV == 0 {
            let text =
                "rdma_cm: the connection does not say how to reach the peer's queue pair (iWARP?)";
            return Err(Error::new(ErrorKind::Unsupported, text));
        }
        if attributes.ah_attr.port_num != how.port {
            let (port, wanted) = (attributes.ah_attr.port_num, how.port);
            let text = format!("rdma_cm: the way goes by port {port}, not by port {wanted}");
            return Err(Error::new(ErrorKind::Io, text));
        }
        attributes.path_mtu = attributes.path_mtu.min(how.mtu.into());
        attributes.max_dest_rd_atomic = how.reads_served;
        attributes.min_rnr_timer = NOT_READY_TIMER;
        let mut mask = CONNECTING;
        if ready.pkey_index != 0 {
            attributes.pkey_index = ready.pkey_index;
            mask |= ffi::IBV_QP_PKEY_INDEX;
        }
        let way = &mut attributes.ah_attr;
        if way.is_global != 0 && how.traffic_class > 0 {
            way.grh.traffic_class = how.traffic_class;
        }
        let reached = Reached {
            gid_index: (way.is_global != 0).then_some(way.grh.sgid_index),
            mtu: u8::try_from(attributes.path_mtu).unwrap_or(how.mtu),
            traffic_class: way.grh.traffic_class,
            service_level: way.sl,
        };
        self.modify("connect a queue pair to the peer's", &mut attributes, mask)?;
        let (sending, _) = id.attributes(ffi::IBV_QPS_RTS)?;
        self.let_send(sending.sq_psn, how)?;
        Ok(reached)
    }
}
