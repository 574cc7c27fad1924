//! One event, from an array or a map of fields.

use kvcache_core::{EngineHash, Error, ErrorKind, Result, Tier};

use super::decode::Reading;
use super::extra::{self, Extras};
use super::msgpack::{Head, Reader};
use super::{CacheGroup, GroupRule, RemovedBlocks, SourceEvent, SourceKind, StoredBlocks};

/// The most blocks in one event: a prompt of two million tokens in blocks of 16.
pub const HASHES_MAX: u32 = 1 << 17;
/// The most tokens in one event.
pub const TOKENS_MAX: u32 = 1 << 22;
/// The longest name accepted, in bytes: of a medium, an adapter, a salt, an event type or a field.
pub const NAME_BYTES_MAX: usize = 4096;
/// The most identifiers that may have shaped one block.
pub const IDENTIFIERS_MAX: u32 = 256;
/// The longest identifier of an image or the like, in bytes.
pub const IDENTIFIER_BYTES_MAX: usize = 1024;
/// The longest digest taken for a hash, in bytes: some versions name a large block by the digests of all its parts.
const DIGEST_BYTES_MAX: usize = 1 << 16;

#[derive(Clone, Copy, PartialEq)]
enum Type {
    Stored,
    Removed,
    Cleared,
}

impl Type {
    fn of(tag: Option<&str>, place: &Reader<'_>) -> Result<Self> {
        match tag {
            Some("BlockStored") => Ok(Self::Stored),
            Some("BlockRemoved") => Ok(Self::Removed),
            Some("AllBlocksCleared") => Ok(Self::Cleared),
            Some(other) => Err(Error::new(
                ErrorKind::Unsupported,
                format!("event type {other:?}"),
            )),
            None => Err(place.error("the event has no type")),
        }
    }
}

#[derive(Clone, Copy)]
enum Field {
    Hashes,
    Parent,
    Tokens,
    BlockSize,
    LoraId,
    Medium,
    LoraName,
    ExtraKeys,
    Group,
    SpecKind,
    Window,
    CacheSalt,
    Ignored,
}

/// The order of fields in array-encoded events, after the tag; each version only added to the end.
const STORED_FIELDS: [Field; 11] = [
    Field::Hashes,
    Field::Parent,
    Field::Tokens,
    Field::BlockSize,
    Field::LoraId,
    Field::Medium,
    Field::LoraName,
    Field::ExtraKeys,
    Field::Group,
    Field::SpecKind,
    Field::Window,
];
const REMOVED_FIELDS: [Field; 3] = [Field::Hashes, Field::Medium, Field::Group];
/// SGLang means other things by the positions after this many.
const SGLANG_FIELDS: usize = 6;

/// What was read of an event.
pub(super) struct Found<'a> {
    /// None when it is to be passed over.
    pub(super) event: Result<Option<SourceEvent>>,
    /// The medium that it names.
    pub(super) medium: Option<&'a str>,
    /// The same, if nobody has told of that.
    pub(super) unknown_medium: Option<&'a str>,
}

impl Found<'_> {
    pub(super) const fn none(error: Error) -> Self {
        Self {
            event: Err(error),
            medium: None,
            unknown_medium: None,
        }
    }
}

pub(super) fn event_of_array<'a>(
    reader: &mut Reader<'a>,
    count: u32,
    how: Reading<'_>,
) -> Found<'a> {
    let mut raw = RawEvent::default();
    let event = read_array(reader, count, how, &mut raw);
    raw.found(event, how)
}

fn read_array<'a>(
    reader: &mut Reader<'a>,
    count: u32,
    how: Reading<'_>,
    raw: &mut RawEvent<'a>,
) -> Result<Option<SourceEvent>> {
    let (place, kind) = (*reader, how.kind);
    let tag = match count {
        0 => None,
        _ => reader.text_or_nil("an event's type", NAME_BYTES_MAX)?,
    };
    let event_type = Type::of(tag, &place)?;
    let fields: &[Field] = match event_type {
        Type::Stored if kind == SourceKind::Sglang => &STORED_FIELDS[..SGLANG_FIELDS],
        Type::Stored => &STORED_FIELDS,
        Type::Removed => &REMOVED_FIELDS,
        Type::Cleared => &[],
    };
    for position in 0..count - 1 {
        let field = fields
            .get(position as usize)
            .copied()
            .unwrap_or(Field::Ignored);
        raw.read(field, reader)?;
    }
    raw.finish(event_type, how, &place)
}

pub(super) fn event_of_map<'a>(reader: &mut Reader<'a>, count: u32, how: Reading<'_>) -> Found<'a> {
    let mut raw = RawEvent::default();
    let event = read_map(reader, count, how, &mut raw);
    raw.found(event, how)
}

fn read_map<'a>(
    reader: &mut Reader<'a>,
    count: u32,
    how: Reading<'_>,
    raw: &mut RawEvent<'a>,
) -> Result<Option<SourceEvent>> {
    let place = *reader;
    let mut tag = None;
    for _ in 0..count {
        let name = reader
            .text_or_nil("a field's name", NAME_BYTES_MAX)?
            .unwrap_or("");
        let field = match name {
            "type" => {
                tag = reader.text_or_nil("an event's type", NAME_BYTES_MAX)?;
                // Fields of a type unknown here may mean anything, so they are not looked at.
                Type::of(tag, &place)?;
                continue;
            }
            "block_hashes" => Field::Hashes,
            "parent_block_hash" => Field::Parent,
            "token_ids" => Field::Tokens,
            "block_size" => Field::BlockSize,
            "lora_id" => Field::LoraId,
            "medium" => Field::Medium,
            "lora_name" => Field::LoraName,
            "extra_keys" => Field::ExtraKeys,
            "group_idx" => Field::Group,
            "kv_cache_spec_kind" => Field::SpecKind,
            "kv_cache_spec_sliding_window" => Field::Window,
            "cache_salt" => Field::CacheSalt,
            _ => Field::Ignored,
        };
        raw.read(field, reader)?;
    }
    raw.finish(Type::of(tag, &place)?, how, &place)
}

/// The fields of an event as they come, whatever their order.
#[derive(Default)]
struct RawEvent<'a> {
    hashes: Option<Vec<EngineHash>>,
    parent: Option<EngineHash>,
    tokens: Vec<u32>,
    block_size: u32,
    lora_id: Option<u64>,
    medium: Option<&'a str>,
    lora_name: Option<&'a str>,
    /// Where the extra keys start: what they mean depends on fields that may come later.
    extra_keys: Option<Reader<'a>>,
    group: Option<u32>,
    spec_kind: Option<&'a str>,
    window: Option<u32>,
    cache_salt: Option<&'a str>,
}

impl<'a> RawEvent<'a> {
    fn read(&mut self, field: Field, reader: &mut Reader<'a>) -> Result<()> {
        match field {
            Field::Hashes => self.hashes = hashes(reader)?,
            // Two publishers write 0 for "none".
            Field::Parent => self.parent = hash_or_nil(reader)?.filter(|hash| hash.0 != 0),
            Field::Tokens => tokens(reader, &mut self.tokens)?,
            Field::BlockSize => self.block_size = reader.u32_or_nil("block_size")?.unwrap_or(0),
            Field::LoraId => {
                let place = *reader;
                self.lora_id = match reader.head()? {
                    Head::Nil => None,
                    Head::Int { bits, .. } => Some(bits),
                    other => return Err(place.expected("lora_id", &other)),
                };
            }
            Field::Medium => self.medium = reader.text_or_nil("medium", NAME_BYTES_MAX)?,
            Field::LoraName => self.lora_name = reader.text_or_nil("lora_name", NAME_BYTES_MAX)?,
            Field::ExtraKeys => {
                self.extra_keys = Some(*reader);
                reader.skip()?;
            }
            Field::Group => self.group = reader.u32_or_nil("group_idx")?,
            Field::SpecKind => {
                self.spec_kind = reader.text_or_nil("kv_cache_spec_kind", NAME_BYTES_MAX)?;
            }
            Field::Window => self.window = reader.u32_or_nil("kv_cache_spec_sliding_window")?,
            Field::CacheSalt => {
                self.cache_salt = reader.text_or_nil("cache_salt", NAME_BYTES_MAX)?;
            }
            Field::Ignored => reader.skip()?,
        }
        Ok(())
    }

    fn found(&self, event: Result<Option<SourceEvent>>, how: Reading<'_>) -> Found<'a> {
        let unknown_medium = self.medium.filter(|medium| !how.media.of(medium).1);
        Found {
            event,
            medium: self.medium,
            unknown_medium,
        }
    }

    fn finish(
        &mut self,
        event_type: Type,
        how: Reading<'_>,
        place: &Reader<'_>,
    ) -> Result<Option<SourceEvent>> {
        let kind = how.kind;
        if event_type == Type::Cleared {
            return Ok(Some(SourceEvent::Cleared));
        }
        let Some(tier) = self.tier(how, place)? else {
            return Ok(None);
        };
        let group = self.group();
        let Some(hashes) = self.hashes.take() else {
            return Err(place.error("the event has no block_hashes"));
        };
        if event_type == Type::Removed {
            return Ok(Some(SourceEvent::Removed(RemovedBlocks {
                hashes,
                tier,
                group: self.group,
            })));
        }
        let mut tokens = std::mem::take(&mut self.tokens);
        if kind.is_vllm() && tier != Tier::Device && self.extra_keys.is_none() {
            // Offloaded blocks are announced without what else shaped them, even when something did: their tokens
            // would place them wrongly, so only their hash is believed.
            tokens.clear();
        }
        let tokens_wanted = hashes.len() as u64 * u64::from(self.block_size);
        if group.is_some_and(|group| group.rule.has_holes())
            && tokens.len() as u64 > tokens_wanted
            && tokens.len().checked_rem(self.block_size as usize) == Some(0)
        {
            // The tokens are of all blocks, the hashes of those that the group has kept: which, nobody says. Their place
            // is that of the block with the same hash in the group that keeps all.
            tokens.clear();
        }
        if !tokens.is_empty() && tokens.len() as u64 != tokens_wanted {
            return Err(place.error(format_args!(
                "{} tokens for {} blocks of {}",
                tokens.len(),
                hashes.len(),
                self.block_size
            )));
        }
        let Extras {
            identifiers,
            cache_salt,
        } = match self.extra_keys {
            Some(reader) if kind != SourceKind::Node => {
                extra::read(reader, hashes.len(), self.parent.is_none(), self.lora_name)?
            }
            _ => Extras::default(),
        };
        let lora = match (self.lora_name, self.lora_id) {
            (Some(name), _) => Some(name.to_owned()),
            // An adapter known by number only: kept apart from the base model, found by no name.
            (None, Some(number)) => Some(format!("#{number}")),
            (None, None) => None,
        };
        Ok(Some(SourceEvent::Stored(StoredBlocks {
            hashes,
            parent: self.parent,
            block_size: if tokens.is_empty() {
                0
            } else {
                self.block_size
            },
            tokens,
            tier,
            group,
            lora,
            cache_salt: self.cache_salt.map(str::to_owned).or(cache_salt),
            identifiers,
        })))
    }

    fn group(&self) -> Option<CacheGroup> {
        self.group.map(|number| CacheGroup {
            number,
            rule: GroupRule::of_kind(self.spec_kind, self.window),
            block_size: self.block_size,
        })
    }

    /// None when events about the medium are passed over.
    fn tier(&self, how: Reading<'_>, place: &Reader<'_>) -> Result<Option<Tier>> {
        match self.medium {
            Some(medium) => how.media.tier(medium),
            // Engines that have one cache do not name it.
            None if how.kind != SourceKind::Node => Ok(Some(Tier::Device)),
            None => Err(place.error("a node's event names no medium")),
        }
    }
}

fn hash_or_nil(reader: &mut Reader<'_>) -> Result<Option<EngineHash>> {
    let place = *reader;
    match reader.head()? {
        Head::Nil => Ok(None),
        // Signed ones keep their bits.
        Head::Int { bits, .. } => Ok(Some(EngineHash(bits))),
        Head::Bin(digest) if digest.len() <= DIGEST_BYTES_MAX => {
            Ok(Some(EngineHash::from_digest(digest)))
        }
        Head::Bin(digest) => Err(place.error(format_args!("a digest of {} bytes", digest.len()))),
        other => Err(place.expected("a block hash", &other)),
    }
}

fn hashes(reader: &mut Reader<'_>) -> Result<Option<Vec<EngineHash>>> {
    let place = *reader;
    let Some(count) = reader.array_or_nil("block_hashes")? else {
        return Ok(None);
    };
    if count > HASHES_MAX {
        return Err(place.error(format_args!("{count} hashes, more than {HASHES_MAX}")));
    }
    let mut hashes = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let place = *reader;
        hashes.push(hash_or_nil(reader)?.ok_or_else(|| place.error("nil for a block hash"))?);
    }
    Ok(Some(hashes))
}

/// Reads token ids. SGLang's speculative mode sends pairs of neighbours: the first of each pair is the token, the
/// second comes first in the next pair, so at a branch a block is at most one token too generous.
fn tokens(reader: &mut Reader<'_>, out: &mut Vec<u32>) -> Result<()> {
    let place = *reader;
    let count = reader.array_or_nil("token_ids")?.unwrap_or(0);
    if count > TOKENS_MAX {
        return Err(place.error(format_args!("{count} tokens, more than {TOKENS_MAX}")));
    }
    out.clear();
    out.reserve(count as usize);
    for _ in 0..count {
        let place = *reader;
        let token = match reader.head()? {
            Head::Int {
                bits,
                negative: false,
            } if bits <= u64::from(u32::MAX) => bits as u32,
            Head::Array(2) => {
                let Some(first) = reader.u32_or_nil("a token")? else {
                    return Err(place.error("nil in a pair of tokens"));
                };
                reader.skip()?;
                first
            }
            other => return Err(place.expected("a token id of 32 bits", &other)),
        };
        out.push(token);
    }
    Ok(())
}
