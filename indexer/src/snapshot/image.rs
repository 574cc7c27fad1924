//! Images of sources as columns, and back as hostile input.

use kvcache_core::{EngineHash, Error, IndexKey, Result, Tier};
use kvfabric_proto::v1;

use super::corrupt;
use crate::index::{
    IMAGE_BLOCKS_MAX, ImageBlock, ImageContent, ImageNamespace, ImageOrphan, ImagePart, ImagePiece,
};
use crate::score::TIERS;
use crate::wire::SourceKind;

/// The longest adapter name, salt or identifier that is read, in bytes.
const TEXT_BYTES_MAX: usize = 4096;
/// The most identifiers of one waiting block that are read.
const IDENTIFIERS_MAX: usize = 1024;

/// A piece of a source's image as it is sent.
pub(crate) fn image_to_wire(piece: &ImagePiece, kind: SourceKind) -> v1::SnapshotImage {
    let mut image = v1::SnapshotImage {
        hashes: piece.blocks.iter().map(|block| block.hash.0).collect(),
        copies: piece.blocks.iter().flat_map(|block| block.copies).collect(),
        ..v1::SnapshotImage::default()
    };
    if kind == SourceKind::Node {
        return image;
    }
    image.namespaces = piece.namespaces.iter().map(namespace_to_wire).collect();
    image.keys = piece.blocks.iter().map(|block| block.key.0).collect();
    let namespaces = piece.blocks.iter().map(|block| block.namespace);
    image.namespace_positions = namespaces
        .map(|place| place.map_or(0, |place| place + 1))
        .collect();
    // Who does not know of blocks that are apart takes each for the first of its chain, which it may be.
    let follows = piece.blocks.iter();
    let follows = follows.map(|block| block.follows && !block.is_apart);
    image.follows = follows.collect();
    if piece.blocks.iter().any(|block| block.is_apart) {
        image.apart = piece.blocks.iter().map(apart_to_wire).collect();
    }
    image.orphans = piece.orphans.iter().map(orphan_to_wire).collect();
    image.parts = piece.parts.iter().map(part_to_wire).collect();
    image
}

const fn apart_to_wire(block: &ImageBlock) -> u32 {
    match (block.is_apart, block.follows) {
        (false, _) => 0,
        (true, false) => 1,
        (true, true) => 2,
    }
}

fn namespace_to_wire(namespace: &ImageNamespace) -> v1::SnapshotNamespace {
    v1::SnapshotNamespace {
        lora: namespace.lora.clone(),
        cache_salt: namespace.cache_salt.clone(),
    }
}

fn orphan_to_wire(orphan: &ImageOrphan) -> v1::SnapshotOrphan {
    let content = orphan.content.as_ref().map(|content| v1::SnapshotContent {
        parent: content.parent.0,
        tokens: tokens_to_wire(&content.tokens).into(),
        identifiers: content.identifiers.clone(),
    });
    v1::SnapshotOrphan {
        hash: orphan.hash.0,
        copies: orphan.copies.to_vec(),
        content,
    }
}

/// # Errors
/// `Corrupt` naming what does not fit together.
pub(super) fn image_from_wire(
    mut image: v1::SnapshotImage,
    kind: SourceKind,
    tokens_per_block: u32,
) -> Result<ImagePiece> {
    let count = image.hashes.len();
    within(
        "blocks in an image",
        count + image.orphans.len() + image.parts.len(),
        IMAGE_BLOCKS_MAX,
    )?;
    within(
        "namespaces in an image",
        image.namespaces.len(),
        IMAGE_BLOCKS_MAX,
    )?;
    let is_node = kind == SourceKind::Node;
    let columns = if is_node { 0 } else { count };
    let apart = if image.apart.is_empty() { 0 } else { columns };
    let lengths = [
        ("keys", image.keys.len(), columns),
        (
            "namespace positions",
            image.namespace_positions.len(),
            columns,
        ),
        ("follows", image.follows.len(), columns),
        ("copies", image.copies.len(), count * TIERS),
        ("marks of what is apart", image.apart.len(), apart),
    ];
    for (name, length, expected) in lengths {
        if length != expected {
            return Err(corrupt(format!(
                "{length} {name} for {count} blocks, expected {expected}"
            )));
        }
    }
    let is_bare = image.orphans.is_empty() && image.namespaces.is_empty() && image.parts.is_empty();
    if is_node && !is_bare {
        return Err(corrupt(
            "a node's image with namespaces, parts or blocks that wait",
        ));
    }
    let namespaces = std::mem::take(&mut image.namespaces)
        .into_iter()
        .map(namespace_from_wire)
        .collect::<Result<Vec<_>>>()?;
    let blocks = (0..count)
        .map(|position| block_from_wire(&image, position, namespaces.len()))
        .collect::<Result<_>>()?;
    let parts = image.parts.into_iter();
    let parts = parts.map(|part| part_from_wire(part, namespaces.len(), tokens_per_block));
    let parts = parts.collect::<Result<_>>()?;
    let orphans = image.orphans.into_iter();
    let orphans = orphans.map(|orphan| orphan_from_wire(orphan, tokens_per_block));
    Ok(ImagePiece {
        namespaces,
        blocks,
        orphans: orphans.collect::<Result<_>>()?,
        parts,
    })
}

/// One block of columns whose lengths fit.
fn block_from_wire(
    image: &v1::SnapshotImage,
    position: usize,
    namespaces: usize,
) -> Result<ImageBlock> {
    let namespace = match image.namespace_positions.get(position) {
        None | Some(0) => None,
        Some(&number) if number as usize <= namespaces => Some(number - 1),
        Some(number) => {
            return Err(corrupt(format!(
                "block {position} is in namespace {number} of {namespaces}"
            )));
        }
    };
    let hash = image.hashes[position];
    let apart = image.apart.get(position).copied().unwrap_or(0);
    if apart > 2 {
        let told = format!("block {position} is apart in the way {apart}, expected 0 to 2");
        return Err(corrupt(told));
    }
    let follows = image.follows.get(position).copied().unwrap_or(false);
    Ok(ImageBlock {
        hash: EngineHash(hash),
        key: IndexKey(image.keys.get(position).copied().unwrap_or(hash)),
        follows: follows && apart == 0 || apart == 2,
        is_apart: apart > 0,
        namespace,
        copies: copies_from_wire(&image.copies[position * TIERS..][..TIERS]),
    })
}

fn copies_from_wire(copies: &[u32]) -> [u32; TIERS] {
    let mut counts = [0; TIERS];
    counts.copy_from_slice(copies);
    counts
}

fn namespace_from_wire(namespace: v1::SnapshotNamespace) -> Result<ImageNamespace> {
    for text in namespace.lora.iter().chain(&namespace.cache_salt) {
        within(
            "bytes of an adapter's name or salt",
            text.len(),
            TEXT_BYTES_MAX,
        )?;
    }
    Ok(ImageNamespace {
        lora: namespace.lora,
        cache_salt: namespace.cache_salt,
    })
}

fn orphan_from_wire(orphan: v1::SnapshotOrphan, tokens_per_block: u32) -> Result<ImageOrphan> {
    if orphan.copies.len() != TIERS {
        return Err(corrupt(format!(
            "{} copies of a block that waits, expected {TIERS}",
            orphan.copies.len()
        )));
    }
    let content = orphan.content.map(|content| {
        // Exactly how many, the index knows of each source.
        let (bytes, most) = (content.tokens.len(), tokens_per_block as usize * 4);
        if bytes == 0 || !bytes.is_multiple_of(4) || bytes > most {
            return Err(corrupt(format!(
                "{bytes} bytes of tokens of a block that waits, expected 4 a token and at most {most}"
            )));
        }
        check_identifiers(&content.identifiers)?;
        Ok(ImageContent {
            parent: EngineHash(content.parent),
            tokens: tokens_from_wire(&content.tokens),
            identifiers: content.identifiers,
        })
    });
    Ok(ImageOrphan {
        hash: EngineHash(orphan.hash),
        copies: copies_from_wire(&orphan.copies),
        content: content.transpose()?,
    })
}

fn part_to_wire(part: &ImagePart) -> v1::SnapshotPart {
    v1::SnapshotPart {
        hash: part.hash.0,
        parent: part.parent.map(|parent| parent.0),
        namespace_position: part.namespace + 1,
        copies: part.copies.to_vec(),
        tokens: tokens_to_wire(&part.tokens).into(),
        identifiers: part.identifiers.clone(),
        key: part.key.map(|key| key.0),
    }
}

fn part_from_wire(
    part: v1::SnapshotPart,
    namespaces: usize,
    tokens_per_block: u32,
) -> Result<ImagePart> {
    let number = part.namespace_position;
    if number == 0 || number as usize > namespaces {
        let told = format!("a part is in namespace {number} of {namespaces}");
        return Err(corrupt(told));
    }
    let (copies, bytes) = (part.copies.len(), part.tokens.len());
    let most = (tokens_per_block as usize).saturating_mul(4);
    if copies != TIERS || !bytes.is_multiple_of(4) || bytes > most {
        return Err(corrupt(format!(
            "a part with {copies} copies and {bytes} bytes of tokens, expected {TIERS} and at most {most}"
        )));
    }
    check_identifiers(&part.identifiers)?;
    Ok(ImagePart {
        hash: EngineHash(part.hash),
        parent: part.parent.map(EngineHash),
        namespace: number - 1,
        copies: copies_from_wire(&part.copies),
        tokens: tokens_from_wire(&part.tokens),
        identifiers: part.identifiers,
        key: part.key.map(IndexKey),
    })
}

fn tokens_to_wire(tokens: &[u32]) -> Vec<u8> {
    tokens
        .iter()
        .flat_map(|token| token.to_le_bytes())
        .collect()
}

fn tokens_from_wire(bytes: &[u8]) -> Vec<u32> {
    let tokens = bytes.chunks_exact(4);
    tokens
        .map(|raw| u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]))
        .collect()
}

fn check_identifiers(identifiers: &[String]) -> Result<()> {
    within("identifiers of a block", identifiers.len(), IDENTIFIERS_MAX)?;
    let longest = identifiers.iter().map(String::len).max().unwrap_or(0);
    within("bytes of an identifier", longest, TEXT_BYTES_MAX)
}

/// A piece of what shared tiers hold, as it is sent.
pub(crate) fn shared_to_wire(entries: &[(IndexKey, Tier)]) -> v1::SnapshotImage {
    let mut image = v1::SnapshotImage::default();
    for &(key, tier) in entries {
        image.hashes.push(key.0);
        let mut copies = [0; TIERS];
        copies[tier as usize] = 1;
        image.copies.extend(copies);
    }
    image
}

/// # Errors
/// `Corrupt` naming what does not fit together.
pub(super) fn shared_from_wire(image: &v1::SnapshotImage) -> Result<Vec<(IndexKey, Tier)>> {
    let count = image.hashes.len();
    within("blocks in an image", count, IMAGE_BLOCKS_MAX)?;
    if image.copies.len() != count * TIERS {
        return Err(corrupt(format!(
            "{} copies for {count} shared blocks",
            image.copies.len()
        )));
    }
    let mut entries = Vec::with_capacity(count);
    for (&key, copies) in image.hashes.iter().zip(image.copies.chunks_exact(TIERS)) {
        for tier in Tier::ALL {
            if copies[tier as usize] > 0 {
                if !tier.is_shared() {
                    return Err(corrupt(format!("tier {tier} among the shared ones")));
                }
                entries.push((IndexKey(key), tier));
            }
        }
    }
    Ok(entries)
}

fn within(what: &str, value: usize, most: usize) -> Result<()> {
    if value <= most {
        Ok(())
    } else {
        Err(Error::invalid(what, value, 0..=most))
    }
}
