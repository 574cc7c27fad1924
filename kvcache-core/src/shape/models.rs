//! Models that can be named.

use std::num::NonZeroU32;

use super::{Attention, Element, LayerGroup, Model, Reach};
use crate::error::{Error, ErrorKind};

/// The kinds of geometry in the table, as compact as the table itself.
#[derive(Clone, Copy)]
enum Kind {
    /// Layers, KV heads, elements of a head.
    Heads(u32, u32, u32),
    /// Layers; the latent is DeepSeek's 512 + 64.
    Latent(u32),
    /// The same with a sparse-attention index of 128 bytes and a 4-byte scale.
    LatentIndexed(u32),
    /// Layers of each kind, KV heads, elements of a head: half of them see 128 tokens only.
    Windowed(u32, u32, u32),
    /// Layers with attention, KV heads, elements of a head, layers with recurrent state.
    Recurrent(u32, u32, u32, u32),
}

/// Tokens that gpt-oss's windowed layers see.
const WINDOW: NonZeroU32 = NonZeroU32::new(128).unwrap();

/// A gated-delta layer's state in bf16: 32 heads of 128 x 128, and 3 steps of an 8,192-channel convolution.
const RECURRENT_LAYER_BYTES: u64 = 32 * 128 * 128 * 2 + 3 * 8192 * 2;

/// Draft (multi-token prediction) layers are left out.
const MODELS: &[(&str, Kind)] = &[
    ("deepseek-r1", Kind::Latent(61)),
    ("deepseek-v3", Kind::Latent(61)),
    ("deepseek-v3.2", Kind::LatentIndexed(61)),
    ("glm-4.5", Kind::Heads(92, 8, 128)),
    ("glm-4.5-air", Kind::Heads(46, 8, 128)),
    ("glm-4.6", Kind::Heads(92, 8, 128)),
    ("glm-4.7-flash", Kind::Latent(47)),
    ("gpt-oss-120b", Kind::Windowed(18, 8, 64)),
    ("gpt-oss-20b", Kind::Windowed(12, 8, 64)),
    ("kimi-k2", Kind::Latent(61)),
    ("kimi-k2.5", Kind::Latent(61)),
    ("llama-3.1-405b", Kind::Heads(126, 8, 128)),
    ("llama-3.1-70b", Kind::Heads(80, 8, 128)),
    ("llama-3.1-8b", Kind::Heads(32, 8, 128)),
    ("llama-3.3-70b", Kind::Heads(80, 8, 128)),
    ("qwen3-0.6b", Kind::Heads(28, 8, 128)),
    ("qwen3-1.7b", Kind::Heads(28, 8, 128)),
    ("qwen3-14b", Kind::Heads(40, 8, 128)),
    ("qwen3-235b-a22b", Kind::Heads(94, 4, 128)),
    ("qwen3-30b-a3b", Kind::Heads(48, 4, 128)),
    ("qwen3-32b", Kind::Heads(64, 8, 128)),
    ("qwen3-4b", Kind::Heads(36, 8, 128)),
    ("qwen3-8b", Kind::Heads(36, 8, 128)),
    ("qwen3-coder-480b-a35b", Kind::Heads(62, 8, 128)),
    ("qwen3-next-80b", Kind::Recurrent(12, 2, 256, 36)),
    ("qwen3.5-35b", Kind::Recurrent(10, 2, 256, 30)),
];

/// The names that [`model`] knows, in alphabetical order.
pub fn model_names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|(name, _)| *name)
}

/// The geometry of a well-known model, its cache in bf16.
///
/// # Errors
/// [`ErrorKind::NotFound`] with all names that are known.
pub fn model(name: &str) -> Result<Model, Error> {
    let Some((name, kind)) = MODELS.iter().find(|(known, _)| *known == name) else {
        let known: Vec<_> = model_names().collect();
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "no model is called {name:?}; known are {}",
                known.join(", ")
            ),
        ));
    };
    let full = |layers, attention| LayerGroup {
        layers,
        attention,
        reach: Reach::Full,
    };
    let latent = |index_bytes| Attention::Latent {
        latent: 512,
        rotary: 64,
        index_bytes,
    };
    let (groups, recurrent_layers) = match *kind {
        Kind::Heads(layers, heads, head_elements) => (
            vec![full(
                layers,
                Attention::Heads {
                    heads,
                    head_elements,
                },
            )],
            0,
        ),
        Kind::Latent(layers) => (vec![full(layers, latent(0))], 0),
        Kind::LatentIndexed(layers) => (vec![full(layers, latent(132))], 0),
        Kind::Windowed(layers, heads, head_elements) => {
            let attention = Attention::Heads {
                heads,
                head_elements,
            };
            let windowed = LayerGroup {
                layers,
                attention,
                reach: Reach::Window(WINDOW),
            };
            (vec![full(layers, attention), windowed], 0)
        }
        Kind::Recurrent(layers, heads, head_elements, recurrent) => (
            vec![full(
                layers,
                Attention::Heads {
                    heads,
                    head_elements,
                },
            )],
            recurrent,
        ),
    };
    let model = Model::new(name, groups, Element::Bf16)?;
    Ok(model.with_recurrent_bytes(u64::from(recurrent_layers) * RECURRENT_LAYER_BYTES))
}
