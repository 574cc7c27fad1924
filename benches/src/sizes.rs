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

/// Sizes that one part of a list stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sizes(pub(crate) Vec<u64>);

/// Reads one size, or a range like `4K..1M`: its first size and every doubling of it up to the last.
///
/// # Errors
/// `Invalid` naming the text.
pub(crate) fn parse_sizes(text: &str) -> Result<Sizes> {
    let Some((first, last)) = text.split_once("..") else {
        return Ok(Sizes(vec![parse_bytes(text)?]));
    };
    let (first, last) = (parse_bytes(first)?, parse_bytes(last)?);
    if first > last {
        let context = format!("{text:?} begins above its end");
        return Err(Error::new(ErrorKind::Invalid, context));
    }
    let doublings = std::iter::successors(Some(first), |size| size.checked_mul(2));
    Ok(Sizes(doublings.take_while(|size| *size <= last).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A range doubles from its first size; its end need not be met.
    #[test]
    fn a_range_of_sizes_doubles_up_to_its_end() {
        let sizes = |text| parse_sizes(text).map(|sizes| sizes.0);
        assert_eq!(sizes("4k..16K").unwrap(), [4096, 8192, 16384]);
        assert_eq!(sizes("4K..7K").unwrap(), [4096]);
        assert_eq!(sizes("1M").unwrap(), [1 << 20]);
        for text in ["8K..4K", "..4K", "4K..", "4K..x"] {
            assert_eq!(
                sizes(text).unwrap_err().kind(),
                ErrorKind::Invalid,
                "{text}"
            );
        }
    }

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
