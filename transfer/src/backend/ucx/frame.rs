//! A message as it travels: who is meant, who speaks, what is said.

use kvcache_core::{Error, Result};

use crate::backend::unix::Message;
use crate::metadata::HostId;
use crate::wire::{Reader, put_counted};

/// Names one side of a path, to the other one only: random, because UCX does not tell who sent a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Session(pub(super) u64);

impl Session {
    /// In a greeting, whose sender does not know the other side's yet.
    const NOBODY: Self = Self(0);

    pub(super) fn random() -> Result<Self> {
        let mut random = [0; 8];
        getrandom::fill(&mut random)
            .map_err(|e| Error::new(kvcache_core::ErrorKind::Io, format!("draw a session: {e}")))?;
        // Never nobody's.
        Ok(Self(u64::from_le_bytes(random) | 1))
    }
}

/// Where the side that connects lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) host: HostId,
    /// The process namespace, and its number there.
    pub(super) namespace: u64,
    pub(super) pid: u32,
    /// Of its UCX worker.
    pub(super) address: Vec<u8>,
}

/// Who is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum To {
    /// A path that both sides know.
    Known(Session),
    /// Whoever has this worker: the first message, a greeting.
    New(Origin),
}

pub(super) struct Frame {
    pub(super) to: To,
    pub(super) from: Session,
    pub(super) message: Message,
}

impl Frame {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        let to = match &self.to {
            To::Known(session) => *session,
            To::New(_) => Session::NOBODY,
        };
        out.extend_from_slice(&to.0.to_le_bytes());
        out.extend_from_slice(&self.from.0.to_le_bytes());
        if let To::New(origin) = &self.to {
            out.extend_from_slice(&origin.host.0);
            out.extend_from_slice(&origin.namespace.to_le_bytes());
            out.extend_from_slice(&origin.pid.to_le_bytes());
            put_counted(&mut out, &origin.address);
        }
        out.extend_from_slice(&self.message.encode());
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let to = Session(reader.u64("receiving session")?);
        let from = Session(reader.u64("sending session")?);
        let to = if to == Session::NOBODY {
            To::New(Origin {
                host: HostId(reader.array("host id")?),
                namespace: reader.u64("process namespace")?,
                pid: reader.u32("process id")?,
                address: reader.counted("worker address")?.to_vec(),
            })
        } else {
            To::Known(to)
        };
        let message = reader.bytes("message", reader.left())?;
        Ok(Self {
            to,
            from,
            message: Message::decode(message)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::metadata::Incarnation;
    use crate::region::RegionId;

    fn greeting() -> Frame {
        let origin = Origin {
            host: HostId([7; 16]),
            namespace: 4_026_531_836,
            pid: 12,
            address: vec![1, 2, 3],
        };
        Frame {
            to: To::New(origin),
            from: Session(5),
            message: Message::Hello {
                name: "a".to_owned(),
                wanted: Incarnation(9),
            },
        }
    }

    /// Both forms, there and back.
    #[test]
    fn frames_survive_the_way() {
        let there = greeting();
        let back = Frame::decode(&there.encode()).unwrap();
        assert_eq!((back.to, back.from), (there.to, there.from));
        assert!(
            matches!(back.message, Message::Hello { name, wanted } if name == "a" && wanted.0 == 9)
        );
        let there = Frame {
            to: To::Known(Session(3)),
            from: Session(4),
            message: Message::Revoke {
                region: RegionId(8),
            },
        };
        let back = Frame::decode(&there.encode()).unwrap();
        assert_eq!((back.to, back.from), (To::Known(Session(3)), Session(4)));
        assert!(matches!(back.message, Message::Revoke { region } if region == RegionId(8)));
    }

    proptest! {
        /// What others send is refused or understood, never believed beyond its end.
        #[test]
        fn no_bytes_break_the_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Frame::decode(&bytes);
        }

        /// A greeting that is cut off or changed in one place.
        #[test]
        fn damaged_greetings_are_refused_or_read(at in 0_usize..60, to in any::<u8>(), cut in any::<bool>()) {
            let mut bytes = greeting().encode();
            let at = at.min(bytes.len() - 1);
            if cut {
                bytes.truncate(at);
                prop_assert!(Frame::decode(&bytes).is_err());
            } else {
                bytes[at] = to;
                let _ = Frame::decode(&bytes);
            }
        }
    }
}
