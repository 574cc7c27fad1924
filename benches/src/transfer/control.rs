//! What is paid before and beside the bytes: agents, first transfers, posts, notifications, lists, metadata, idleness.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvcache_core::{Error, ErrorKind, Result};
use kvfabric_sim::seed::Random;
use kvfabric_transfer::{
    Agent, Descriptor, HostMemory, Operation, PeerHandle, RegionId, RegionOptions, RequestOptions,
    Side,
};

use crate::clock::process_cpu;
use crate::recorder::Recorder;
use crate::report::{Case, OURS};
use crate::statistics::{Percentiles, Samples};

use super::plan::{BackendKind, Calls, Order, Plan, Shape, Way};
use super::polling;
use super::process::{Target, TargetAt};
use super::protocol::Ask;
use super::raw_tcp::RawTcp;
use super::subject::Subject;
use super::target::agent;

/// Bytes of a request whose post is timed.
const POST_BYTES: u64 = 64 << 20;
/// Bytes of a first transfer.
const FIRST_BYTES: u64 = 1 << 20;
/// Blocks of a long list, of 4 KiB each.
const LIST_BLOCKS: u32 = 65_536;
const LIST_BLOCK_BYTES: u64 = 4096;
/// Regions whose metadata are counted.
const REGIONS: usize = 1000;
/// How often each step is taken.
const STEPS: u32 = 20;
/// Notifications of each round.
const NOTIFICATIONS: u32 = 1000;
const NOTIFICATION_ROUNDS: u32 = 5;
/// Bytes of the answer in a bare exchange.
const PING_PONG_BYTES: u64 = 8;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long nothing is done.
const IDLE: Duration = Duration::from_secs(10);

/// Measures all of it; each figure has a case of its own name, with the way where it matters.
///
/// # Errors
/// What an agent or a target says.
pub(super) fn measure(recorder: &mut Recorder) -> Result<()> {
    for backend in [BackendKind::Shm, BackendKind::Tcp] {
        if recorder.stop().is_set() {
            return Ok(());
        }
        recorder.say(format!(
            "notifications and first transfers, {}",
            backend.name()
        ));
        notifications(backend, recorder)?;
        first_transfers(backend, recorder)?;
        long_posts(backend, recorder)?;
        recorder.step();
    }
    recorder.say("long lists, metadata");
    long_lists(recorder)?;
    metadata(recorder)?;
    recorder.step();
    if !recorder.stop().is_set() {
        recorder.say(format!("nothing, for {IDLE:?}"));
        idleness(recorder)?;
    }
    recorder.step();
    Ok(())
}

fn shape(backend: BackendKind, total_bytes: u64) -> Shape {
    Shape {
        backend,
        way: Way::Write,
        block_bytes: LIST_BLOCK_BYTES,
        total_bytes,
        request_blocks: 1,
        order: Order::Contiguous,
        seed: 1,
        threads: 1,
        in_flight: 1,
        calls: Calls::Prepared,
        layers: None,
    }
}

fn own_agent(backend: BackendKind) -> Result<Agent> {
    agent("initiator", backend, IpAddr::from(Ipv4Addr::LOCALHOST))
}

fn case(name: &str) -> Case<'_> {
    Case {
        subject: OURS,
        name,
    }
}

/// Sends back what another process sends, until it is dropped.
pub(super) struct Echo(Arc<AtomicBool>);

impl Echo {
    /// Learns of the peer and answers its notifications on a thread.
    pub(super) fn start(agent: &Agent, metadata: &[u8]) -> Result<Self> {
        let (agent, peer) = (agent.clone(), agent.load_peer(metadata)?);
        let ended = Arc::new(AtomicBool::new(false));
        let is_ended = ended.clone();
        let answer = move || {
            while !is_ended.load(Ordering::Relaxed) {
                for notification in agent.wait_notifications(Duration::from_millis(100)) {
                    // Whoever waits for it tells that it did not come.
                    if let Ok(sent) = agent.notify(&peer, notification.bytes) {
                        drop(sent.wait(PATIENCE));
                    }
                }
            }
        };
        std::thread::Builder::new()
            .name("echo".to_owned())
            .spawn(answer)
            .map_err(|error| Error::io("start a thread", error))?;
        Ok(Self(ended))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a bare exchange over TCP takes, between two processes that sleep in between.
fn ping_pong() -> Result<RawTcp> {
    let plan = Plan::new(Shape {
        way: Way::Read,
        block_bytes: PING_PONG_BYTES,
        ..shape(BackendKind::Tcp, PING_PONG_BYTES)
    })?;
    RawTcp::connect(&plan, &TargetAt::Spawned, false)
}

/// A round of steps, each of which tells how long it took.
fn timed(mut step: impl FnMut(u32) -> Result<Duration>) -> Result<Samples> {
    let mut round = Samples::default();
    for number in 0..NOTIFICATIONS {
        round.push_us(step(number)?);
    }
    Ok(round)
}

fn notifications(backend: BackendKind, recorder: &mut Recorder) -> Result<()> {
    let mut target = Target::open(&TargetAt::Spawned)?;
    let (_, metadata) = target.expose(shape(backend, FIRST_BYTES))?;
    let agent = own_agent(backend)?;
    let peer = agent.load_peer(&metadata)?;
    target.done(&Ask::Echo {
        metadata: agent.metadata().to_vec(),
    })?;
    let mut bare = ping_pong()?;
    let (mut round_trips, mut exchanges) = (Percentiles::default(), Percentiles::default());
    let mut polled = Percentiles::default();
    let (mut cpu_us, mut bare_cpu_us) = (Samples::default(), Samples::default());
    for _ in 0..NOTIFICATION_ROUNDS {
        let before = process_cpu() + target.cpu()?;
        let round = timed(|number| round_trip(&agent, &peer, number))?;
        let spent = process_cpu() + target.cpu()? - before;
        cpu_us.push_us(spent / NOTIFICATIONS);
        round_trips.push_round(&round);
        let before = bare.cpu()?;
        let round = timed(|_| {
            let start = Instant::now();
            bare.move_block(0)?;
            Ok(start.elapsed())
        })?;
        let spent = bare.cpu()?.since(before);
        bare_cpu_us.push_us(spent.total() / NOTIFICATIONS);
        exchanges.push_round(&round);
        polled.push_round(&polling::round(backend, NOTIFICATIONS)?);
    }
    let name = format!("notification-{}", backend.name());
    let ratio = round_trips.p50.ratio_to(&exchanges.p50);
    let polled_ratio = round_trips.p50.ratio_to(&polled.p50);
    recorder.extend(case(&name).row("p50_us", "µs", &round_trips.p50));
    recorder.extend(case(&name).row("p99_us", "µs", &round_trips.p99));
    recorder.extend(case(&name).row("cpu_us", "µs", &cpu_us));
    recorder.extend(case(&name).row("p50_ratio_to_ping_pong", "ratio", &ratio));
    recorder.extend(case(&name).row("p50_ratio_to_polling", "ratio", &polled_ratio));
    let bare = Case {
        subject: "ping-pong",
        name: &name,
    };
    recorder.extend(bare.row("p50_us", "µs", &exchanges.p50));
    recorder.extend(bare.row("p99_us", "µs", &exchanges.p99));
    recorder.extend(bare.row("cpu_us", "µs", &bare_cpu_us));
    let bare = Case {
        subject: "polling",
        name: &name,
    };
    recorder.extend(bare.row("p50_us", "µs", &polled.p50));
    recorder.extend(bare.row("p99_us", "µs", &polled.p99));
    Ok(())
}

/// Until the answer is in hand. That the notification was taken, which other libraries do not tell, is waited for after that.
fn round_trip(agent: &Agent, peer: &PeerHandle, number: u32) -> Result<Duration> {
    let bytes = number.to_le_bytes().to_vec();
    let start = Instant::now();
    let sent = agent.notify(peer, bytes.clone().into())?;
    let came = agent.wait_notifications(PATIENCE);
    let took = start.elapsed();
    if came.len() != 1 || came.iter().any(|one| *one.bytes != *bytes) {
        let context = format!("notification {number} did not come back: {came:?}");
        return Err(Error::new(ErrorKind::Corrupt, context));
    }
    sent.wait(PATIENCE)?;
    Ok(took)
}

fn first_transfers(backend: BackendKind, recorder: &mut Recorder) -> Result<()> {
    let mut target = Target::open(&TargetAt::Spawned)?;
    let (region, metadata) = target.expose(shape(backend, FIRST_BYTES))?;
    let (mut made, mut first) = (Samples::default(), Samples::default());
    for _ in 0..STEPS {
        let start = Instant::now();
        let agent = own_agent(backend)?;
        made.push(start.elapsed().as_secs_f64() * 1e3);
        let local = agent.register(
            HostMemory::anonymous(FIRST_BYTES)?,
            RegionOptions::default(),
        )?;
        local.fill_at(0, FIRST_BYTES, 1)?;
        let start = Instant::now();
        let peer = agent.load_peer(&metadata)?;
        let other = Descriptor {
            region: RegionId(region),
            offset: 0,
            len: FIRST_BYTES,
        };
        let pairs = [(local.descriptor(0, FIRST_BYTES), other)];
        let options = RequestOptions::default();
        let request = agent.transfer(Operation::Write, &pairs, Side::Peer(&peer), options)?;
        request.wait(PATIENCE)?;
        first.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let name = format!("first-transfer-{}", backend.name());
    recorder.extend(case(&name).row("agent_ms", "ms", &made));
    recorder.extend(case(&name).row("first_transfer_ms", "ms", &first));
    Ok(())
}

/// What the call that begins a request of many blocks takes, all of which lie apart from each other. Their bytes are waited for
/// before the next one.
fn long_posts(backend: BackendKind, recorder: &mut Recorder) -> Result<()> {
    let mut target = Target::open(&TargetAt::Spawned)?;
    let (region, metadata) = target.expose(shape(backend, POST_BYTES))?;
    let agent = own_agent(backend)?;
    let peer = agent.load_peer(&metadata)?;
    let local = agent.register(HostMemory::anonymous(POST_BYTES)?, RegionOptions::default())?;
    local.fill_at(0, POST_BYTES, 1)?;
    let blocks = POST_BYTES / LIST_BLOCK_BYTES;
    let pair = |at: u64| {
        let offset = at * LIST_BLOCK_BYTES;
        let other = Descriptor {
            region: RegionId(region),
            offset: (blocks - 1 - at) * LIST_BLOCK_BYTES,
            len: LIST_BLOCK_BYTES,
        };
        (local.descriptor(offset, LIST_BLOCK_BYTES), other)
    };
    let pairs: Vec<_> = (0..blocks).map(pair).collect();
    let (own, other): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let own = agent.prepare(Side::Local, &own)?;
    let other = agent.prepare(Side::Peer(&peer), &other)?;
    let request = agent.request(Operation::Read, &own, &other, RequestOptions::default())?;
    let mut posted = Samples::default();
    for _ in 0..STEPS {
        let start = Instant::now();
        request.post()?;
        posted.push_us(start.elapsed());
        request.wait(PATIENCE)?;
    }
    let name = format!("post-{}", backend.name());
    recorder.extend(case(&name).row("long_post_us", "µs", &posted));
    Ok(())
}

fn long_lists(recorder: &mut Recorder) -> Result<()> {
    let total_bytes = u64::from(LIST_BLOCKS) * LIST_BLOCK_BYTES;
    let mut target = Target::open(&TargetAt::Spawned)?;
    let (region, metadata) = target.expose(shape(BackendKind::Shm, total_bytes))?;
    let agent = own_agent(BackendKind::Shm)?;
    let peer = agent.load_peer(&metadata)?;
    let local = agent.register(
        HostMemory::anonymous(total_bytes)?,
        RegionOptions::default(),
    )?;
    let list = |stream, region| -> Vec<Descriptor> {
        let mut places: Vec<u32> = (0..LIST_BLOCKS).collect();
        Random::stream(1, stream).shuffle(&mut places);
        let block = |place| Descriptor {
            region,
            offset: u64::from(place) * LIST_BLOCK_BYTES,
            len: LIST_BLOCK_BYTES,
        };
        places.into_iter().map(block).collect()
    };
    let (own, other) = (list(1, local.id()), list(2, RegionId(region)));
    let (mut made, mut cpu) = (Samples::default(), Samples::default());
    for _ in 0..STEPS {
        let (start, before) = (Instant::now(), process_cpu());
        let own = agent.prepare(Side::Local, &own)?;
        let other = agent.prepare(Side::Peer(&peer), &other)?;
        let request = agent.request(Operation::Read, &own, &other, RequestOptions::default())?;
        made.push(start.elapsed().as_secs_f64() * 1e3);
        cpu.push((process_cpu() - before).as_secs_f64() * 1e3);
        drop(request);
    }
    recorder.extend(case("lists").row("prepare_and_create_ms", "ms", &made));
    recorder.extend(case("lists").row("prepare_and_create_cpu_ms", "ms", &cpu));
    Ok(())
}

fn metadata(recorder: &mut Recorder) -> Result<()> {
    let agent = own_agent(BackendKind::Tcp)?;
    let options = RegionOptions {
        remote_read: true,
        remote_write: true,
    };
    let regions = (0..REGIONS)
        .map(|_| agent.register(HostMemory::anonymous(LIST_BLOCK_BYTES)?, options))
        .collect::<Result<Vec<_>>>()?;
    let kilobytes = agent.metadata().len() as f64 / 1e3;
    drop(regions);
    recorder.extend(case("metadata").single("of_1000_regions", "KB", kilobytes));
    Ok(())
}

/// A process with an agent that has a connection and nothing to do.
fn idleness(recorder: &mut Recorder) -> Result<()> {
    let mut target = Target::open(&TargetAt::Spawned)?;
    let (_, metadata) = target.expose(shape(BackendKind::Tcp, FIRST_BYTES))?;
    let agent = own_agent(BackendKind::Tcp)?;
    let peer = agent.load_peer(&metadata)?;
    let _path = agent.path_to(&peer);
    let before = target.cpu()?;
    let start = Instant::now();
    while start.elapsed() < IDLE && !recorder.stop().is_set() {
        std::thread::sleep(IDLE / 100);
    }
    let share = (target.cpu()? - before).as_secs_f64() / start.elapsed().as_secs_f64();
    recorder.extend(case("idle-agent").single("cpu_percent", "% of a core", share * 100.0));
    Ok(())
}
