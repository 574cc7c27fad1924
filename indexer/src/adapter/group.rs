//! Groups of a model's layers that cache in different ways, and what each of them needs of a prefix.

/// One group of layers that share a way to cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheGroup {
    /// Its number among the engine's groups.
    pub number: u32,
    /// What it needs.
    pub rule: GroupRule,
    /// Tokens a block of the group; 0 where that is not told.
    pub block_size: u32,
}

/// Which of its blocks a group must hold, so that the engine need not compute the first n tokens again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GroupRule {
    /// Every block from the first on.
    Full,
    /// The last blocks before n that together have at least `tokens` - 1 tokens, or all if n has fewer.
    ///
    /// As in vLLM: `cdiv(sliding_window - 1, block_size)` blocks in a row that end at n, at the start of a sequence as
    /// many as there are.
    Window {
        /// How many tokens, itself included, a token looks back on.
        tokens: u32,
    },
    /// The one block that ends at n: a linear layer's state after n tokens.
    State,
    /// Nothing: its layers do not look at the prefix's cache.
    Nothing,
}

impl GroupRule {
    /// The rule of a group of a kind as vLLM names it; `window` is the sliding window where there is one.
    ///
    /// A kind that is not known, or whose size is not told, needs every block: no rule needs more, so that such a group
    /// never makes a pod look better than it is.
    #[must_use]
    pub fn of_kind(kind: Option<&str>, window: Option<u32>) -> Self {
        match (kind, window) {
            (Some("sliding_window" | "sliding_window_mla"), Some(tokens)) if tokens > 0 => {
                Self::Window { tokens }
            }
            (Some("mamba"), _) => Self::State,
            (Some("encoder_only_attention" | "cross_attention"), _) => Self::Nothing,
            _ => Self::Full,
        }
    }

    /// Whether the group gives up blocks in the middle of what it can serve.
    #[must_use]
    pub const fn has_holes(self) -> bool {
        !matches!(self, Self::Full)
    }

    /// Its name in configuration and answers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Window { .. } => "window",
            Self::State => "state",
            Self::Nothing => "nothing",
        }
    }
}
