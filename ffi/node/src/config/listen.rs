//! An address, or "off".

use std::net::SocketAddr;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serializer};

const OFF: &str = "off";

#[expect(clippy::ref_option, reason = "serde asks for this signature")]
pub(super) fn serialize<S: Serializer>(
    address: &Option<SocketAddr>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match address {
        Some(address) => serializer.collect_str(address),
        None => serializer.serialize_str(OFF),
    }
}

pub(super) fn deserialize<'a, D: Deserializer<'a>>(
    deserializer: D,
) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text == OFF {
        return Ok(None);
    }
    let wrong = |_| D::Error::custom(format!("{text:?} is neither ADDRESS:PORT nor \"off\""));
    text.parse().map(Some).map_err(wrong)
}
