//! Text prompts to tokens, with local `tokenizer.json` files and a bounded memory of the prompts seen.

use std::collections::HashMap;
use std::sync::Arc;

use kvcache_core::{Error, ErrorKind, Result};
use tokio::sync::Semaphore;

use crate::config::TokenizerConfig;

/// Bytes of prompts and their tokens that are remembered.
const CACHE_BYTES_MAX: u64 = 64 << 20;
/// Prompts tokenised at once; further ones wait until their call's deadline.
const CONCURRENCY_MAX: usize = 4;
/// What an entry costs beside its text and tokens.
const ENTRY_OVERHEAD_BYTES: usize = 128;

/// A prompt by model and text: the whole text, since tokens of a shorter one need not be a prefix of its own.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Prompt {
    model: usize,
    text: Arc<str>,
}

/// The tokenizers of the configured models.
pub(crate) struct Tokenizers {
    positions: HashMap<String, usize>,
    models: Arc<Vec<engine::Model>>,
    cache: moka::sync::Cache<Prompt, Arc<[u32]>>,
    running: Semaphore,
}

impl Tokenizers {
    /// Loads every file.
    ///
    /// # Errors
    /// `Invalid` naming the key and the file when one cannot be read; `Unsupported` in builds without tokenizers.
    pub(crate) fn load(configs: &[TokenizerConfig]) -> Result<Self> {
        let mut positions = HashMap::new();
        let mut models = Vec::with_capacity(configs.len());
        for (position, config) in configs.iter().enumerate() {
            let place = format!("tokenizers[{position}] ({})", config.path.display());
            models.push(engine::Model::load(config).map_err(|error| error.at(&place))?);
            if positions.insert(config.model.clone(), position).is_some() {
                let context = format!("{place}: model {:?} is there twice", config.model);
                return Err(Error::new(ErrorKind::Invalid, context));
            }
        }
        let cache = moka::sync::Cache::builder()
            .weigher(|prompt: &Prompt, tokens: &Arc<[u32]>| {
                let bytes = prompt.text.len() + tokens.len() * 4 + ENTRY_OVERHEAD_BYTES;
                u32::try_from(bytes).unwrap_or(u32::MAX)
            })
            .max_capacity(CACHE_BYTES_MAX)
            .build();
        let running = Semaphore::new(CONCURRENCY_MAX);
        Ok(Self {
            positions,
            models: Arc::new(models),
            cache,
            running,
        })
    }

    /// The tokens of a prompt; none when the model has no tokenizer here.
    ///
    /// # Errors
    /// `Invalid` when the tokenizer refuses the text.
    pub(crate) async fn tokens(&self, model: &str, text: &str) -> Result<Option<Arc<[u32]>>> {
        let Some(&model) = self.positions.get(model) else {
            return Ok(None);
        };
        let prompt = Prompt {
            model,
            text: text.into(),
        };
        if let Some(tokens) = self.cache.get(&prompt) {
            return Ok(Some(tokens));
        }
        // The semaphore is never closed, so this waits and cannot fail.
        let _permit = self.running.acquire().await;
        let (models, text) = (self.models.clone(), prompt.text.clone());
        let tokens = tokio::task::spawn_blocking(move || models[model].tokens(&text))
            .await
            .map_err(|error| {
                Error::new(ErrorKind::Internal, "tokenise a prompt").with_source(error)
            })??;
        self.cache.insert(prompt, tokens.clone());
        Ok(Some(tokens))
    }
}

#[cfg(feature = "tokenizer")]
mod engine {
    use std::sync::Arc;

    use kvcache_core::{Error, ErrorKind, Result};
    use tokenizers::Tokenizer;

    use crate::config::TokenizerConfig;

    pub(super) struct Model {
        tokenizer: Tokenizer,
        add_special_tokens: bool,
    }

    impl Model {
        pub(super) fn load(config: &TokenizerConfig) -> Result<Self> {
            let tokenizer = Tokenizer::from_file(&config.path).map_err(|error| {
                Error::new(ErrorKind::Invalid, "not a readable tokenizer.json").with_source(error)
            })?;
            Ok(Self {
                tokenizer,
                add_special_tokens: config.add_special_tokens,
            })
        }

        pub(super) fn tokens(&self, text: &str) -> Result<Arc<[u32]>> {
            let encoding = self
                .tokenizer
                .encode_fast(text, self.add_special_tokens)
                .map_err(|error| {
                    Error::new(ErrorKind::Invalid, "tokenise a prompt").with_source(error)
                })?;
            Ok(encoding.get_ids().into())
        }
    }
}

#[cfg(not(feature = "tokenizer"))]
mod engine {
    use std::sync::Arc;

    use kvcache_core::{Error, ErrorKind, Result};

    use crate::config::TokenizerConfig;

    pub(super) enum Model {}

    impl Model {
        pub(super) fn load(_config: &TokenizerConfig) -> Result<Self> {
            Err(Error::new(
                ErrorKind::Unsupported,
                "this build has no tokenizers",
            ))
        }

        pub(super) fn tokens(&self, _text: &str) -> Result<Arc<[u32]>> {
            match *self {}
        }
    }
}
