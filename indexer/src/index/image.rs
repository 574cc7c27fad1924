//! A source as it can be written down and taken up elsewhere.

use std::collections::HashMap;

use kvcache_core::{EngineHash, Error, IndexKey, Result, Tier};

use super::config::{Applied, Learnt, SourceId, SourceSpec};
use super::orphans::Content;
use super::sets::Holder;
use super::source::{Source, Writer};
use super::tree::Shared;
use super::{KvIndex, State, gone, lock, read};
use crate::score::TIERS;

/// The most blocks, placed or waiting, in one [`ImagePiece`].
pub const IMAGE_BLOCKS_MAX: usize = 4096;

/// Everything that is needed to go on applying a source's events, as of one moment between two events.
///
/// To take it up: `add_source` with the spec, then `import` every piece in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceImage {
    /// As it was registered.
    pub spec: SourceSpec,
    /// The cache group that the index follows; none before the first event that names one.
    pub group: Option<u32>,
    /// What else its events have told of it.
    pub learnt: Learnt,
    /// Placed blocks first, then those that wait; each piece has at most [`IMAGE_BLOCKS_MAX`] of both together.
    pub pieces: Vec<ImagePiece>,
}

/// A bounded part of a [`SourceImage`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImagePiece {
    /// The namespaces that blocks of this piece are in.
    pub namespaces: Vec<ImageNamespace>,
    /// Blocks whose place in the index is known.
    pub blocks: Vec<ImageBlock>,
    /// Blocks that wait for the block before them or for their tokens.
    pub orphans: Vec<ImageOrphan>,
    /// Of a source whose blocks are smaller than the index's, these instead of blocks: each after the one it follows.
    pub parts: Vec<ImagePart>,
}

/// What keeps equal tokens apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct ImageNamespace {
    /// The adapter's name.
    pub lora: Option<String>,
    /// The tenant's cache salt.
    pub cache_salt: Option<String>,
}

/// A block whose place is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageBlock {
    /// The source's name for it; of a node, the key.
    pub hash: EngineHash,
    /// Its place in the index.
    pub key: IndexKey,
    /// Whether it comes directly after the block before it in this piece.
    pub follows: bool,
    /// Whether it is kept apart from blocks of main groups, as windows and states are.
    pub is_apart: bool,
    /// Its place in the piece's namespaces; none where nobody has told it, as nodes do not.
    pub namespace: Option<u32>,
    /// Copies by tier, by `Tier as usize`: of shared tiers 1 when the source has announced it.
    pub copies: [u32; TIERS],
}

/// A block that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageOrphan {
    /// The source's name for it.
    pub hash: EngineHash,
    /// Copies by tier.
    pub copies: [u32; TIERS],
    /// What places it once the block before it is placed; none when its tokens have not been told.
    pub content: Option<ImageContent>,
}

/// A block of the engine's, where several make one of the index's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImagePart {
    /// The source's name for it.
    pub hash: EngineHash,
    /// The one before; none at the start of a chain.
    pub parent: Option<EngineHash>,
    /// Its place in the piece's namespaces.
    pub namespace: u32,
    /// Copies by tier.
    pub copies: [u32; TIERS],
    /// Its own; none of the last one of a block of the index.
    pub tokens: Vec<u32>,
    /// Identifiers of images and the like.
    pub identifiers: Vec<String>,
    /// Of the last one of a block of the index, the block.
    pub key: Option<IndexKey>,
}

/// What shaped a waiting block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageContent {
    /// The block before it.
    pub parent: EngineHash,
    /// As many as a block has.
    pub tokens: Vec<u32>,
    /// Identifiers of images and the like.
    pub identifiers: Vec<String>,
}

impl ImageNamespace {
    pub(super) fn text_bytes(&self) -> usize {
        let texts = [&self.lora, &self.cache_salt].into_iter().flatten();
        texts.map(String::len).sum()
    }
}

impl ImagePiece {
    /// Blocks of all kinds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len() + self.orphans.len() + self.parts.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// # Errors
    /// `Invalid` naming what exceeds a bound or points nowhere.
    pub(super) fn check(&self) -> Result<()> {
        let blocks = self.len();
        if blocks > IMAGE_BLOCKS_MAX || self.namespaces.len() > IMAGE_BLOCKS_MAX {
            return Err(Error::invalid(
                "blocks of a piece",
                blocks,
                0..=IMAGE_BLOCKS_MAX,
            ));
        }
        let of_blocks = self.blocks.iter().filter_map(|block| block.namespace);
        let of_parts = self.parts.iter().map(|part| part.namespace);
        for namespace in of_blocks.chain(of_parts) {
            if namespace as usize >= self.namespaces.len() {
                return Err(Error::invalid(
                    "namespace of a block",
                    namespace,
                    0..self.namespaces.len(),
                ));
            }
        }
        Ok(())
    }

    /// # Errors
    /// `Invalid` naming the tokens of a block that waits when they are not as many as the source's blocks have.
    fn check_waiting(&self, tokens: u32) -> Result<()> {
        let contents = self.orphans.iter();
        let contents = contents.filter_map(|orphan| orphan.content.as_ref());
        let mut lengths = contents.map(|content| content.tokens.len());
        match lengths.find(|length| *length != tokens as usize) {
            Some(length) => Err(Error::invalid("tokens of a waiting block", length, tokens)),
            None => Ok(()),
        }
    }
}

impl Source {
    /// Everything that is needed to go on with this source elsewhere.
    pub(super) fn image(&self, writer: &Writer, shared: &Shared) -> SourceImage {
        let mut pieces = Pieces::default();
        if self.is_fine() {
            // What the index holds because of them follows from them.
            self.parts(|part, root| pieces.push_part(part, writer.roots.name(root)));
            for orphan in self.orphans.images() {
                pieces.push_orphan(orphan);
            }
            return self.image_with(writer, pieces);
        }
        let names = self.own_names();
        let mut runs: Vec<u32> = self.runs().collect();
        runs.sort_unstable();
        for run in runs {
            let is_apart = writer.tree.is_apart(shared, run);
            let mut last = None;
            for (start, span) in writer.tree.spans(shared, run) {
                let held = Tier::ALL.map(|tier| {
                    writer
                        .tree
                        .has(shared, span, Holder::new(self.number, tier))
                });
                if !held.contains(&true) {
                    continue;
                }
                for block in start..span.end {
                    let place = writer.tree.block(shared, run, block);
                    let key = writer.tree.key(shared, place.position);
                    let copies = Tier::ALL.map(|tier| {
                        u32::from(held[tier as usize])
                            .saturating_add(self.more(place.position, tier))
                    });
                    let own = names.get(&place.position).copied();
                    let hash = own.or_else(|| writer.tree.name(place.position));
                    let root = self.root_of(writer, shared, place);
                    pieces.push_block(
                        ImageBlock {
                            hash: hash
                                .filter(|_| !self.is_node())
                                .unwrap_or(EngineHash(key.0)),
                            key,
                            follows: last.is_some_and(|last| last + 1 == block),
                            is_apart,
                            namespace: None,
                            copies,
                        },
                        root.filter(|_| !self.is_node())
                            .map(|root| writer.roots.name(root)),
                    );
                    last = Some(block);
                }
            }
        }
        for orphan in self.orphans.images() {
            pieces.push_orphan(orphan);
        }
        self.image_with(writer, pieces)
    }

    fn image_with(&self, writer: &Writer, pieces: Pieces) -> SourceImage {
        SourceImage {
            spec: self.spec.clone(),
            group: self.groups.main(),
            learnt: self.learnt(writer.keys.block_size.get()),
            pieces: pieces.pieces,
        }
    }

    /// Takes up a piece that has been checked.
    pub(super) fn take_up(
        &mut self,
        writer: &mut Writer,
        shared: &Shared,
        piece: &ImagePiece,
    ) -> Applied {
        let mut applied = Applied::default();
        let namespaces = piece.namespaces.iter();
        let roots: Vec<u32> = namespaces
            .map(|name| {
                let (lora, salt) = (name.lora.as_deref(), name.cache_salt.as_deref());
                writer.roots.acquire(&writer.keys, lora, salt)
            })
            .collect();
        let mut last = None;
        for block in &piece.blocks {
            if block.copies.iter().all(|copies| *copies == 0) {
                last = None;
                continue;
            }
            let previous = last.filter(|_| block.follows);
            let root = block
                .namespace
                .and_then(|namespace| roots.get(namespace as usize))
                .copied();
            let place = self.take_up_block(writer, shared, previous, block, root);
            self.add_copies(writer, shared, place, &block.copies, &mut applied);
            last = Some(place);
        }
        for part in &piece.parts {
            let root = roots[part.namespace as usize];
            self.take_up_part(writer, shared, part, root, &mut applied);
        }
        for orphan in &piece.orphans {
            self.take_up_orphan(orphan, &mut applied);
        }
        for root in roots {
            writer.roots.release(root);
        }
        applied
    }

    fn take_up_orphan(&mut self, orphan: &ImageOrphan, applied: &mut Applied) {
        if !self.orphans.contains(orphan.hash) {
            if !self.orphans.insert(orphan.hash) {
                applied.refused += 1;
                return;
            }
            applied.orphaned += 1;
        }
        if let Some(copies) = self.orphans.copies_mut(orphan.hash) {
            *copies = orphan.copies;
        }
        let Some(content) = &orphan.content else {
            return;
        };
        let content = Content {
            parent: content.parent,
            tokens: content.tokens.as_slice().into(),
            identifiers: content.identifiers.clone(),
        };
        if !self.orphans.attach(orphan.hash, content) {
            applied.refused += 1;
        }
    }
}

/// Pieces, the last of which is being filled.
#[derive(Default)]
struct Pieces {
    pieces: Vec<ImagePiece>,
    numbers: HashMap<ImageNamespace, u32>,
}

impl Pieces {
    fn last(&mut self) -> &mut ImagePiece {
        let last = self.pieces.last();
        let is_full = last.is_none_or(|piece| piece.len() >= IMAGE_BLOCKS_MAX);
        if is_full {
            self.numbers.clear();
            self.pieces.push(ImagePiece::default());
        }
        let last = self.pieces.len() - 1;
        &mut self.pieces[last]
    }

    fn push_block(&mut self, block: ImageBlock, namespace: Option<&ImageNamespace>) {
        let is_first = self.last().blocks.is_empty();
        let namespace = namespace.map(|name| self.number(name));
        self.last().blocks.push(ImageBlock {
            follows: block.follows && !is_first,
            namespace,
            ..block
        });
    }

    /// The place of a namespace in the piece that is being filled.
    fn number(&mut self, name: &ImageNamespace) -> u32 {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let number = self.numbers.len() as u32;
        self.numbers.insert(name.clone(), number);
        self.last().namespaces.push(name.clone());
        number
    }

    fn push_part(&mut self, part: ImagePart, namespace: &ImageNamespace) {
        self.last();
        let namespace = self.number(namespace);
        self.last().parts.push(ImagePart { namespace, ..part });
    }

    fn push_orphan(&mut self, orphan: ImageOrphan) {
        self.last().orphans.push(orphan);
    }
}

impl KvIndex {
    /// The source as of one moment between two events.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::NotFound`] when the source is gone.
    pub fn export(&self, id: SourceId) -> Result<SourceImage> {
        let state = lock(&self.state);
        let source = state.sources.get(&id).ok_or_else(|| gone(id))?;
        Ok(source.image(&state.writer, &read(&self.view).tree))
    }

    /// Takes a piece of an image up, beside what the source holds already.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Invalid`] naming what contradicts itself or exceeds a bound (nothing of the piece was taken);
    /// [`kvcache_core::ErrorKind::NotFound`] when the source is gone; [`kvcache_core::ErrorKind::Busy`] when the index is full.
    pub fn import(&self, id: SourceId, piece: &ImagePiece) -> Result<Applied> {
        piece.check()?;
        let mut state = lock(&self.state);
        let source = state.sources.get(&id).ok_or_else(|| gone(id))?;
        piece.check_waiting(source.tokens_told(self.config.block_size.get()))?;
        self.admit_import(&mut state, piece.len())?;
        let State {
            writer, sources, ..
        } = &mut *state;
        let source = sources.get_mut(&id).ok_or_else(|| gone(id))?;
        let most = piece.len() + source.orphans.len();
        let view = self.make_room(writer, read(&self.view), most)?;
        // A piece does not say what its first block follows, which may be in the index already.
        writer.tree.index_keys(&view.tree);
        let applied = source.take_up(writer, &view.tree, piece);
        Self::finish(writer, &view);
        drop(view);
        self.settle(&mut state, Some(id));
        Ok(applied)
    }

    /// The blocks in shared tiers, in pieces of at most [`IMAGE_BLOCKS_MAX`]; who stored them may be gone.
    #[must_use]
    pub fn export_shared(&self) -> Vec<Vec<(IndexKey, Tier)>> {
        let state = lock(&self.state);
        let view = read(&self.view);
        let keys = state.writer.tree.keys_held(&view.tree, Holder::SHARED);
        let blocks: Vec<_> = keys.into_iter().map(|key| (key, Tier::Object)).collect();
        blocks.chunks(IMAGE_BLOCKS_MAX).map(<[_]>::to_vec).collect()
    }

    /// Takes blocks in shared tiers up; those of other tiers, which belong to sources, are passed over.
    ///
    /// # Errors
    /// [`kvcache_core::ErrorKind::Busy`] when the index is full.
    pub fn import_shared(&self, blocks: &[(IndexKey, Tier)]) -> Result<Applied> {
        let mut state = lock(&self.state);
        self.admit_import(&mut state, blocks.len())?;
        let State { writer, .. } = &mut *state;
        let view = self.make_room(writer, read(&self.view), blocks.len())?;
        writer.tree.index_keys(&view.tree);
        let shared = blocks
            .iter()
            .filter(|(_, tier)| tier.is_shared())
            .map(|(key, _)| *key);
        let applied = writer.share_keys(&view.tree, shared);
        Self::finish(writer, &view);
        drop(view);
        self.settle(&mut state, None);
        Ok(applied)
    }
}
