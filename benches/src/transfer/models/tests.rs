//! Sizes of models, beside values that were worked out by hand or come from kvbench's own tests.

use clap::Parser;

use super::*;

#[derive(Parser)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
}

fn layout(options: &str) -> Result<Layout> {
    let words = std::iter::once("test").chain(options.split_whitespace());
    let options = Options::try_parse_from(words).unwrap();
    Ok(options.model.layout()?.unwrap())
}

/// Bytes of a block as kvbench's `test_io_size` (benchmark/kvbench/test/test_kvcache.py) wants them, and its `kvcache`
/// example for DeepSeek R1 (1.12 MB); then values by hand: 2 · 8 · 128 · 2 / 4 · 16 = 16,384.
#[test]
fn blocks_are_as_large_as_kvbench_says() {
    let fp8 = "--kv-dtype fp8 --page-tokens 1";
    for (model, rest, bytes) in [
        (
            "llama-3.1-70b",
            format!("{fp8} --access block --tp 8 --pp 2"),
            10240,
        ),
        (
            "llama-3.1-70b",
            format!("{fp8} --access block --tp 8 --pp 4"),
            5120,
        ),
        (
            "llama-3.1-70b",
            format!("{fp8} --access block --tp 8 --pp 8"),
            2560,
        ),
        (
            "llama-3.1-70b",
            format!("{fp8} --access block --tp 8 --pp 16"),
            1280,
        ),
        (
            "llama-3.1-70b",
            format!("{fp8} --access block --tp 8 --pp 32"),
            640,
        ),
        (
            "llama-3.1-70b",
            format!("{fp8} --access layer --tp 8 --pp 2"),
            256,
        ),
        (
            "llama-3.1-70b",
            format!("{fp8} --access layer --tp 8 --pp 32"),
            256,
        ),
        (
            "deepseek-r1",
            "--kv-dtype fp8 --access block --pp 8 --page-tokens 256".to_owned(),
            1_179_648,
        ),
        ("llama-3.1-70b", "--tp 4".to_owned(), 16384),
        ("deepseek-r1", "--tp 4".to_owned(), 576 * 2 * 16 / 4),
        (
            "deepseek-r1",
            "--tp 4 --latent replicated".to_owned(),
            576 * 2 * 16,
        ),
        ("gpt-oss-120b", "--tp 2".to_owned(), 2 * 8 * 64 * 2 * 16 / 2),
    ] {
        let layout = layout(&format!("--model {model} {rest}")).unwrap();
        assert_eq!(layout.block_bytes, bytes, "{model} {rest}");
    }
}

/// Llama 3.1 70B, four ranks, 8,192 tokens: 512 pages in each of 80 layers, 320 KiB a token over all ranks.
#[test]
fn a_prompt_is_all_pages_of_all_layers() {
    let whole = layout("--model llama-3.1-70b --tp 4 --isl 8192").unwrap();
    assert_eq!(whole.blocks, 80 * 512);
    assert_eq!(whole.blocks * whole.block_bytes, 8192 * 327_680 / 4);
    let split = layout("--model llama-3.1-70b --tp 4 --isl 8192 --split-kv").unwrap();
    assert_eq!(split.blocks, 2 * whole.blocks);
    assert_eq!(split.block_bytes, whole.block_bytes / 2);
    let stage = layout("--model llama-3.1-70b --isl 100 --pp 2").unwrap();
    assert_eq!(stage.blocks, 40 * 7);
    let blocks = layout("--model llama-3.1-70b --isl 100 --access block").unwrap();
    assert_eq!((blocks.blocks, blocks.layers), (7, None));
}

/// gpt-oss-20b: half of the layers see the last 128 tokens only, which lie in 8 pages, or in 9 when the prompt ends
/// inside a page.
#[test]
fn layers_with_a_window_have_fewer_pages() {
    for (isl, full_blocks, windowed_blocks) in [(1024, 64, 8), (1030, 65, 9), (40, 3, 3)] {
        let layers = layout(&format!("--model gpt-oss-20b --isl {isl}"))
            .unwrap()
            .layers;
        let expected = Layers {
            full: 12,
            full_blocks,
            windowed: 12,
            windowed_blocks,
        };
        assert_eq!(layers, Some(expected), "{isl}");
    }
}

/// A model of options alone, one of a file, and a known one with other layers.
#[test]
fn models_can_be_described_and_changed() {
    let custom = layout("--model custom --layers 2 --kv-heads 1 --head-dim 64 --isl 32").unwrap();
    assert_eq!((custom.blocks, custom.block_bytes), (4, 2 * 64 * 2 * 16));
    let shorter = layout("--model llama-3.1-8b --layers 4 --isl 16").unwrap();
    assert_eq!(shorter.blocks, 4);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("own.json");
    std::fs::write(&path, r#"[{"name": "own", "layers": 3, "latent_dim": 8}]"#).unwrap();
    let own = layout(&format!(
        "--model own --model-file {} --isl 16",
        path.display()
    ))
    .unwrap();
    assert_eq!((own.blocks, own.block_bytes), (3, 8 * 2 * 16));
}

/// Models that are unknown, lack something, or leave nothing for a rank: each error names what is wrong.
#[test]
fn models_that_make_no_sense_are_refused_by_name() {
    for (options, named) in [
        ("--model gpt-7", "gpt-7"),
        ("--model custom", "--layers"),
        ("--model custom --layers 3", "--kv-heads"),
        (
            "--model custom --layers 3 --kv-heads 1 --head-dim 8 --latent-dim 8",
            "--latent-dim",
        ),
        (
            "--model gpt-oss-20b --windowed-layers 99",
            "--windowed-layers",
        ),
        (
            "--model custom --layers 1 --kv-heads 1 --head-dim 1 --tp 64",
            "--tp 64",
        ),
    ] {
        let error = layout(options).unwrap_err();
        assert!(error.to_string().contains(named), "{options}: {error}");
    }
}

/// Every known model can be used.
#[test]
fn all_known_models_have_blocks() {
    let models: Vec<Model> = serde_json::from_str(KNOWN).unwrap();
    for model in models {
        assert!(layout(&format!("--model {}", model.name)).unwrap().blocks > 0);
    }
}
