//! What queue pairs carry beside the work of jobs: fragments of messages, and words about the rails themselves.

use kvcache_core::{Error, Result};

use super::greeting::Offer;
use crate::wire::Reader;

/// First bytes of fragments of a message.
pub(super) const LAST: u8 = 0;
pub(super) const MORE: u8 = 1;

/// First bytes of words about rails.
const ASK: u8 = 2;
const ANSWER: u8 = 3;
const STOPPED: u8 = 4;
const GONE: u8 = 5;
const OFFER: u8 = 6;
const TAKEN: u8 = 7;

/// A rail of a connection, as often as it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Which {
    pub(super) rail: u8,
    /// How often it was made before.
    pub(super) made: u32,
}

/// A word about rails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Control {
    /// Asks for an answer over the same rail, after what was written by it before.
    Ask {
        token: u64,
    },
    Answer {
        token: u64,
    },
    /// The user of memory sends nothing more over this rail, and has heard so many fragments altogether.
    Stopped {
        which: Which,
        heard: u64,
    },
    /// The owner's end of this rail is gone: nothing that was sent by it lands any more. It has heard so many fragments.
    Gone {
        which: Which,
        heard: u64,
    },
    /// The user wants this rail again, with this end of its own.
    Offer {
        which: Which,
        offer: Offer,
    },
    /// The owner's end of it.
    Taken {
        which: Which,
        offer: Offer,
    },
}

/// What came by a wire.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fragment<'a> {
    Part { is_last: bool, bytes: &'a [u8] },
    Control(Control),
}

impl Control {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        let which = |out: &mut Vec<u8>, kind: u8, which: Which| {
            out.extend_from_slice(&[kind, which.rail]);
            out.extend_from_slice(&which.made.to_le_bytes());
        };
        match *self {
            Self::Ask { token } => {
                out.push(ASK);
                out.extend_from_slice(&token.to_le_bytes());
            }
            Self::Answer { token } => {
                out.push(ANSWER);
                out.extend_from_slice(&token.to_le_bytes());
            }
            Self::Stopped { which: one, heard } => {
                which(&mut out, STOPPED, one);
                out.extend_from_slice(&heard.to_le_bytes());
            }
            Self::Gone { which: one, heard } => {
                which(&mut out, GONE, one);
                out.extend_from_slice(&heard.to_le_bytes());
            }
            Self::Offer { which: one, offer } => {
                which(&mut out, OFFER, one);
                offer.encode(&mut out);
            }
            Self::Taken { which: one, offer } => {
                which(&mut out, TAKEN, one);
                offer.encode(&mut out);
            }
        }
        out
    }
}

impl<'a> Fragment<'a> {
    /// # Errors
    /// [`kvcache_core::ErrorKind::Corrupt`] or [`kvcache_core::ErrorKind::Invalid`] for what no version says.
    pub(super) fn decode(bytes: &'a [u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes);
        let kind = reader.u8("fragment kind")?;
        if kind == LAST || kind == MORE {
            let left = reader.left();
            return Ok(Self::Part {
                is_last: kind == LAST,
                bytes: reader.bytes("fragment", left)?,
            });
        }
        let which = |reader: &mut Reader<'_>| -> Result<Which> {
            Ok(Which {
                rail: reader.u8("rail")?,
                made: reader.u32("rail's number")?,
            })
        };
        let control = match kind {
            ASK => Control::Ask {
                token: reader.u64("token")?,
            },
            ANSWER => Control::Answer {
                token: reader.u64("token")?,
            },
            STOPPED => Control::Stopped {
                which: which(&mut reader)?,
                heard: reader.u64("fragments")?,
            },
            GONE => Control::Gone {
                which: which(&mut reader)?,
                heard: reader.u64("fragments")?,
            },
            OFFER => Control::Offer {
                which: which(&mut reader)?,
                offer: Offer::decode(&mut reader)?,
            },
            TAKEN => Control::Taken {
                which: which(&mut reader)?,
                offer: Offer::decode(&mut reader)?,
            },
            other => return Err(Error::invalid("fragment kind", other, LAST..=TAKEN)),
        };
        reader.end("fragment")?;
        Ok(Self::Control(control))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sys::verbs::End;

    fn all() -> Vec<Control> {
        let which = Which { rail: 3, made: 7 };
        let offer = Offer {
            end: End {
                pair: 17,
                first: 9,
                lid: 3,
                gid: [7; 16],
            },
            is_ethernet: true,
            mtu: 3,
            reads_served: 16,
            appointment: None,
        };
        vec![
            Control::Ask { token: 1 },
            Control::Answer { token: u64::MAX },
            Control::Stopped { which, heard: 5 },
            Control::Gone { which, heard: 6 },
            Control::Offer { which, offer },
            Control::Taken { which, offer },
        ]
    }

    /// There and back; cut off or longer they are refused.
    #[test]
    fn words_about_rails_survive_the_way() {
        for control in all() {
            let bytes = control.encode();
            assert_eq!(
                Fragment::decode(&bytes).unwrap(),
                Fragment::Control(control)
            );
            for cut in 0..bytes.len() {
                assert!(
                    Fragment::decode(&bytes[..cut]).is_err(),
                    "{control:?} {cut}"
                );
            }
            let longer = [&bytes[..], &[0]].concat();
            assert!(Fragment::decode(&longer).is_err(), "{control:?}");
        }
        let part = Fragment::Part {
            is_last: false,
            bytes: b"ab",
        };
        assert_eq!(Fragment::decode(b"\x01ab").unwrap(), part);
        assert!(Fragment::decode(b"\x08ab").is_err());
    }

    proptest! {
        /// What others send is refused or understood.
        #[test]
        fn no_bytes_break_the_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Fragment::decode(&bytes);
        }
    }
}
