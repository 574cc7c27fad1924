//! The extra keys of vLLM's events: what shaped a block beside its tokens, without saying what is what.
//!
//! Per block there is nil or a list: the adapter's name first, then images and the like as `[identifier, offset]` or,
//! from older versions, as a bare string; then, in a sequence's first block only, the cache salt as a bare string; then
//! digests of prompt embeddings as bytes.

use kvcache_core::Result;

use super::BlockIdentifiers;
use super::event::{IDENTIFIER_BYTES_MAX, IDENTIFIERS_MAX};
use super::msgpack::{Head, Reader};

/// What the extra keys of an event's blocks turned out to be.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Extras {
    /// Per block; empty when no block has any.
    pub(super) identifiers: Vec<BlockIdentifiers>,
    pub(super) cache_salt: Option<String>,
}

/// Reads the extra keys of `blocks` blocks; `is_first` when the first of them starts a sequence.
///
/// The last bare string of a sequence's first block is taken for its salt. Versions that send bare image identifiers
/// are misread there, to the effect that such a block is found by nobody, which costs a recomputation.
pub(super) fn read(
    mut reader: Reader<'_>,
    blocks: usize,
    is_first: bool,
    lora: Option<&str>,
) -> Result<Extras> {
    let place = reader;
    let Some(count) = reader.array_or_nil("extra_keys")? else {
        return Ok(Extras::default());
    };
    if count as usize != blocks && count != 0 {
        return Err(place.error(format_args!("extra_keys of {count} blocks for {blocks}")));
    }
    let mut extras = Extras::default();
    for block in 0..count as usize {
        let place = reader;
        let Some(keys) = reader.array_or_nil("a block's extra keys")? else {
            continue;
        };
        if keys > IDENTIFIERS_MAX {
            return Err(place.error(format_args!(
                "{keys} extra keys, more than {IDENTIFIERS_MAX}"
            )));
        }
        let mut found = read_block(&mut reader, keys, lora)?;
        if is_first && block == 0 {
            let last_bare = found.iter().rposition(|key| key.is_bare);
            extras.cache_salt = last_bare.map(|position| found.remove(position).text);
        }
        if !found.is_empty() {
            extras.identifiers.resize_with(blocks, Vec::new);
            extras.identifiers[block] = found.into_iter().map(|key| key.text).collect();
        }
    }
    Ok(extras)
}

struct Key {
    text: String,
    /// A string that stands by itself, so it may be a salt.
    is_bare: bool,
}

fn read_block(reader: &mut Reader<'_>, count: u32, lora: Option<&str>) -> Result<Vec<Key>> {
    let mut keys = Vec::new();
    for position in 0..count {
        let place = *reader;
        let key = match reader.head()? {
            Head::Str(_) => {
                *reader = place;
                let text = reader.text_or_nil("an extra key", IDENTIFIER_BYTES_MAX)?;
                if position == 0 && text == lora {
                    continue;
                }
                text.map(|text| Key {
                    text: text.to_owned(),
                    is_bare: true,
                })
            }
            Head::Bin(digest) if digest.len() <= IDENTIFIER_BYTES_MAX => Some(Key {
                text: digest.iter().map(|byte| format!("{byte:02x}")).collect(),
                is_bare: false,
            }),
            Head::Array(parts) if parts > 0 => {
                let text = reader.text_or_nil("an identifier", IDENTIFIER_BYTES_MAX)?;
                for _ in 1..parts {
                    reader.skip()?;
                }
                text.map(|text| Key {
                    text: text.to_owned(),
                    is_bare: false,
                })
            }
            other => return Err(place.expected("an extra key", &other)),
        };
        keys.extend(key);
    }
    Ok(keys)
}
