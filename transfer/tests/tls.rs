//! TLS between agents, and those who are turned away. The certificates in `tests/tls` are valid from 2020 to 2120, but for the
//! one that is not meant to be.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use kvcache_core::ErrorKind;
use kvfabric_transfer::{Agent, Operation, PathReport, RequestOptions, TlsOptions};

use support::proxy::Proxy;
use support::{OPEN, Pair, WAIT, contents, loopback, pattern};

const MIB: u64 = 1 << 20;

/// Who an agent says it is.
#[derive(Clone, Copy, Debug)]
enum Who {
    /// Without TLS.
    Plain,
    Member,
    /// Of another authority.
    Stranger,
    /// With another agent's name.
    Misnamed,
    Expired,
}

impl Who {
    fn options(self) -> Option<TlsOptions> {
        let (certificates, key): (&[u8], &[u8]) = match self {
            Self::Plain => return None,
            Self::Member => (
                include_bytes!("tls/member.pem"),
                include_bytes!("tls/member.key"),
            ),
            Self::Stranger => (
                include_bytes!("tls/stranger.pem"),
                include_bytes!("tls/stranger.key"),
            ),
            Self::Misnamed => (
                include_bytes!("tls/misnamed.pem"),
                include_bytes!("tls/misnamed.key"),
            ),
            Self::Expired => (
                include_bytes!("tls/expired.pem"),
                include_bytes!("tls/expired.key"),
            ),
        };
        Some(TlsOptions {
            authorities: include_bytes!("tls/own-ca.pem").to_vec(),
            certificates: certificates.to_vec(),
            key: key.to_vec(),
        })
    }

    fn agent(self, name: &str, advertise: Option<&Proxy>) -> Agent {
        Agent::builder(name)
            .memcpy(false)
            .shm(false)
            .tcp(Some(loopback()))
            .tcp_advertise(advertise.map(Proxy::address))
            .tcp_tls(self.options())
            .build()
            .unwrap()
    }
}

/// Why one does not reach the other.
fn refusal(initiator: Who, target: Who) -> String {
    let (initiator, target) = (
        initiator.agent("initiator", None),
        target.agent("target", None),
    );
    let peer = initiator.load_peer(&target.metadata()).unwrap();
    let PathReport {
        backend, refused, ..
    } = initiator.path_to(&peer);
    assert_eq!(backend, None);
    let why = refused.into_iter().find(|(name, _)| *name == "tcp");
    why.unwrap().1
}

/// Either side's certificate is no good, or one side has none: the error says which, and nothing is moved.
#[test]
fn whoever_has_no_good_certificate_is_turned_away() {
    use Who::{Expired, Member, Misnamed, Plain, Stranger};
    for (initiator, target, why) in [
        (Member, Stranger, "UnknownIssuer"),
        (Member, Expired, "expired"),
        (Member, Misnamed, "not valid for name"),
        (Stranger, Member, "certificate"),
        (Expired, Member, "certificate"),
        (
            Misnamed,
            Member,
            "the certificate is not agent \"initiator\"'s",
        ),
        (Plain, Member, "speaks TLS only"),
        (Member, Plain, "does not answer in TLS"),
    ] {
        let found = refusal(initiator, target);
        assert!(found.contains(why), "{initiator:?} to {target:?}: {found}");
    }
}

/// Both have certificates of one authority, with their names.
#[test]
fn members_reach_each_other_encrypted() {
    let target = Who::Member.agent("target", None);
    let pair = Pair::of(Who::Member.agent("initiator", None), target, 8 * MIB, OPEN);
    let data = pattern(8 * MIB as usize, 17);
    pair.local.write_at(0, &data).unwrap();
    pair.moves(
        Operation::Write,
        &[(0, 0, 8 * MIB)],
        RequestOptions::default(),
    )
    .wait(WAIT)
    .unwrap();
    assert!(contents(&pair.remote) == data);
    let path = pair.initiator.path_to(&pair.peer);
    assert!(path.why.contains("TLS 1.3"), "{}", path.why);
}

/// Without TLS a changed byte of payload would end up in memory; with it, it ends the connection, and the read is done over a
/// new one.
#[test]
fn a_changed_byte_never_gets_into_memory() {
    let proxy = Proxy::new();
    let target = Who::Member.agent("target", Some(&proxy));
    proxy.run(target.tcp_address().unwrap());
    let pair = Pair::of(Who::Member.agent("initiator", None), target, 8 * MIB, OPEN);
    let data = pattern(8 * MIB as usize, 19);
    pair.remote.write_at(0, &data).unwrap();
    let read = pair.moves(
        Operation::Read,
        &[(0, 0, 8 * MIB)],
        RequestOptions::default(),
    );
    read.wait(WAIT).unwrap();
    pair.local.write_at(0, &vec![0; 8 * MIB as usize]).unwrap();
    proxy.damage();
    read.post().unwrap();
    let done = read.wait(WAIT).unwrap();
    assert!(contents(&pair.local) == data);
    assert!(done.failovers > 0, "{done:?}");
}

/// Each of the three parts is missing or of another kind, or the key is not the certificate's.
#[test]
fn what_cannot_be_used_is_refused_by_name() {
    let good = Who::Member.options().unwrap();
    let build = |options: TlsOptions| {
        let builder = Agent::builder("agent").tcp(Some(loopback()));
        builder.tcp_tls(Some(options)).build().unwrap_err()
    };
    let empty = Vec::new;
    for (options, what) in [
        (
            TlsOptions {
                authorities: empty(),
                ..good.clone()
            },
            "authorities",
        ),
        (
            TlsOptions {
                certificates: good.key.clone(),
                ..good.clone()
            },
            "certificates",
        ),
        (
            TlsOptions {
                key: empty(),
                ..good.clone()
            },
            "key",
        ),
        (
            TlsOptions {
                key: Who::Stranger.options().unwrap().key,
                ..good.clone()
            },
            "certificates and key",
        ),
    ] {
        let error = build(options);
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(what), "{error}");
    }
    assert!(!format!("{good:?}").contains("key"), "the key is not shown");
}
