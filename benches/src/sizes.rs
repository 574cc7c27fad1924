//! Sizes on the command line.

use kvcache_core::{Error, ErrorKind, Result};

/// Reads `4096`, `4K`, `64M` or `1G`; the letters mean powers of 1,024.
///
/// # Errors
/// `Invalid` naming the text.
pub(crate) fn parse_bytes(text: &str) -> Result<u64> {
    let bad = || {
        let context = format!("{text:?} is not a size in bytes, like 65536, 64K, 16M or 1G");
        Error::new(ErrorKind::Invalid, context)
    };
    let (digits, shift) = match text.char_indices().next_back() {
        Some((end, 'k' | 'K')) => (&text[..end], 10),
        Some((end, 'm' | 'M')) => (&text[..end], 20),
        Some((end, 'g' | 'G')) => (&text[..end], 30),
        _ => (text, 0),
    };
    let count: u64 = digits.parse().map_err(|_| bad())?;
    count
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes > 0)
        .ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads sizes with and without a letter.
    #[test]
    fn sizes_may_end_with_a_letter() {
        for (text, bytes) in [("8", 8), ("4K", 4096), ("64m", 64 << 20), ("1G", 1 << 30)] {
            assert_eq!(parse_bytes(text).unwrap(), bytes, "{text}");
        }
    }

    /// Reads what is no size; each error names the text.
    #[test]
    fn what_is_no_size_is_refused_by_name() {
        for text in ["", "K", "0", "-1", "4X", "4 K", "4é", "99999999999G"] {
            let error = parse_bytes(text).unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
    }
}
