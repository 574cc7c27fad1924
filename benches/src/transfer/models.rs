//! The shape of what a model's engine sends: layers, heads and pages become blocks and requests.
//!
//! Sizes are those of NIXL's kvbench: `io_size = bytes of a token in a layer / tp [× layers / pp] × tokens of a page`
//! (`get_io_size` in benchmark/kvbench/models/llama3_1.py and deepseek_r1.py of NIXL 1.5).

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use kvcache_core::{Error, ErrorKind, Result};
use serde::Deserialize;

use super::plan::{Layers, Shape};

const KNOWN: &str = include_str!("../../transfer/models.json");
/// More layers, heads or tokens than this is a slip of the pen.
const COUNT_MAX: u32 = 1 << 24;

/// Whose traffic.
#[derive(Args, Clone, Debug)]
pub(super) struct ModelArgs {
    /// Move what an engine sends for one prompt of this model, instead of --sizes: a known one (`transfer models`), one of
    /// --model-file, or `custom`.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// More models: a JSON list like benches/transfer/models.json.
    #[arg(long, value_name = "FILE")]
    model_file: Option<PathBuf>,
    /// Ranks that the heads are divided among; the traffic is that of one.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    tp: u32,
    /// Stages that the layers are divided among; the traffic is that of one.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pp: u32,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=i64::from(COUNT_MAX)))]
    isl: u32,
    /// Tokens of a page.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=i64::from(COUNT_MAX)))]
    page_tokens: u32,
    /// What a number of the cache is.
    #[arg(long, value_enum, default_value_t = KvType::Bf16)]
    kv_dtype: KvType,
    /// Whether a block is a page of one layer, and each layer a request, or a page of all layers.
    #[arg(long, value_enum, default_value_t = Access::Layer)]
    access: Access,
    /// Whether ranks divide a latent vector, as kvbench counts, or each have it whole, as engines do.
    #[arg(long, value_enum, default_value_t = Latent::Divided)]
    latent: Latent,
    /// Keys and values are blocks of their own.
    #[arg(long)]
    split_kv: bool,
    #[command(flatten)]
    custom: CustomArgs,
}

/// A model that is not known, or what is different about a known one.
#[derive(Args, Clone, Debug)]
struct CustomArgs {
    /// Layers with a cache.
    #[arg(long)]
    layers: Option<u32>,
    /// Heads of keys and values.
    #[arg(long)]
    kv_heads: Option<u32>,
    /// Numbers of a head.
    #[arg(long)]
    head_dim: Option<u32>,
    /// Numbers of a latent vector, instead of heads.
    #[arg(long)]
    latent_dim: Option<u32>,
    /// Numbers of its rotary part.
    #[arg(long)]
    rope_dim: Option<u32>,
    /// Layers that look at the last tokens only.
    #[arg(long)]
    windowed_layers: Option<u32>,
    /// Tokens that those look at.
    #[arg(long)]
    window: Option<u32>,
}

/// What a number of the cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum KvType {
    Bf16,
    Fp16,
    Fp8,
    Int8,
    Fp32,
}

impl KvType {
    const fn bytes(self) -> u64 {
        match self {
            Self::Fp8 | Self::Int8 => 1,
            Self::Bf16 | Self::Fp16 => 2,
            Self::Fp32 => 4,
        }
    }
}

/// How pages lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Access {
    Layer,
    Block,
}

/// Who has latent vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Latent {
    Divided,
    Replicated,
}

/// What is known of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Model {
    name: String,
    layers: u32,
    kv_heads: u32,
    head_dim: u32,
    latent_dim: u32,
    rope_dim: u32,
    windowed_layers: u32,
    window: u32,
}

/// The blocks of one prompt, on one rank and stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// The model's.
    pub(super) name: String,
    block_bytes: u64,
    blocks: u64,
    /// None when a block has all layers.
    layers: Option<Layers>,
}

impl Layout {
    /// The case that moves them; requests of whole pages have as many as `base` says.
    ///
    /// # Errors
    /// `Invalid` when they are too many.
    pub(super) fn shape(&self, base: Shape) -> Result<Shape> {
        let total_bytes = self.blocks.checked_mul(self.block_bytes);
        let total_bytes = total_bytes.ok_or_else(|| {
            let context = format!("--model {}: too many bytes", self.name);
            Error::new(ErrorKind::Invalid, context)
        })?;
        Ok(Shape {
            block_bytes: self.block_bytes,
            total_bytes,
            layers: self.layers,
            ..base
        })
    }
}

impl Model {
    fn is_latent(&self) -> bool {
        self.latent_dim > 0
    }

    /// # Errors
    /// `Invalid` naming the model and the field.
    fn check(&self) -> Result<()> {
        let wrong = |what: &str| {
            let context = format!("model {:?}: {what}", self.name);
            Err(Error::new(ErrorKind::Invalid, context))
        };
        if !(1..=COUNT_MAX).contains(&self.layers) {
            return wrong("it needs --layers");
        }
        let has_heads = self.kv_heads > 0 && self.head_dim > 0;
        if self.is_latent() == has_heads {
            return wrong("it needs either --kv-heads and --head-dim or --latent-dim");
        }
        if [self.kv_heads, self.head_dim, self.latent_dim, self.rope_dim]
            .iter()
            .any(|count| *count > COUNT_MAX)
        {
            return wrong("a number is too large");
        }
        if self.windowed_layers > self.layers || (self.windowed_layers > 0) != (self.window > 0) {
            return wrong("--windowed-layers are some of --layers, and need --window");
        }
        Ok(())
    }

    /// Bytes of a token in one layer, of all ranks.
    fn token_bytes(&self, dtype: KvType) -> u64 {
        let numbers = if self.is_latent() {
            u64::from(self.latent_dim) + u64::from(self.rope_dim)
        } else {
            2 * u64::from(self.kv_heads) * u64::from(self.head_dim)
        };
        numbers * dtype.bytes()
    }

    fn layout(&self, args: &ModelArgs) -> Result<Layout> {
        self.check()?;
        let (tp, pp) = (u64::from(args.tp), args.pp);
        let page = u64::from(args.page_tokens);
        let token = self.token_bytes(args.kv_dtype);
        let layers = u64::from(self.layers);
        let block_bytes = match (self.is_latent(), args.access) {
            (true, access) => {
                let ranks = if args.latent == Latent::Divided {
                    tp
                } else {
                    1
                };
                let layers = match access {
                    Access::Layer => 1,
                    Access::Block => layers.div_ceil(u64::from(pp)),
                };
                token * layers * page / ranks
            }
            (false, Access::Layer) => token / tp * page,
            (false, Access::Block) => token / tp * layers / u64::from(pp) * page,
        };
        let pages = args.isl.div_ceil(args.page_tokens);
        // A vector that is both key and value cannot be split.
        let parts = if args.split_kv && !self.is_latent() {
            2
        } else {
            1
        };
        let layers = (args.access == Access::Layer).then(|| {
            let first_seen = args.isl.saturating_sub(self.window) / args.page_tokens;
            Layers {
                full: (self.layers - self.windowed_layers).div_ceil(pp),
                full_blocks: pages.saturating_mul(parts),
                windowed: self.windowed_layers.div_ceil(pp),
                windowed_blocks: (pages - first_seen).saturating_mul(parts),
            }
        });
        let one_each = u64::from(pages) * u64::from(parts);
        let layout = Layout {
            name: self.name.clone(),
            block_bytes: block_bytes / u64::from(parts),
            blocks: layers.map_or(one_each, Layers::blocks),
            layers,
        };
        if layout.block_bytes == 0 {
            let context = format!(
                "--tp {tp}: nothing of model {:?} is left for a rank",
                self.name
            );
            return Err(Error::new(ErrorKind::Invalid, context));
        }
        Ok(layout)
    }
}

impl ModelArgs {
    fn known(&self) -> Result<Vec<Model>> {
        let bad = |place: String, error| Error::new(ErrorKind::Invalid, place).with_source(error);
        let mut models = Vec::new();
        if let Some(path) = &self.model_file {
            let place = || format!("--model-file {}", path.display());
            let text = std::fs::read_to_string(path).map_err(|error| Error::io(place(), error))?;
            let own: Vec<Model> =
                serde_json::from_str(&text).map_err(|error| bad(place(), error))?;
            models.extend(own);
        }
        let built_in: Vec<Model> = serde_json::from_str(KNOWN)
            .map_err(|error| bad("the known models".to_owned(), error))?;
        models.extend(built_in);
        Ok(models)
    }

    /// The blocks of the model that was asked for; none if none was.
    ///
    /// # Errors
    /// `NotFound` or `Invalid` naming the model or the option.
    pub(super) fn layout(&self) -> Result<Option<Layout>> {
        let Some(name) = &self.model else {
            return Ok(None);
        };
        let mut model = if name == "custom" {
            Model {
                name: name.clone(),
                ..Model::default()
            }
        } else {
            let models = self.known()?;
            let found = models.into_iter().find(|model| model.name == *name);
            found.ok_or_else(|| {
                let context =
                    format!("--model {name}: not known; `kv-bench transfer models` lists them");
                Error::new(ErrorKind::NotFound, context)
            })?
        };
        let custom = &self.custom;
        for (field, value) in [
            (&mut model.layers, custom.layers),
            (&mut model.kv_heads, custom.kv_heads),
            (&mut model.head_dim, custom.head_dim),
            (&mut model.latent_dim, custom.latent_dim),
            (&mut model.rope_dim, custom.rope_dim),
            (&mut model.windowed_layers, custom.windowed_layers),
            (&mut model.window, custom.window),
        ] {
            *field = value.unwrap_or(*field);
        }
        model.layout(self).map(Some)
    }
}

/// What is shown of models.
#[derive(Args, Clone, Debug)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    model: ModelArgs,
}

/// Prints the known models, or the one that was named, with the sizes that the other options give them.
///
/// # Errors
/// `Invalid` or `NotFound` naming the option.
pub(crate) fn list(args: &ListArgs) -> Result<()> {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header([
        "model",
        "bytes of a block",
        "blocks",
        "requests",
        "bytes of the prompt",
    ]);
    let layouts = match args.model.layout()? {
        Some(layout) => vec![layout],
        None => {
            let models = args.model.known()?;
            let layouts = models.iter().map(|model| model.layout(&args.model));
            layouts.collect::<Result<_>>()?
        }
    };
    for layout in layouts {
        let requests = layout.layers.map_or_else(
            || "batches of --blocks".to_owned(),
            |layers| format!("{} layers", layers.full + layers.windowed),
        );
        table.add_row([
            layout.name.clone(),
            layout.block_bytes.to_string(),
            layout.blocks.to_string(),
            requests,
            (layout.blocks * layout.block_bytes).to_string(),
        ]);
    }
    print(&table);
    Ok(())
}

#[expect(clippy::print_stdout, reason = "it is what was asked for")]
fn print(table: &Table) {
    println!("{table}");
}

#[cfg(test)]
mod tests;
