//! A model identity as text.

use kvcache_core::{Error, Result};

/// The 32 bytes of a model identity, written as 64 hexadecimal digits.
///
/// # Errors
/// [`kvcache_core::ErrorKind::Invalid`] with the text.
pub fn parse_identity(text: &str) -> Result<[u8; 32]> {
    let wrong = || {
        Error::invalid(
            "model_identity",
            format!("{text:?}"),
            "64 hexadecimal digits",
        )
    };
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(wrong());
    }
    let mut identity = [0; 32];
    for (byte, pair) in identity.iter_mut().zip(digits.chunks(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
    }
    Ok(identity)
}
