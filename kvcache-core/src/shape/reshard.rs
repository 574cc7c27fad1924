//! Which bytes go where when a block moves between engines of different tensor-parallel sizes.
//!
//! Each rank holds some of the heads ([`Tensor::heads`]). A block that `m` ranks stored becomes a block for `n` ranks
//! by copying ranges, never by computing: [`Reshard::pieces`] lists them for one target rank, and every byte of that
//! rank's block is in exactly one piece.

use super::{Attention, Element, HEAD_ELEMENTS_MAX, HEADS_MAX, LAYERS_MAX, Tensor, TokensPerBlock};
use crate::error::{Error, ErrorKind};

/// The order of a page's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageOrder {
    /// All tokens of a head side by side (vLLM's HND): a range of heads is one range of bytes.
    HeadsFirst,
    /// All heads of a token side by side (NHD): a range of heads is one range of bytes for each token.
    TokensFirst,
}

/// The form of a block on one rank: layers in order, each a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockForm {
    /// Layers.
    pub layers: u32,
    /// Tokens.
    pub tokens: TokensPerBlock,
    /// KV heads of the whole model; 1 for a latent.
    pub heads: u32,
    /// Bytes of one head (key and value) or of the latent, for one token in one layer.
    pub head_bytes: u32,
    /// The order within a page.
    pub order: PageOrder,
}

impl BlockForm {
    /// The form of a block of layers with this attention.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a number outside its range, or an element type that the attention does not have.
    pub fn new(
        layers: u32,
        tokens: TokensPerBlock,
        attention: Attention,
        element: Element,
        order: PageOrder,
    ) -> Result<Self, Error> {
        attention.check()?;
        let head_bytes = attention.token_bytes(element, 1)? as u32;
        Ok(Self {
            layers,
            tokens,
            heads: attention.heads(),
            head_bytes,
            order,
        })
    }

    /// Bytes of the block on a rank that holds so many heads.
    #[must_use]
    pub fn bytes(&self, heads: u32) -> u64 {
        u64::from(self.layers) * self.page_bytes(heads)
    }

    fn page_bytes(&self, heads: u32) -> u64 {
        u64::from(self.tokens.get()) * u64::from(heads) * u64::from(self.head_bytes)
    }

    fn check(&self) -> Result<(), Error> {
        let head_bytes_max = HEAD_ELEMENTS_MAX * 8;
        for (field, value, max) in [
            ("layers", self.layers, LAYERS_MAX),
            ("heads", self.heads, HEADS_MAX),
            ("head_bytes", self.head_bytes, head_bytes_max),
        ] {
            if !(1..=max).contains(&value) {
                return Err(Error::invalid(field, value, 1..=max));
            }
        }
        Ok(())
    }
}

/// One range of bytes to copy from a source rank's block into a target rank's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Piece {
    /// Whose block to read.
    pub source_rank: u32,
    /// Where in it, in bytes.
    pub source_offset: u64,
    /// Where in the target's block, in bytes.
    pub target_offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// The way from `m` ranks to `n`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reshard {
    form: BlockForm,
    source_size: u32,
    target_size: u32,
}

impl Reshard {
    /// From blocks that `source_size` ranks stored to blocks for `target_size` ranks, both in this form.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a number outside its range, or heads that one of the sizes cannot divide.
    pub fn new(form: BlockForm, source_size: u32, target_size: u32) -> Result<Self, Error> {
        form.check()?;
        for (place, size) in [("source", source_size), ("target", target_size)] {
            let divided = Tensor::new(0, size).and_then(|tensor| tensor.heads(form.heads));
            divided.map_err(|error| error.at(place))?;
        }
        Ok(Self {
            form,
            source_size,
            target_size,
        })
    }

    /// Bytes of a block on each source rank.
    #[must_use]
    pub fn source_bytes(&self) -> u64 {
        self.form.bytes(self.heads_each(self.source_size))
    }

    /// Bytes of a block on each target rank.
    #[must_use]
    pub fn target_bytes(&self) -> u64 {
        self.form.bytes(self.heads_each(self.target_size))
    }

    /// `new` has checked that one number divides the other.
    fn heads_each(&self, size: u32) -> u32 {
        (self.form.heads / size).max(1)
    }

    /// What to copy for one target rank, in the order of its bytes; neighbours are merged.
    ///
    /// Where several sources hold the same head, target ranks take turns among them.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a rank that the target does not have.
    pub fn pieces(&self, target_rank: u32) -> Result<Vec<Piece>, Error> {
        let form = &self.form;
        let target_heads = Tensor::new(target_rank, self.target_size)?.heads(form.heads)?;
        let mut runs: Vec<Run> = Vec::new();
        for head in target_heads.clone() {
            let rank = self.source_of(head, target_rank);
            let source_heads = Tensor::new(rank, self.source_size)?.heads(form.heads)?;
            if !source_heads.contains(&head) {
                return Err(Error::new(
                    ErrorKind::Internal,
                    format!(
                        "head {head} is looked for on source rank {rank}, which has {source_heads:?}"
                    ),
                ));
            }
            match runs.last_mut() {
                Some(run) if run.rank == rank => run.heads += 1,
                _ => runs.push(Run {
                    rank,
                    rank_heads: source_heads.end - source_heads.start,
                    source_head: head - source_heads.start,
                    target_head: head - target_heads.start,
                    heads: 1,
                }),
            }
        }
        Ok(self.cut(&runs, target_heads.end - target_heads.start))
    }

    /// Which source rank gives a head to a target rank.
    fn source_of(&self, head: u32, target_rank: u32) -> u32 {
        if self.source_size <= self.form.heads {
            return head / (self.form.heads / self.source_size);
        }
        let copies = self.source_size / self.form.heads;
        head * copies + target_rank % copies
    }

    fn cut(&self, runs: &[Run], target_heads: u32) -> Vec<Piece> {
        let form = &self.form;
        let tokens = u64::from(form.tokens.get());
        let head_bytes = u64::from(form.head_bytes);
        // A row is what lies between two neighbours of the outer dimension within a page.
        let (rows, row_bytes) = match form.order {
            PageOrder::HeadsFirst => (1, tokens * head_bytes),
            PageOrder::TokensFirst => (tokens, head_bytes),
        };
        let mut pieces: Vec<Piece> = Vec::new();
        for row in 0..u64::from(form.layers) * rows {
            for run in runs {
                let piece = Piece {
                    source_rank: run.rank,
                    source_offset: (row * u64::from(run.rank_heads) + u64::from(run.source_head))
                        * row_bytes,
                    target_offset: (row * u64::from(target_heads) + u64::from(run.target_head))
                        * row_bytes,
                    len: u64::from(run.heads) * row_bytes,
                };
                match pieces.last_mut() {
                    Some(last) if last.continues_with(&piece) => last.len += piece.len,
                    _ => pieces.push(piece),
                }
            }
        }
        pieces
    }
}

impl Piece {
    fn continues_with(&self, next: &Self) -> bool {
        self.source_rank == next.source_rank
            && self.source_offset + self.len == next.source_offset
            && self.target_offset + self.len == next.target_offset
    }
}

/// Consecutive heads that one source rank gives to one target rank.
struct Run {
    rank: u32,
    rank_heads: u32,
    source_head: u32,
    target_head: u32,
    heads: u32,
}
