//! The object tier: how a block's object is named.

use std::fmt::Write;

use kvcache_core::{BlockKey, Error, ErrorKind, Result};

/// The longest prefix accepted, in bytes: object stores allow 1,024 for a whole key.
pub const PREFIX_BYTES_MAX: usize = 512;

/// Names the objects of one model under one prefix:
/// `<prefix>/<model identity, first 16 hex digits>/<first 2 hex digits of the key>/<key>`.
///
/// The two digits spread the names over 256 listings. The object itself says which block of which
/// model it is, in full, so a name is only where to look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectNames {
    base: String,
}

impl ObjectNames {
    /// Names under `prefix`; empty for none.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a prefix that is too long, begins or ends with a slash, or has an
    /// empty, `.` or `..` segment, a control character or a backslash.
    pub fn new(prefix: &str, model_identity: &[u8; 32]) -> Result<Self> {
        check_prefix(prefix)?;
        let mut base = String::from(prefix);
        if !base.is_empty() {
            base.push('/');
        }
        for byte in &model_identity[..8] {
            // Writing to a `String` cannot fail.
            let _ = write!(base, "{byte:02x}");
        }
        Ok(Self { base })
    }

    /// The name of the block's object.
    #[must_use]
    pub fn name(&self, key: &BlockKey) -> String {
        let hex = key.to_hex();
        format!("{}/{}/{hex}", self.base, &hex[..2])
    }
}

fn check_prefix(prefix: &str) -> Result<()> {
    if prefix.is_empty() {
        return Ok(());
    }
    let rule = if prefix.len() > PREFIX_BYTES_MAX {
        "is longer than 512 bytes"
    } else if prefix
        .split('/')
        .any(|part| matches!(part, "" | "." | ".."))
    {
        "has an empty, '.' or '..' segment"
    } else if prefix.chars().any(|c| c.is_control() || c == '\\') {
        "has a control character or a backslash"
    } else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::Invalid,
        format!("object prefix {prefix:?} {rule}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A spelled-out example: the name is part of the format that other pods rely on.
    #[test]
    fn a_name_has_prefix_identity_spread_and_key() {
        let mut identity = [0; 32];
        identity[..8].copy_from_slice(&[0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]);
        let key = BlockKey([0xc0; 32]);
        let hex = "c0".repeat(32);
        let names = ObjectNames::new("kv/prod", &identity).unwrap();
        assert_eq!(
            names.name(&key),
            format!("kv/prod/0123456789abcdef/c0/{hex}")
        );
        let names = ObjectNames::new("", &identity).unwrap();
        assert_eq!(names.name(&key), format!("0123456789abcdef/c0/{hex}"));
    }

    /// Each rule once; the message names the prefix.
    #[test]
    fn prefixes_that_would_escape_or_vanish_are_refused() {
        for prefix in [
            "/a",
            "a/",
            "a//b",
            "a/../b",
            ".",
            "a\nb",
            "a\\b",
            &"x".repeat(513),
        ] {
            let error = ObjectNames::new(prefix, &[0; 32]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.context().contains(&format!("{prefix:?}")), "{error}");
        }
    }
}
