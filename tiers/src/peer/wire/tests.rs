use proptest::prelude::*;

use super::*;

const IDENTITY: [u8; 32] = [7; 32];

fn pod(name: &str) -> PodName {
    PodName::new(name).unwrap()
}

fn question(blocks: usize) -> LeaseQuestion {
    LeaseQuestion {
        pod: pod("reader:1"),
        incarnation: 11,
        keys: (0..blocks).map(|at| BlockKey([at as u8; 32])).collect(),
        block_bytes: 4096,
        ttl: Duration::from_millis(1500),
    }
}

fn block() -> LeasedBlock {
    LeasedBlock {
        region: 1,
        offset: 8192,
        checksum: Checksum::crc32c(9),
        generation: 5,
        generation_region: 2,
        generation_offset: 16,
        tier: Tier::Disk,
    }
}

/// A greeting and its answer, both ways.
#[test]
fn a_greeting_of_our_own_is_accepted() {
    let request = hello_request(&pod("reader:1"), &IDENTITY);
    assert_eq!(check_hello(&request, &IDENTITY).unwrap(), pod("reader:1"));
    let hello = Hello {
        pod: pod("holder:1"),
        agent_metadata: vec![1, 2].into(),
        incarnation: 3,
    };
    assert_eq!(check_hello_response(hello_response(&hello)).unwrap(), hello);
}

/// Both directions of the greeting, a version above and one below.
#[test]
fn another_version_is_refused_with_both_named() {
    for version in [PROTOCOL_VERSION + 1, PROTOCOL_VERSION - 1] {
        let mut request = hello_request(&pod("reader:1"), &IDENTITY);
        request.protocol_version = version;
        let error = check_hello(&request, &IDENTITY).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Version);
        assert!(
            error.context().contains(&format!("version {version}")),
            "{error}"
        );
        assert!(
            error
                .context()
                .contains(&format!("version {PROTOCOL_VERSION}")),
            "{error}"
        );

        let hello = Hello {
            pod: pod("holder:1"),
            agent_metadata: Bytes::new(),
            incarnation: 3,
        };
        let mut response = hello_response(&hello);
        response.protocol_version = version;
        assert_eq!(
            check_hello_response(response).unwrap_err().kind(),
            ErrorKind::Version
        );
    }
}

/// One bit of the identity differs; and an identity of no length.
#[test]
fn another_model_is_denied() {
    let mut request = hello_request(&pod("reader:1"), &IDENTITY);
    let mut other = IDENTITY;
    other[31] ^= 1;
    request.model_identity = other.to_vec().into();
    assert_eq!(
        check_hello(&request, &IDENTITY).unwrap_err().kind(),
        ErrorKind::Denied
    );
    request.model_identity.clear();
    assert_eq!(
        check_hello(&request, &IDENTITY).unwrap_err().kind(),
        ErrorKind::Denied
    );
}

/// A lease asked for and granted, both ways.
#[test]
fn a_lease_reads_back_as_it_was_written() {
    let question = question(3);
    assert_eq!(check_lease(&lease_request(&question)).unwrap(), question);
    let ttl = Duration::from_millis(700);
    let answer = LeaseAnswer {
        lease: LeaseId(6),
        ttl,
        blocks: vec![block(), block()],
    };
    assert_eq!(
        check_lease_response(&lease_response(&answer), &question).unwrap(),
        answer
    );
}

/// No keys, half a key, one too many, no life, a nameless pod.
#[test]
fn malformed_lease_requests_are_refused_by_field() {
    let good = lease_request(&question(1));
    for bytes in [0, 31, 33, (LEASE_KEYS_MAX + 1) * KEY_BYTES] {
        let request = v1::LeaseRequest {
            keys: vec![0; bytes].into(),
            ..good.clone()
        };
        let error = check_lease(&request).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.context().contains(&bytes.to_string()), "{error}");
    }
    let error = check_lease(&v1::LeaseRequest {
        ttl_ms: 0,
        ..good.clone()
    })
    .unwrap_err();
    assert!(error.context().contains("ttl_ms"), "{error}");
    let error = check_lease(&v1::LeaseRequest {
        pod: String::new(),
        ..good
    })
    .unwrap_err();
    assert!(error.context().contains("pod"), "{error}");
}

/// A holder that lies: too many blocks, a longer life, offsets at the edge, unknown numbers.
#[test]
fn a_lying_lease_is_refused_or_cut() {
    let question = question(1);
    let answer = LeaseAnswer {
        lease: LeaseId(6),
        ttl: Duration::from_secs(3600),
        blocks: vec![block()],
    };
    let good = lease_response(&answer);
    assert_eq!(
        check_lease_response(&good, &question).unwrap().ttl,
        question.ttl
    );

    let mut more = good.clone();
    more.blocks.push(more.blocks[0]);
    assert!(check_lease_response(&more, &question).is_err());
    let spoil: [fn(&mut v1::LeasedBlock); 5] = [
        |block| block.offset = u64::MAX - 4095,
        |block| block.generation_offset = u64::MAX,
        |block| block.checksum_algorithm = 257,
        |block| block.tier = 0,
        |block| block.tier = u32::MAX,
    ];
    for spoil in spoil {
        let mut bad = good.clone();
        spoil(&mut bad.blocks[0]);
        let error = check_lease_response(&bad, &question).unwrap_err();
        assert!(
            error.context().starts_with("block 0 of the lease: "),
            "{error}"
        );
    }
}

/// Every kind there and back; those without a code of their own become a lost peer.
#[test]
fn kinds_survive_the_way_over_grpc() {
    for kind in [
        ErrorKind::Invalid,
        ErrorKind::Busy,
        ErrorKind::Corrupt,
        ErrorKind::PeerLost,
        ErrorKind::Unsupported,
        ErrorKind::Timeout,
        ErrorKind::Version,
        ErrorKind::Denied,
        ErrorKind::NotFound,
    ] {
        let error = error_of(&status_of(&Error::new(kind, "because")), "holder:1");
        assert_eq!(error.kind(), kind);
        assert_eq!(error.context(), "peer holder:1: because");
    }
    let internal = error_of(
        &status_of(&Error::new(ErrorKind::Internal, "x")),
        "holder:1",
    );
    assert_eq!(internal.kind(), ErrorKind::PeerLost);
}

proptest! {
    /// Arbitrary messages: an error or a valid value, never a panic.
    #[test]
    fn arbitrary_messages_do_not_panic(
        keys in prop::collection::vec(any::<u8>(), 0..200), pod in ".{0,8}", ttl_ms: u32,
        numbers in prop::array::uniform8(any::<u64>()),
    ) {
        let [region, offset, checksum, generation, generation_region, generation_offset, a, b] =
            numbers;
        let request =
            v1::LeaseRequest { pod, incarnation: 1, keys: keys.into(), block_bytes: a, ttl_ms };
        if let Ok(question) = check_lease(&request) {
            prop_assert_eq!(lease_request(&question), request);
        }
        let block = v1::LeasedBlock {
            region, offset, checksum_algorithm: b as u32 % 3, checksum, generation,
            generation_region, generation_offset, tier: a as u32 % 6,
        };
        let response = v1::LeaseResponse { lease: a, ttl_ms, blocks: vec![block] };
        if let Ok(answer) = check_lease_response(&response, &question(1)) {
            prop_assert_eq!(lease_response(&answer).blocks, response.blocks);
        }
    }
}
