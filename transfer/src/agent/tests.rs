//! What a peer can do that knows more than strangers do, and less than the metadata say.

use std::net::{Ipv4Addr, SocketAddr};

use super::*;
use crate::UcxOptions;

const WAIT: Duration = Duration::from_secs(30);

/// Each way alone.
fn ways() -> [fn(AgentBuilder) -> AgentBuilder; 5] {
    [
        |builder| builder.shm(false),
        |builder| builder.memcpy(false).cma(false),
        |builder| builder.memcpy(false).shm(false).cma(true),
        |builder| {
            let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            builder.memcpy(false).shm(false).tcp(Some(listen))
        },
        |builder| {
            let ucx = Some(UcxOptions::default());
            builder.memcpy(false).shm(false).ucx(ucx)
        },
    ]
}

/// The region's number is right, and one bit of its key is wrong: by every way, bytes neither come nor go.
#[test]
fn a_guessed_key_is_refused() {
    let open = RegionOptions {
        remote_read: true,
        remote_write: true,
    };
    for (way, build) in ways().into_iter().enumerate() {
        let target = build(Agent::builder("target")).build().unwrap();
        let memory = match way {
            2 => HostMemory::anonymous(4096),
            _ => HostMemory::shared(4096),
        };
        let region = target.register(memory.unwrap(), open).unwrap();
        for flipped in [None, Some(0), Some(127)] {
            let mut card = PeerCard::decode(&target.metadata()).unwrap();
            let exported = Arc::get_mut(&mut card.regions[0]).unwrap();
            if let Some(bit) = flipped {
                exported.key.0[bit / 8] ^= 1 << (bit % 8);
            }
            let agent = build(Agent::builder("stranger")).build().unwrap();
            let own = HostMemory::anonymous(4096).unwrap();
            let own = agent.register(own, RegionOptions::default()).unwrap();
            own.fill_at(0, 64, 9).unwrap();
            let peer = agent.load_card(card).unwrap();
            for operation in [Operation::Read, Operation::Write] {
                let pairs = [(own.descriptor(0, 64), region.descriptor(0, 64))];
                let options = RequestOptions::default();
                let posted = agent.transfer(operation, &pairs, Side::Peer(&peer), options);
                let outcome = match posted {
                    Ok(request) => request.wait(WAIT).map_err(|failed| failed.kind()),
                    Err(error) => Err(error.kind()),
                };
                match flipped {
                    None => assert!(outcome.is_ok(), "{way} {operation:?}"),
                    Some(_) => assert_eq!(outcome.unwrap_err(), ErrorKind::Denied, "{way}"),
                }
            }
            if flipped.is_none() {
                // Read as zeros, and written back.
                assert_eq!(region.load_u64(0).unwrap(), 0);
                region.fill_at(0, 64, 5).unwrap();
            }
            let expected = u64::from_ne_bytes([5; 8]);
            assert_eq!(region.load_u64(0).unwrap(), expected, "{way}");
        }
    }
}
