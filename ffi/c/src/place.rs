//! Files and objects as regions: places that transfers read and write beside memory.

use std::ffi::c_char;
use std::path::PathBuf;

use kvfabric::transfer::{
    AgentBuilder, DirectMode, FileEngineMode, FileOptions, ObjectChecksum, ObjectOptions,
    ObjectWrite, Secret,
};
use kvfabric::{Error, Result};

use crate::agent::kvf_agent;
use crate::agent_options::{KVF_OFF, parse_flag};
use crate::boundary::{Listing, Out, boundary, enter, into_raw, milliseconds, optional_text, text};
use crate::options::{self, SizePrefixed};
use crate::region::kvf_region;
use crate::status::kvf_status;

/// Where it can be, the page cache is passed by, or used on the way of what is not aligned.
pub const KVF_DIRECT_AUTO: u32 = 0;
/// The page cache is passed by, or the file is refused.
pub const KVF_DIRECT_ON: u32 = 1;
/// All goes through the page cache.
pub const KVF_DIRECT_OFF: u32 = 2;

/// io_uring, or threads where the system refuses that.
pub const KVF_FILES_AUTO: u32 = 0;
/// io_uring.
pub const KVF_FILES_URING: u32 = 1;
/// Threads that read and write one range at a time.
pub const KVF_FILES_THREADS: u32 = 2;

/// An object that is there is replaced, at once and whole.
pub const KVF_OBJECT_REPLACE: u32 = 0;
/// A write fails with KVF_DENIED when the object is there.
pub const KVF_OBJECT_CREATE: u32 = 1;
/// An object of the same size stays, and a write of it is done without sending anything.
pub const KVF_OBJECT_KEEP: u32 = 2;

/// SHA-256 goes with each write to S3 for the store to check.
pub const KVF_OBJECT_SHA256: u32 = 0;
/// CRC-64/NVME does.
pub const KVF_OBJECT_CRC64NVME: u32 = 1;
/// Nothing does, for stores that refuse it.
pub const KVF_OBJECT_UNCHECKED: u32 = 2;

/// How a file is opened. With all of it zero: a file that is there, of its length now.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_file_options {
    /// sizeof(struct kvf_file_options).
    pub size: usize,
    /// Its length as a region, in bytes; a shorter file is extended. 0: its length now.
    pub len: u64,
    /// 1: it is made when it is missing; 0: it is not.
    pub create: u32,
    /// 1: writes are refused; 0: they are not.
    pub read_only: u32,
    /// 1: the space of `len` is reserved at once, so that a full disk shows here; 0: it is not.
    pub preallocate: u32,
    /// A KVF_DIRECT_ value.
    pub direct: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_file_options {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_file_options";
}

/// How an object store is reached. What is NULL comes from the usual environment variables of its kind of store (AWS_...,
/// GOOGLE_..., AZURE_...), and credentials after that from the instance.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvf_object_store {
    /// sizeof(struct kvf_object_store).
    pub size: usize,
    /// What kvf_region_open_object calls it.
    pub name: *const c_char,
    /// "file:///directory" (made when missing), "s3://bucket/prefix", "gs://bucket/prefix" or "az://container/prefix".
    pub url: *const c_char,
    /// The service's URL, when it is not the provider's own.
    pub endpoint: *const c_char,
    /// S3: the region to sign for.
    pub region: *const c_char,
    /// Who we are. S3: the id of the access key; Azure: the storage account.
    pub access_key: *const c_char,
    /// Proves it. S3: the secret key; GCS: the JSON of a service account's key; Azure: the account's key. Never logged.
    pub secret_key: *const c_char,
    /// S3: what belongs to temporary credentials; GCS and Azure: a bearer token. Never logged.
    pub session_token: *const c_char,
    /// PEM file of authorities that are believed beside the system's; NULL: none.
    pub authorities: *const c_char,
    /// Longer objects are written and read in parts of so many bytes, 5 MiB to 256 MiB; 0: 16 MiB.
    pub part_bytes: u64,
    /// 1: an endpoint without TLS is accepted; 0: it is not.
    pub allow_http: u32,
    /// A KVF_OBJECT_ checksum: what goes with each write to S3 for the store to check.
    pub checksum: u32,
    /// Parts of one object at once, at most 64; 0: 4.
    pub parts_in_flight: u32,
    /// Requests to the store at once, at most 1,024; 0: 32.
    pub requests_in_flight: u32,
    /// How long one attempt may go without an answer or a byte; 0: 10,000.
    pub attempt_timeout_ms: u32,
    /// How often a failed attempt is repeated; 0: 3; KVF_OFF: never.
    pub retries: u32,
}

// SAFETY: `repr(C)`, `size` is its first field, and pointers and numbers take any bit pattern.
unsafe impl SizePrefixed for kvf_object_store {
    const SIZE_MIN: usize = size_of::<Self>();
    const NAME: &'static str = "kvf_object_store";
}

/// Makes a store known to the agent that is being made.
///
/// # Safety
/// `store` is null or readable for its size, and its strings are null or valid.
pub(crate) unsafe fn with_store(
    builder: AgentBuilder,
    store: *const kvf_object_store,
) -> Result<AgentBuilder> {
    // SAFETY: null or readable for its size, by this function's contract.
    let store = unsafe { options::read(store) }?;
    // SAFETY: null or a string, by this function's contract.
    let name = unsafe { text(store.name, "kvf_object_store.name") }?;
    // SAFETY: null or a string, by this function's contract.
    let url = unsafe { text(store.url, "kvf_object_store.url") }?;
    // SAFETY: null or strings, by this function's contract.
    let options = unsafe { store_options(&store) }?;
    Ok(builder.object_store(name, url, options))
}

/// # Safety
/// Its strings are null or valid.
unsafe fn store_options(store: &kvf_object_store) -> Result<ObjectOptions> {
    let optional = |text: *const c_char, field: &str| {
        let place = format!("kvf_object_store.{field}");
        // SAFETY: null or a string, by this function's contract.
        let text = unsafe { optional_text(text, &place) }?;
        Ok::<_, Error>(text.map(str::to_owned))
    };
    // An error quotes what is wrong, and this is not to be said again.
    let secret = |text: *const c_char, field: &str| {
        optional(text, field)
            .map(|text| text.map(Secret::new))
            .map_err(|e| {
                let text = format!("kvf_object_store.{field} is not UTF-8");
                Error::new(e.kind(), text)
            })
    };
    let default = ObjectOptions::default();
    Ok(ObjectOptions {
        endpoint: optional(store.endpoint, "endpoint")?,
        region: optional(store.region, "region")?,
        access_key: optional(store.access_key, "access_key")?,
        secret_key: secret(store.secret_key, "secret_key")?,
        session_token: secret(store.session_token, "session_token")?,
        authorities: optional(store.authorities, "authorities")?.map(PathBuf::from),
        allow_http: parse_flag(store.allow_http, "kvf_object_store.allow_http")?,
        checksum: match store.checksum {
            KVF_OBJECT_SHA256 => ObjectChecksum::Sha256,
            KVF_OBJECT_CRC64NVME => ObjectChecksum::Crc64Nvme,
            KVF_OBJECT_UNCHECKED => ObjectChecksum::Off,
            other => return Err(Error::invalid("kvf_object_store.checksum", other, 0..=2)),
        },
        part_bytes: or_default(store.part_bytes, default.part_bytes),
        parts_in_flight_max: or_default(
            store.parts_in_flight as usize,
            default.parts_in_flight_max,
        ),
        concurrency_max: or_default(store.requests_in_flight as usize, default.concurrency_max),
        attempt_timeout: match store.attempt_timeout_ms {
            0 => default.attempt_timeout,
            count => milliseconds(count),
        },
        retries_max: match store.retries {
            0 => default.retries_max,
            KVF_OFF => 0,
            count => count as usize,
        },
        retry_budget: default.retry_budget,
    })
}

fn or_default<T: PartialEq + Default>(given: T, default: T) -> T {
    if given == T::default() {
        default
    } else {
        given
    }
}

/// Opens a file as a region, for the remote side of transfers without a peer. Its kvf_region_base is NULL.
///
/// `options` NULL: a file that is there, of its length now. KVF_NOT_FOUND and KVF_DENIED as the system says, KVF_INVALID for
/// something that is no regular file or is shorter than asked and read-only, KVF_NO_SPACE when the space cannot be reserved,
/// KVF_UNSUPPORTED when the page cache is to be passed by and cannot be. All name the path.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `path` a string, `options` for its size in reads, `region_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_open_file(
    agent: *const kvf_agent,
    path: *const c_char,
    options: *const kvf_file_options,
    region_out: *mut *mut kvf_region,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        // SAFETY: null or a string, by contract.
        let path = unsafe { text(path, "path") }?;
        // SAFETY: null or readable for its size, by contract.
        let options = unsafe { options::read_optional(options) }?;
        let options = options.map(|options| file_options(&options)).transpose()?;
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(region_out, "region_out") }?;
        let region = agent.agent.open_file(path, &options.unwrap_or_default())?;
        out.write(into_raw(kvf_region::of_place(&agent, region)));
        Ok(())
    })
}

fn file_options(options: &kvf_file_options) -> Result<FileOptions> {
    Ok(FileOptions {
        create: parse_flag(options.create, "kvf_file_options.create")?,
        len_bytes: Some(options.len).filter(|&len| len > 0),
        preallocate: parse_flag(options.preallocate, "kvf_file_options.preallocate")?,
        direct: match options.direct {
            KVF_DIRECT_AUTO => DirectMode::Auto,
            KVF_DIRECT_ON => DirectMode::On,
            KVF_DIRECT_OFF => DirectMode::Off,
            other => return Err(Error::invalid("kvf_file_options.direct", other, 0..=2)),
        },
        read_only: parse_flag(options.read_only, "kvf_file_options.read_only")?,
    })
}

/// Has everything that was written to a file before brought to its device, and waits at most `timeout_ms` for that.
///
/// KVF_UNSUPPORTED when the region is no file, KVF_IO and KVF_NO_SPACE as the device says.
///
/// # Safety
/// `region` is null or live.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_sync(region: *const kvf_region, timeout_ms: u32) -> kvf_status {
    boundary(|| {
        let region = enter(region, "region")?;
        let mut synced = region.region().sync()?;
        synced.wait(milliseconds(timeout_ms))
    })
}

/// Starts what reads and writes files, a KVF_FILES_ value, unless a file was opened before; copies out how it talks to the
/// system, and why.
///
/// With `buffer` NULL only its length is told, which counts the terminating NUL. KVF_INVALID when `capacity` is too small;
/// `len_out` is written then too. KVF_UNSUPPORTED when io_uring is wanted and the system refuses it.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `buffer` for `capacity` writes, `len_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_agent_start_files(
    agent: *const kvf_agent,
    mode: u32,
    buffer: *mut c_char,
    capacity: usize,
    len_out: *mut usize,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        let mode = match mode {
            KVF_FILES_AUTO => FileEngineMode::Auto,
            KVF_FILES_URING => FileEngineMode::Uring,
            KVF_FILES_THREADS => FileEngineMode::Blocking,
            other => return Err(Error::invalid("mode", other, 0..=2)),
        };
        // SAFETY: null or writable, `buffer` for `capacity` values, by contract.
        let listing = unsafe { Listing::new(buffer.cast(), capacity, len_out, "buffer") }?;
        listing.fill_text(&agent.agent.start_file_engine(mode)?, "report")
    })
}

/// An object of a store of kvf_agent_options as a region, for the remote side of transfers without a peer; it need not be
/// there. A write puts the whole object, so its ranges must cover it from 0 on without a gap; a read gets ranges. `when_there`
/// is what a write does then, a KVF_OBJECT_ value. Its kvf_region_base is NULL, and its kvf_region_len UINT64_MAX: only the
/// store can tell.
///
/// KVF_NOT_FOUND for an unknown store, KVF_INVALID for a bad key.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `store` and `key` strings, `region_out` for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_region_open_object(
    agent: *const kvf_agent,
    store: *const c_char,
    key: *const c_char,
    when_there: u32,
    region_out: *mut *mut kvf_region,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        // SAFETY: null or a string, by contract.
        let store = unsafe { text(store, "store") }?;
        // SAFETY: null or a string, by contract.
        let key = unsafe { text(key, "key") }?;
        let write = match when_there {
            KVF_OBJECT_REPLACE => ObjectWrite::Replace,
            KVF_OBJECT_CREATE => ObjectWrite::Create,
            KVF_OBJECT_KEEP => ObjectWrite::Keep,
            other => return Err(Error::invalid("when_there", other, 0..=2)),
        };
        // SAFETY: null or writable, by contract.
        let out = unsafe { Out::new(region_out, "region_out") }?;
        let region = agent.agent.object_for(store, key, write)?;
        out.write(into_raw(kvf_region::of_place(&agent, region)));
        Ok(())
    })
}

/// Removes an object, and waits at most `timeout_ms` for that; that there is none is fine.
///
/// KVF_NOT_FOUND for an unknown store, KVF_INVALID for a bad key, otherwise what the store says. After KVF_TIMEOUT it may still
/// be removed.
///
/// # Safety
/// Each pointer is null or valid: `agent` live, `store` and `key` strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvf_agent_remove_object(
    agent: *const kvf_agent,
    store: *const c_char,
    key: *const c_char,
    timeout_ms: u32,
) -> kvf_status {
    boundary(|| {
        let agent = enter(agent, "agent")?;
        // SAFETY: null or a string, by contract.
        let store = unsafe { text(store, "store") }?;
        // SAFETY: null or a string, by contract.
        let key = unsafe { text(key, "key") }?;
        let mut removed = agent.agent.object_delete(store, key)?;
        removed.wait(milliseconds(timeout_ms))
    })
}

impl kvf_region {
    pub(crate) fn of_place(agent: &kvf_agent, region: kvfabric::transfer::Region) -> Self {
        Self::new(agent.life.clone(), agent.agent.clone(), region)
    }
}
