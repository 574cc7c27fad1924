//! Making a cache: tiers, recovery, the first snapshot, the driver and the peer service.

use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use kvcache_core::event::NodeEvent;
use kvcache_core::manager::{Limits, Manager};
use kvcache_core::ports::{Directory, EventSink};
use kvcache_core::{Error, ErrorKind, Result, Time};
use kvfabric_transfer::{Agent, DESCRIPTORS_MAX};
use tokio::sync::watch;

use super::announce::Announcer;
use super::desk::Desk;
use super::driver::{Driver, Parts, publish};
use super::{Cache, Inner, Locator};
use crate::arena::Arena;
use crate::config::CacheConfig;
use crate::disk::{PAGE_BYTES, SegmentFiles};
use crate::mover::{DeviceSums, Faults, Lift, Mover, Objects};
use crate::numbers::Numbers;
use crate::object::ObjectNames;
use crate::peer::{PeerServer, Peers, Serving};
use crate::record::Expected;
use crate::scratch::Scratch;

/// Blocks on their way from disk to the object store at a time.
const STAGING_BLOCKS: u32 = 8;

/// Pages for headers and generation words, at most: 256 MiB.
const PAGES_MAX: u32 = 1 << 16;

pub(super) async fn open(
    config: CacheConfig,
    agent: Agent,
    directory: Arc<dyn Directory>,
    sink: Arc<dyn EventSink>,
) -> Result<Cache> {
    config.check()?;
    let limits = config.manager_limits()?;
    let start = Instant::now();
    let mover = Arc::new(mover(&config, &limits, agent)?);
    let mut manager = Manager::new(limits.clone())?;
    let mut scan_faults = 0;
    if let Some(disk) = &mover.disk {
        let recovered = disk.recover(limits.disk_segments).await?;
        scan_faults = recovered.faults.len() as u64 + recovered.unreadable;
        let found = recovered.blocks.len();
        let taken = manager.handle_recovered(Time::default(), recovered.blocks);
        tracing::info!(found, taken, skipped = scan_faults, "disk tier recovered");
    }
    let (position, positions) = watch::channel(sink.publish(vec![NodeEvent::Cleared]));
    let announcer = Arc::new(Announcer::new(sink, position));
    publish(&mut manager, |events| announcer.tell(events));
    let (desk, requests) = Desk::new();
    let incarnation = incarnation()?;
    let numbers = Numbers::of(incarnation);
    let locator = Arc::new(Locator {
        desk: desk.clone(),
        mover: mover.clone(),
        directory,
        pod: config.pod.clone(),
        timeout: config.locate_timeout,
    });
    let serving = Serving {
        desk: desk.clone(),
        mover: mover.clone(),
        locator: locator.clone(),
        names: config.names.clone(),
        pod: config.pod.clone(),
        incarnation,
        numbers,
    };
    let server = match config.peer_listen {
        None => None,
        Some(listen) => Some(PeerServer::start(listen, serving).await?),
    };
    let leases_per_peer_max = config.peers.leases_per_peer_max;
    let parts = Parts {
        manager,
        mover: mover.clone(),
        announcer: announcer.clone(),
        requests,
        start,
        leases_per_peer_max,
    };
    let driver = tokio::spawn(Driver::new(parts).run(desk.health()));
    let pieces_max = DESCRIPTORS_MAX / limits.batch_blocks_max as usize;
    let inner = Inner {
        desk,
        mover,
        locator,
        announcer,
        position: positions,
        pod: config.pod,
        pieces_max,
        scan_faults,
        peer_address: server.as_ref().map(PeerServer::address),
        server: Mutex::new(server),
        driver,
    };
    Ok(Cache {
        inner: Arc::new(inner),
    })
}

fn mover(config: &CacheConfig, limits: &Limits, agent: Agent) -> Result<Mover> {
    let shared = config.peer_listen.is_some();
    let arena = Arena::new(&agent, limits.host_slots, config.block_bytes, shared)?;
    // A page for every block under way, so that none waits for another's.
    let pages = limits
        .commands_in_flight_max
        .saturating_mul(limits.batch_blocks_max);
    let pages = Scratch::new(
        &agent,
        pages.clamp(limits.batch_blocks_max, PAGES_MAX),
        PAGE_BYTES,
    )?;
    let disk = match (&config.disk, config.segment_layout()?) {
        (Some(disk), Some(layout)) => {
            let identity = config.model_identity;
            Some(SegmentFiles::open(
                &agent,
                disk,
                layout,
                identity,
                pages.clone(),
            )?)
        }
        _ => None,
    };
    let objects = match &config.object {
        None => None,
        Some(object) => {
            let names = ObjectNames::new(&object.prefix, &config.model_identity)?;
            Some(Objects {
                store_name: object.store_name.clone(),
                names,
                doubted: Mutex::default(),
            })
        }
    };
    let staging = match (&disk, &objects) {
        (Some(_), Some(_)) => Some(Scratch::new(&agent, STAGING_BLOCKS, config.block_bytes)?),
        _ => None,
    };
    let peers = Arc::new(Peers::new(&agent, config));
    let expected = Expected {
        model_identity: config.model_identity,
        block_bytes: config.block_bytes,
    };
    let faults = Faults::default();
    let sums = DeviceSums::new(&agent, config.device_sums);
    Ok(Mover {
        agent,
        arena,
        disk,
        objects,
        peers,
        pages,
        staging,
        lift: Lift::default(),
        sums,
        expected,
        faults,
    })
}

/// A number that no earlier run of this node had: the time it started, in nanoseconds.
fn incarnation() -> Result<u64> {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|error| {
            Error::new(ErrorKind::Internal, "the clock is set before 1970").with_source(error)
        })?;
    Ok(since.as_nanos() as u64)
}
