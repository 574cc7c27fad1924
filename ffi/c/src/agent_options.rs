//! How an agent is made.

use std::ffi::c_char;
use std::mem::offset_of;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use kvfabric::transfer::{
    Agent, AgentBuilder, LOOK_DEFAULT, SLOW_AFTER_DEFAULT, TlsOptions, UcxOptions, VerbsOptions,
};
use kvfabric::{Error, Result};

use crate::boundary::{milliseconds, optional_text, slice, text};
use crate::device::{cuda_options, kvf_cuda_options};
use crate::node::kvf_setting;
use crate::options::{self, SizePrefixed};
use crate::place::{kvf_object_store, with_store};

/// What a number is set to where zero stands for the default, and nothing at all is wanted.
pub const KVF_OFF: u32 = 0xFFFF_FFFF;

/// Files in PEM of what TLS needs. They are read when the agent is made.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_tls_options {
    /// sizeof(struct kvf_tls_options).
    pub size: usize,
    /// The path of the certificates of the authorities that peers' must come from.
    pub authorities: *const c_char,
    /// The path of the agent's certificate, which has its name as a DNS name, and of those between it and the authority.
    pub certificates: *const c_char,
    /// The path of the key of the agent's certificate.
    pub key: *const c_char,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_tls_options {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_tls_options";
}

/// How RDMA is used. With all of it zero it is what is right for most networks.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_verbs_options {
    /// sizeof(struct kvf_verbs_options).
    pub size: usize,
    /// The ports that may be used, with commas between them, each a device, "mlx5_0", or device and port, "mlx5_0:2"; NULL: of
    /// those that are up all that are as near as the nearest one.
    pub device: *const c_char,
    /// Where peers ask for connections, by TCP, "IP:PORT"; NULL: the IP addresses of the GIDs and any free port. On InfiniBand,
    /// whose GIDs are no addresses, it must be said.
    pub listen: *const c_char,
    /// 1: `gid_index` is the entry of each port's GID table; 0: RoCE v2 with an IPv4 address first, then RoCE v2, then any.
    pub has_gid_index: u32,
    /// At most 255.
    pub gid_index: u32,
    /// The most bytes of content in a packet: 256, 512, 1024, 2048 or 4096; 0: what both ports do.
    pub mtu: u32,
    /// The traffic class of packets, at most 255; in RoCE v2 its upper six bits are the DSCP.
    pub traffic_class: u32,
    /// The service level, at most 15.
    pub service_level: u32,
    /// A packet that is not acknowledged is sent again after 4.096 microseconds times two to the power of this, at most
    /// 31; 0: 14.
    pub timeout: u32,
    /// How often it is sent again before the peer is given up, at most 7; 0: 7; KVF_OFF: never.
    pub retries: u32,
    /// How long the agent's thread looks for completions before it sleeps, while work is under way; 0: 20; KVF_OFF: it sleeps
    /// at once.
    pub polling_us: u32,
    /// What ports should be near to: the PCI address of a device, "0000:3b:00.0" for a GPU; NULL: the memory node whose
    /// processors alone this process may use, if it is bound to one.
    pub near: *const c_char,
    /// How many ports are used at most, the nearest first, at most 8; 0: 4. Large requests go over all of them.
    pub rails: u32,
    /// How queue pairs are connected, the same on both sides: "exchange", by what both tell each other over TCP, or "rdma_cm",
    /// through librdmacm, which must be in the system then: the kernel finds the way between IP addresses; NULL: "exchange".
    pub connect: *const c_char,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_verbs_options {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_verbs_options";
}

/// How an agent is made.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_agent_options {
    /// sizeof(struct kvf_agent_options).
    pub size: usize,
    /// How peers know it.
    pub name: *const c_char,
    /// Where TCP is served, "127.0.0.1:0" for any free port; NULL: TCP is not used. Without `tls` traffic is neither encrypted
    /// nor authenticated beyond region keys: stay on loopback or a trusted network.
    pub tcp_listen: *const c_char,
    /// 1: peers on this host are reached through shared memory; 0: they are not.
    pub shm: u32,
    /// 1: memory that cannot be shared is copied by the system between processes of one user on this host; 0: it is not.
    pub cma: u32,
    /// 1: peers are reached over UCX, which must be in the system then and takes its settings from the environment
    /// (UCX_TLS and others); 0: they are not. For trusted networks only.
    pub ucx: u32,
    /// The congestion control of TCP connections, such as "cubic" or "bbr"; NULL: the system's.
    pub tcp_congestion: *const c_char,
    /// The ways to peers that go first, by name and the best first: "tcp" or "tcp,shm"; NULL: the usual order.
    pub prefer: *const c_char,
    /// How many threads share a copy of 8 MiB or more within the process, at most 16; 0: half of the processors, at most 4.
    pub copy_threads: u32,
    /// The address that peers are told, where it differs from `tcp_listen`, as it must when that is unspecified; NULL: it does
    /// not.
    pub tcp_advertise: *const c_char,
    /// Further addresses to serve TCP on, at most 15, those of other network cards: "10.0.1.5:0,10.0.2.5:0". Peers are told
    /// all of them, and spread their connections over them. NULL: none.
    pub tcp_rails: *const c_char,
    /// Encrypts all TCP connections with TLS 1.3, and has both sides show certificates; NULL: neither.
    pub tls: *const kvf_tls_options,
    /// Settings of UCX by their names without "UCX_", such as "TLS"; others come from the environment. NULL: none.
    pub ucx_settings: *const kvf_setting,
    /// How many.
    pub ucx_setting_count: usize,
    /// Reaches peers by RDMA, with libibverbs and a device of this system, and lets them reach this agent; NULL: not at all.
    /// For trusted networks only.
    pub verbs: *const kvf_verbs_options,
    /// Only agents of these names may connect; NULL: all that know a region's key.
    pub allow_peers: *const *const c_char,
    /// How many.
    pub allow_peer_count: usize,
    /// How many TCP connections are made to a peer, at most 16, over which large transfers are striped; at least one to each
    /// of its addresses. 0: 1.
    pub tcp_connections: u32,
    /// How long those who wait for a transfer or a message look for it before they sleep, at most 1,000, as long as that
    /// pays; 0: 50; KVF_OFF: they sleep at once.
    pub look_us: u32,
    /// How long a way to a peer may stand still before what can be repeated goes another way; 0: 2,000; KVF_OFF: for ever.
    pub slow_after_ms: u32,
    /// 1: agents of this process are reached as those of other processes are; 0: by plain copies.
    pub no_memcpy: u32,
    /// How long each way to a peer may take to connect, and over RDMA and UCX the peer to hand out a region, at most 60,000;
    /// 0: 2,000. Ways are tried one after the other, so where a peer does not answer this delays the next one.
    pub connect_within_ms: u32,
    /// Zero.
    pub reserved: u32,
    /// Object stores for kvf_region_open_object; NULL: none.
    pub object_stores: *const *const kvf_object_store,
    /// How many.
    pub object_store_count: usize,
    /// Copies between host memory and memory of GPUs, and within a GPU, with the CUDA driver of this system; NULL: not at all.
    pub cuda: *const kvf_cuda_options,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_agent_options {
    const SIZE_MIN: usize = offset_of!(Self, tcp_congestion);
    const NAME: &'static str = "kvf_agent_options";
}

/// What these options make.
///
/// # Safety
/// `options` is null or readable for its size; what it points to is null or valid.
pub(crate) unsafe fn builder(options: *const kvf_agent_options) -> Result<AgentBuilder> {
    // SAFETY: null or readable for its size, by this function's contract.
    let options = unsafe { options::read(options) }?;
    // SAFETY: null or a string, by this function's contract.
    let name = unsafe { text(options.name, "kvf_agent_options.name") }?;
    let place = "kvf_agent_options.prefer";
    // SAFETY: null or a string, by this function's contract.
    let prefer = unsafe { optional_text(options.prefer, place) }?;
    let builder = Agent::builder(name)
        .shm(parse_flag(options.shm, "kvf_agent_options.shm")?)
        .cma(parse_flag(options.cma, "kvf_agent_options.cma")?)
        .memcpy(!parse_flag(
            options.no_memcpy,
            "kvf_agent_options.no_memcpy",
        )?)
        .prefer(listed(prefer))
        .look(microseconds(options.look_us, LOOK_DEFAULT))
        .slow_after(match options.slow_after_ms {
            0 => Some(SLOW_AFTER_DEFAULT),
            KVF_OFF => None,
            count => Some(milliseconds(count)),
        });
    let builder = match options.copy_threads {
        0 => builder,
        threads => builder.copy_threads(threads as usize),
    };
    // SAFETY: what they point to is null or valid, by this function's contract.
    let builder = unsafe { with_tcp(builder, &options) }?;
    // SAFETY: what they point to is null or valid, by this function's contract.
    let mut builder = unsafe { with_rdma(builder, &options) }?;
    options::check_reserved(options.reserved, "kvf_agent_options")?;
    // SAFETY: null or readable for its size, by this function's contract.
    builder = builder.cuda(unsafe { cuda_options(options.cuda) }?);
    if options.connect_within_ms > 0 {
        builder = builder.connect_within(milliseconds(options.connect_within_ms));
    }
    let (place, count) = (
        "kvf_agent_options.object_stores",
        options.object_store_count,
    );
    // SAFETY: null or readable for its count, by this function's contract.
    for &store in unsafe { slice(options.object_stores, count, place) }? {
        // SAFETY: null or readable for its size, with valid strings, by this function's contract.
        builder = unsafe { with_store(builder, store) }?;
    }
    if options.allow_peers.is_null() {
        return Ok(builder);
    }
    let (place, count) = ("kvf_agent_options.allow_peers", options.allow_peer_count);
    // SAFETY: readable for its count, by this function's contract.
    let names = unsafe { slice(options.allow_peers, count, place) }?;
    // SAFETY: each is null or a string, by this function's contract.
    let allowed = names.iter().map(|&name| unsafe { text(name, place) });
    Ok(builder.allow_peers(allowed.collect::<Result<Vec<_>>>()?))
}

/// # Safety
/// What `options` points to is null or valid.
unsafe fn with_tcp(builder: AgentBuilder, options: &kvf_agent_options) -> Result<AgentBuilder> {
    let place = "kvf_agent_options.tcp_listen";
    // SAFETY: null or a string, by this function's contract.
    let listen = unsafe { optional_address(options.tcp_listen, place) }?;
    let place = "kvf_agent_options.tcp_advertise";
    // SAFETY: null or a string, by this function's contract.
    let advertised = unsafe { optional_address(options.tcp_advertise, place) }?;
    let place = "kvf_agent_options.tcp_rails";
    // SAFETY: null or a string, by this function's contract.
    let rails = unsafe { optional_text(options.tcp_rails, place) }?;
    let rails = listed(rails);
    let rails = rails.iter().map(|rail| parse_address(rail, place));
    let place = "kvf_agent_options.tcp_congestion";
    // SAFETY: null or a string, by this function's contract.
    let congestion = unsafe { optional_text(options.tcp_congestion, place) }?;
    // SAFETY: null or readable for its size, by this function's contract.
    let tls = unsafe { options::read_optional(options.tls) }?;
    let tls = tls
        // SAFETY: its strings are null or valid, by this function's contract.
        .map(|tls| unsafe { parse_tls(&tls) })
        .transpose()?;
    Ok(builder
        .tcp(listen)
        .tcp_advertise(advertised)
        .tcp_rails(rails.collect::<Result<Vec<_>>>()?)
        .tcp_connections(options.tcp_connections.max(1) as usize)
        .tcp_congestion(congestion)
        .tcp_tls(tls))
}

/// # Safety
/// Its strings are null or valid.
unsafe fn parse_tls(options: &kvf_tls_options) -> Result<TlsOptions> {
    // SAFETY: null or a string, by this function's contract.
    let authorities = unsafe { text(options.authorities, "kvf_tls_options.authorities") }?;
    // SAFETY: null or a string, by this function's contract.
    let certificates = unsafe { text(options.certificates, "kvf_tls_options.certificates") }?;
    // SAFETY: null or a string, by this function's contract.
    let key = unsafe { text(options.key, "kvf_tls_options.key") }?;
    TlsOptions::from_files(
        Path::new(authorities),
        Path::new(certificates),
        Path::new(key),
    )
}

/// # Safety
/// What `options` points to is null or valid.
unsafe fn with_rdma(builder: AgentBuilder, options: &kvf_agent_options) -> Result<AgentBuilder> {
    let ucx = parse_flag(options.ucx, "kvf_agent_options.ucx")?;
    let (place, count) = ("kvf_agent_options.ucx_settings", options.ucx_setting_count);
    // SAFETY: null or readable for its count, by this function's contract.
    let given = unsafe { slice(options.ucx_settings, count, place) }?;
    let mut settings = Vec::with_capacity(given.len());
    for (position, setting) in given.iter().enumerate() {
        let at = |error: Error| error.at(format_args!("{place}: setting {position}"));
        // SAFETY: null or a string, by this function's contract.
        let key = unsafe { text(setting.key, "key") }.map_err(at)?;
        // SAFETY: null or a string, by this function's contract.
        let value = unsafe { text(setting.value, "value") }.map_err(at)?;
        settings.push((key.to_owned(), value.to_owned()));
    }
    // SAFETY: null or readable for its size, by this function's contract.
    let verbs = unsafe { options::read_optional(options.verbs) }?;
    let verbs = verbs
        // SAFETY: its strings are null or valid, by this function's contract.
        .map(|verbs| unsafe { parse_verbs(&verbs) })
        .transpose()?;
    Ok(builder
        .ucx(ucx.then_some(UcxOptions { settings }))
        .verbs(verbs))
}

/// # Safety
/// Its strings are null or valid.
unsafe fn parse_verbs(options: &kvf_verbs_options) -> Result<VerbsOptions> {
    let place = "kvf_verbs_options.device";
    // SAFETY: null or a string, by this function's contract.
    let device = unsafe { optional_text(options.device, place) }?;
    let place = "kvf_verbs_options.listen";
    // SAFETY: null or a string, by this function's contract.
    let listen = unsafe { optional_address(options.listen, place) }?;
    let place = "kvf_verbs_options.near";
    // SAFETY: null or a string, by this function's contract.
    let near = unsafe { optional_text(options.near, place) }?;
    let place = "kvf_verbs_options.connect";
    // SAFETY: null or a string, by this function's contract.
    let connect = unsafe { optional_text(options.connect, place) }?;
    let connect = connect.map(str::parse).transpose()?;
    let default = VerbsOptions::default();
    let place = "kvf_verbs_options.gid_index";
    let gid_index = parse_byte(options.gid_index, place)?;
    let has_gid_index = parse_flag(options.has_gid_index, "kvf_verbs_options.has_gid_index")?;
    Ok(VerbsOptions {
        device: device.map(str::to_owned),
        rails: match options.rails {
            0 => default.rails,
            count => parse_byte(count, "kvf_verbs_options.rails")?,
        },
        near: near.map(str::to_owned),
        connect: connect.unwrap_or_default(),
        gid_index: has_gid_index.then_some(gid_index),
        listen,
        mtu: (options.mtu > 0).then_some(options.mtu),
        traffic_class: parse_byte(options.traffic_class, "kvf_verbs_options.traffic_class")?,
        service_level: parse_byte(options.service_level, "kvf_verbs_options.service_level")?,
        timeout: match options.timeout {
            0 => default.timeout,
            exponent => parse_byte(exponent, "kvf_verbs_options.timeout")?,
        },
        retries: match options.retries {
            0 => default.retries,
            KVF_OFF => 0,
            count => parse_byte(count, "kvf_verbs_options.retries")?,
        },
        polling: microseconds(options.polling_us, default.polling),
    })
}

/// # Safety
/// `address` is null, or a string with a terminating NUL that nobody changes meanwhile.
unsafe fn optional_address(address: *const c_char, place: &str) -> Result<Option<SocketAddr>> {
    // SAFETY: passed on to the caller, word for word.
    let address = unsafe { optional_text(address, place) }?;
    address
        .map(|address| parse_address(address, place))
        .transpose()
}

fn parse_address(address: &str, place: &str) -> Result<SocketAddr> {
    address
        .parse()
        .map_err(|_| Error::invalid(place, format!("{address:?}"), "IP:PORT"))
}

/// The words of a list with commas.
pub(crate) fn listed(names: Option<&str>) -> Vec<String> {
    let names = names.into_iter().flat_map(|names| names.split(','));
    names.map(|name| name.trim().to_owned()).collect()
}

pub(crate) fn parse_flag(value: u32, place: &str) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::invalid(place, value, 0..=1)),
    }
}

fn parse_byte(value: u32, place: &str) -> Result<u8> {
    u8::try_from(value).map_err(|_| Error::invalid(place, value, 0..=255))
}

/// A caller's microseconds, where zero stands for the default.
pub(crate) fn microseconds(count: u32, default: Duration) -> Duration {
    match count {
        0 => default,
        KVF_OFF => Duration::ZERO,
        count => Duration::from_micros(count.into()),
    }
}
