//! A holder that grants leases over real memory and lies about one thing at a time: whatever it says, the reader
//! takes no wrong byte for a block.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use kvcache_core::ports::{Holder, Located};
use kvcache_core::{BlockInfo, PodName, Tier};
use kvfabric_proto::v1;
use kvfabric_proto::v1::peer_server::{Peer, PeerServer};
use kvfabric_tiers::Source;
use kvfabric_transfer::{Agent, HostMemory, Region, RegionOptions};
use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::support::*;

/// One lie.
type About<T> = fn(&mut T);

/// What a holder does to its answers.
type Lie<T> = Box<dyn Fn(&mut T) + Send + Sync>;

/// A peer service written by hand: four blocks in memory, and what it says about them.
struct Holding {
    agent: Agent,
    blocks: Region,
    generations: Region,
    hello: Lie<v1::HelloResponse>,
    lease: Lie<v1::LeaseResponse>,
    released: Mutex<Vec<u64>>,
}

const HELD: u8 = 4;
const GENERATION: u64 = 7;

struct Service(Arc<Holding>);

#[tonic::async_trait]
impl Peer for Service {
    async fn hello(
        &self,
        _: Request<v1::HelloRequest>,
    ) -> Result<Response<v1::HelloResponse>, Status> {
        let mut response = v1::HelloResponse {
            protocol_version: kvfabric_proto::PROTOCOL_VERSION,
            version: "test".to_owned(),
            pod: "liar".to_owned(),
            agent_metadata: self.0.agent.metadata(),
            incarnation: 3,
        };
        (self.0.hello)(&mut response);
        Ok(Response::new(response))
    }

    async fn lease(
        &self,
        request: Request<v1::LeaseRequest>,
    ) -> Result<Response<v1::LeaseResponse>, Status> {
        let asked = request.get_ref().keys.len() / 32;
        let blocks = (0..asked.min(HELD.into()) as u64).map(|number| v1::LeasedBlock {
            region: self.0.blocks.id().0,
            offset: number * BLOCK,
            checksum_algorithm: 1,
            checksum: self
                .0
                .blocks
                .checksum(number * BLOCK, BLOCK)
                .unwrap()
                .into(),
            generation: GENERATION,
            generation_region: self.0.generations.id().0,
            generation_offset: number * 8,
            tier: v1::Tier::Dram as u32,
        });
        let mut response = v1::LeaseResponse {
            lease: 9,
            ttl_ms: 10_000,
            blocks: blocks.collect(),
        };
        (self.0.lease)(&mut response);
        Ok(Response::new(response))
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        self.0
            .released
            .lock()
            .unwrap()
            .push(request.get_ref().lease);
        Ok(Response::new(v1::ReleaseResponse {}))
    }

    async fn locate(
        &self,
        _: Request<v1::LocateRequest>,
    ) -> Result<Response<v1::LocateResponse>, Status> {
        Err(Status::unimplemented("nobody asks it where blocks are"))
    }

    async fn unpin(
        &self,
        _: Request<v1::UnpinRequest>,
    ) -> Result<Response<v1::UnpinResponse>, Status> {
        Err(Status::unimplemented("nobody pins anything here"))
    }
}

async fn liar(hello: Lie<v1::HelloResponse>, lease: Lie<v1::LeaseResponse>) -> Arc<Holding> {
    let agent = agent("liar", Way::Memcpy, None);
    let options = RegionOptions {
        remote_read: true,
        remote_write: false,
    };
    let memory = |bytes| {
        agent
            .register(HostMemory::shared(bytes).unwrap(), options)
            .unwrap()
    };
    let (blocks, generations) = (memory(BLOCK * u64::from(HELD)), memory(64));
    for (number, info) in (0..).zip(chain(1, HELD)) {
        blocks.write_at(number * BLOCK, &bytes_of(&info)).unwrap();
        generations.store_u64(number * 8, GENERATION).unwrap();
    }
    let released = Mutex::default();
    Arc::new(Holding {
        agent,
        blocks,
        generations,
        hello,
        lease,
        released,
    })
}

async fn serve(holding: &Arc<Holding>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = PeerServer::new(Service(holding.clone()));
    let server = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming(TcpIncoming::from(listener));
    tokio::spawn(server);
    address
}

/// What a reader gets from this holder, and the reader.
async fn read(holding: &Arc<Holding>, blocks: &[BlockInfo]) -> (Vec<Source>, Node) {
    let address = serve(holding).await;
    let pod = PodName::new("liar").unwrap();
    let hints = Located {
        holders: vec![Holder {
            pod,
            depth: blocks.len() as u32,
            peer_address: Some(address.to_string()),
        }],
        shared: Vec::new(),
    };
    let reader = Node::open(config("reader", 8), agent("reader", Way::Memcpy, None)).await;
    let sources = reader.fetch(blocks, hints).await;
    (sources, reader)
}

fn honest<T>() -> Lie<T> {
    Box::new(|_| {})
}

fn from_liar() -> Source {
    Source::Peer {
        pod: PodName::new("liar").unwrap(),
        tier: Tier::Host,
    }
}

/// The holder itself is sound: without a lie its blocks are read, and the lease is given back.
#[tokio::test]
async fn an_honest_holder_is_believed() {
    let holding = liar(honest(), honest()).await;
    let (sources, _reader) = read(&holding, &chain(1, HELD)).await;
    assert_eq!(sources, vec![from_liar(); HELD.into()]);
}

/// One lie about block 2 at a time: blocks 0 and 1 may be used, block 2 never.
#[tokio::test]
async fn a_lie_about_a_block_is_never_believed() {
    let lies: [(&str, About<v1::LeasedBlock>); 8] = [
        ("checksum", |block| block.checksum ^= 1),
        ("checksum's high half", |block| block.checksum |= 1 << 40),
        ("checksum algorithm", |block| block.checksum_algorithm = 200),
        ("another block's place", |block| block.offset -= BLOCK),
        ("beyond the region", |block| {
            block.offset = u64::MAX - BLOCK - 1
        }),
        ("unknown region", |block| block.region ^= 1),
        ("unknown region of generations", |block| {
            block.generation_region ^= 1
        }),
        ("tier", |block| block.tier = 17),
    ];
    for (what, lie) in lies {
        let holding = liar(honest(), Box::new(move |lease| lie(&mut lease.blocks[2]))).await;
        let (sources, _reader) = read(&holding, &chain(1, HELD)).await;
        assert_eq!(sources[2..], [Source::Miss, Source::Miss], "{what}");
    }
}

/// The slot was given to another block while we read: its word is another one now.
#[tokio::test]
async fn bytes_of_a_reused_slot_are_thrown_away_and_counted() {
    let holding = liar(honest(), honest()).await;
    holding.generations.store_u64(8, GENERATION + 1).unwrap();
    let (sources, reader) = read(&holding, &chain(1, HELD)).await;
    assert_eq!(
        sources,
        [from_liar(), Source::Miss, Source::Miss, Source::Miss]
    );
    assert_eq!(reader.stat("stale_reads").await, 1);
    assert_eq!(reader.stat("corrupt_blocks").await, 0);
}

/// Bytes that changed after the lease, with no word about it.
#[tokio::test]
async fn bytes_that_do_not_match_the_lease_are_counted_as_corrupt() {
    let change: Lie<v1::LeaseResponse> = Box::new(|lease| lease.blocks[0].checksum = 0x1234);
    let holding = liar(honest(), change).await;
    let (sources, reader) = read(&holding, &chain(1, 1)).await;
    assert_eq!(sources, [Source::Miss]);
    assert_eq!(reader.stat("corrupt_blocks").await, 1);
}

/// A lease that has ended before the bytes were there.
#[tokio::test]
async fn a_lease_that_has_ended_is_not_read_under() {
    let holding = liar(honest(), Box::new(|lease| lease.ttl_ms = 0)).await;
    let (sources, _reader) = read(&holding, &chain(1, HELD)).await;
    assert_eq!(sources, vec![Source::Miss; HELD.into()]);
}

/// More blocks than were asked for.
#[tokio::test]
async fn more_blocks_than_asked_for_are_refused() {
    let more: Lie<v1::LeaseResponse> = Box::new(|lease| lease.blocks.extend(lease.blocks.clone()));
    let holding = liar(honest(), more).await;
    let (sources, _reader) = read(&holding, &chain(1, 2)).await;
    assert_eq!(sources, vec![Source::Miss; 2]);
}

/// Another version, another name, damaged metadata: no connection.
#[tokio::test]
async fn a_holder_that_greets_wrongly_is_not_used() {
    let lies: [(&str, About<v1::HelloResponse>); 4] = [
        ("version", |hello| hello.protocol_version += 1),
        ("pod", |hello| hello.pod = "someone-else".to_owned()),
        ("nameless pod", |hello| hello.pod = String::new()),
        ("metadata", |hello| {
            let mut metadata = hello.agent_metadata.to_vec();
            let middle = metadata.len() / 2;
            metadata[middle] ^= 1;
            hello.agent_metadata = metadata.into();
        }),
    ];
    for (what, lie) in lies {
        let holding = liar(Box::new(lie), honest()).await;
        let (sources, _reader) = read(&holding, &chain(1, 2)).await;
        assert_eq!(sources, vec![Source::Miss; 2], "{what}");
    }
}
