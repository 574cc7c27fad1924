use std::num::NonZeroU32;
use std::ops::Range;

use proptest::prelude::*;

use super::reshard::{BlockForm, PageOrder, Reshard};
use super::*;
use crate::error::ErrorKind;
use crate::id::SlotIndex;

fn tokens(count: u32) -> TokensPerBlock {
    TokensPerBlock::try_from(count).unwrap()
}

/// Name, bytes a token in bf16, KiB of a block of 16 tokens in bf16, bytes a token in fp8: published figures.
const TABLE: &[(&str, u64, f64, u64)] = &[
    ("llama-3.1-8b", 131_072, 2048.0, 65_536),
    ("llama-3.1-70b", 327_680, 5120.0, 163_840),
    ("llama-3.3-70b", 327_680, 5120.0, 163_840),
    ("llama-3.1-405b", 516_096, 8064.0, 258_048),
    ("qwen3-0.6b", 114_688, 1792.0, 57_344),
    ("qwen3-1.7b", 114_688, 1792.0, 57_344),
    ("qwen3-4b", 147_456, 2304.0, 73_728),
    ("qwen3-8b", 147_456, 2304.0, 73_728),
    ("qwen3-14b", 163_840, 2560.0, 81_920),
    ("qwen3-32b", 262_144, 4096.0, 131_072),
    ("qwen3-30b-a3b", 98_304, 1536.0, 49_152),
    ("qwen3-235b-a22b", 192_512, 3008.0, 96_256),
    ("qwen3-coder-480b-a35b", 253_952, 3968.0, 126_976),
    ("deepseek-v3", 70_272, 1098.0, 35_136),
    ("deepseek-r1", 70_272, 1098.0, 35_136),
    ("kimi-k2", 70_272, 1098.0, 35_136),
    ("kimi-k2.5", 70_272, 1098.0, 35_136),
    // The index stays in fp8 with its scale: 61 x 132 bytes in both.
    ("deepseek-v3.2", 78_324, 1223.8125, 43_188),
    ("gpt-oss-120b", 73_728, 1152.0, 36_864),
    ("gpt-oss-20b", 49_152, 768.0, 24_576),
    ("glm-4.5", 376_832, 5888.0, 188_416),
    ("glm-4.6", 376_832, 5888.0, 188_416),
    ("glm-4.5-air", 188_416, 2944.0, 94_208),
    ("glm-4.7-flash", 54_144, 846.0, 27_072),
    ("qwen3-next-80b", 24_576, 384.0, 12_288),
    ("qwen3.5-35b", 20_480, 320.0, 10_240),
];

/// Every named model against the published figures; none is named that has none.
#[test]
fn named_models_have_the_published_sizes() {
    let mut names: Vec<_> = TABLE.iter().map(|row| row.0).collect();
    names.sort_unstable();
    assert_eq!(model_names().collect::<Vec<_>>(), names);
    for &(name, bf16, kib, fp8) in TABLE {
        let model = model(name).unwrap();
        assert_eq!(model.name(), name);
        assert_eq!(model.bytes_per_token(), bf16, "{name}");
        assert_eq!(model.block_bytes(tokens(16)) as f64 / 1024.0, kib, "{name}");
        let small = model.with_element(Element::Fp8).unwrap();
        assert_eq!(small.bytes_per_token(), fp8, "{name}");
    }
}

/// DeepSeek's mixed format: 656 bytes a layer and token, 132 more with an index.
#[test]
fn mixed_format_is_for_latents_only() {
    let bytes = |name| {
        let model = model(name).unwrap().with_element(Element::Fp8DsMla)?;
        Ok::<_, Error>(model.bytes_per_token())
    };
    assert_eq!(bytes("deepseek-v3").unwrap(), 40_016);
    assert_eq!(bytes("deepseek-v3.2").unwrap(), 48_068);
    let error = bytes("llama-3.1-8b").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.context().starts_with("llama-3.1-8b: "), "{error}");
}

/// Half of gpt-oss's layers see 128 tokens; Qwen3-Next's recurrent layers do not grow at all.
#[test]
fn windows_and_recurrent_state_do_not_grow() {
    let model_of = |name| model(name).unwrap();
    let mib = |bytes: u64| bytes as f64 / 1024.0 / 1024.0;
    assert_eq!(model_of("gpt-oss-120b").growing_bytes_per_token(), 36_864);
    assert_eq!(mib(model_of("gpt-oss-120b").fixed_bytes()), 4.5);
    assert_eq!(model_of("gpt-oss-20b").growing_bytes_per_token(), 24_576);
    assert_eq!(mib(model_of("gpt-oss-20b").fixed_bytes()), 3.0);
    // 36 MiB of state and 1.7 MiB of convolution; 30 MiB and 1.4 MiB.
    assert_eq!(mib(model_of("qwen3-next-80b").fixed_bytes()), 36.0 + 1.6875);
    assert_eq!(mib(model_of("qwen3.5-35b").fixed_bytes()), 30.0 + 1.40625);
    assert_eq!(model_of("llama-3.1-8b").fixed_bytes(), 0);
    assert_eq!(model_of("gpt-oss-20b").groups().len(), 2);
    assert_eq!(model_of("gpt-oss-20b").layers(), 24);
}

/// A wrong name gets the list of right ones.
#[test]
fn unknown_model_is_answered_with_the_known_names() {
    let error = model("llama-9").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.context().contains("llama-9"), "{error}");
    for name in model_names() {
        assert!(error.context().contains(name), "{error}");
    }
}

/// Heads are divided, then repeated; a latent is never divided. Figures: 70B on four ranks has 1.25 MiB blocks.
#[test]
fn ranks_share_heads_and_repeat_latents() {
    let bytes = |name, size| {
        let tensor = Tensor::new(size - 1, size)?;
        model(name).unwrap().rank_block_bytes(tokens(16), tensor)
    };
    assert_eq!(bytes("llama-3.1-70b", 4).unwrap(), 1280 * 1024);
    assert_eq!(bytes("qwen3-30b-a3b", 4).unwrap(), 384 * 1024);
    assert_eq!(bytes("qwen3-30b-a3b", 16).unwrap(), 384 * 1024);
    assert_eq!(bytes("deepseek-v3", 1).unwrap(), 1098 * 1024);
    assert_eq!(bytes("deepseek-v3", 8).unwrap(), 1098 * 1024);
    assert_eq!(bytes("deepseek-v3.2", 8).unwrap(), 61 * (1152 + 132) * 16);
    let error = bytes("llama-3.1-8b", 3).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.context().contains("8 KV heads") && error.context().contains("3 ranks"));
}

fn refusal<T>(result: Result<T, Error>) -> String {
    let Err(error) = result else {
        panic!("accepted")
    };
    assert_eq!(error.kind(), ErrorKind::Invalid);
    error.context().to_owned()
}

/// Values just outside their ranges: each error names the field, the value and the range.
#[test]
fn numbers_out_of_range_are_refused_by_name() {
    assert_eq!(tokens(TOKENS_PER_BLOCK_MAX).get(), 65_536);
    let refused = refusal(TokensPerBlock::try_from(0));
    assert_eq!(refused, "tokens_per_block is 0, expected 1..=65536");
    assert!(refusal(TokensPerBlock::try_from(65_537)).contains("65537"));
    assert_eq!(
        refusal(Tensor::new(0, 0)),
        "tensor_size is 0, expected 1..=4096"
    );
    assert_eq!(
        refusal(Tensor::new(4, 4)),
        "tensor_rank is 4, expected 0..4"
    );
    assert!(refusal(Element::parse("int3")).contains("int3"));
    assert_eq!(
        Element::parse(Element::Fp8DsMla.name()).unwrap(),
        Element::Fp8DsMla
    );

    let group = |layers, heads, head_elements| LayerGroup {
        layers,
        attention: Attention::Heads {
            heads,
            head_elements,
        },
        reach: Reach::Window(NonZeroU32::MIN),
    };
    let model = |groups: &[LayerGroup]| Model::new("m", groups.to_vec(), Element::Bf16);
    assert!(model(&[group(1, 1, 1)]).is_ok());
    assert_eq!(refusal(model(&[])), "m: layers is 0, expected 1..=4096");
    assert_eq!(
        refusal(model(&[group(1, 1, 1), group(0, 1, 1)])),
        "m: layers is 0, expected 1..=4096"
    );
    let large = [group(4096, 1, 1), group(1, 1, 1)];
    assert_eq!(
        refusal(model(&large)),
        "m: layers is 4097, expected 1..=4096"
    );
    assert_eq!(
        refusal(model(&[group(1, 0, 1)])),
        "m: heads is 0, expected 1..=4096"
    );
    assert_eq!(
        refusal(model(&[group(1, 1, 65_537)])),
        "m: head_elements is 65537, expected 1..=65536"
    );
}

/// Strides too short for their pages, too large for 64 bits; slots and layers that are not there.
#[test]
fn layouts_that_overlap_or_overflow_are_refused() {
    assert!(Layout::new(0, 2, 3, 10, 30, 10).is_ok());
    assert!(refusal(Layout::new(0, 2, 3, 10, 29, 10)).starts_with("layer_stride is 29"));
    assert!(refusal(Layout::new(0, 2, 3, 10, 30, 9)).starts_with("block_stride is 9"));
    assert!(refusal(Layout::new(0, 2, 3, 10, 10, 19)).starts_with("block_stride is 19"));
    assert!(refusal(Layout::new(0, 2, 3, 10, 10, 10)).contains("stride is 10"));
    assert!(refusal(Layout::new(0, 0, 3, 10, 10, 20)).starts_with("layers is 0"));
    assert!(refusal(Layout::new(0, 1, 0, 10, 10, 20)).starts_with("blocks is 0"));
    assert!(refusal(Layout::new(0, 1, 1, 0, 10, 20)).starts_with("page_bytes is 0"));
    assert!(refusal(Layout::new(u64::MAX - 10, 1, 1, 11, 0, 0)).contains("64 bits"));
    assert!(refusal(Layout::new(0, 2, 2, 8, 8, u64::MAX - 8)).contains("64 bits"));
    assert!(refusal(Layout::layer_major(2, 2, u64::MAX)).starts_with("page_bytes"));
    assert!(refusal(Layout::block_major(2, 2, u64::MAX)).starts_with("page_bytes"));
    // A direction with one step has no stride to get wrong.
    assert_eq!(Layout::new(5, 1, 1, 10, 0, 0).unwrap().end(), 15);

    let layout = Layout::block_major(4, 2, 8).unwrap();
    assert_eq!(
        refusal(layout.extents(SlotIndex(2), 0..4)),
        "slot is 2, expected 0..2"
    );
    assert_eq!(
        refusal(layout.extents(SlotIndex(0), 3..5)),
        "layers is 3..5, expected 0..=4"
    );
    let backwards = Range { start: 2, end: 1 };
    assert!(refusal(layout.extents(SlotIndex(0), backwards)).starts_with("layers is 2..1"));
}

/// vLLM 0.32 on a CPU: two layers of 64 blocks, 8,192 bytes a page; then the same turned round.
#[test]
fn extents_are_pages_or_whole_blocks() {
    let layers_first = Layout::layer_major(2, 64, 8192).unwrap();
    assert_eq!(
        layers_first,
        Layout::new(0, 2, 64, 8192, 524_288, 8192).unwrap()
    );
    let extents = layers_first.extents(SlotIndex(3), 0..2).unwrap();
    let page = |offset| Extent { offset, len: 8192 };
    assert_eq!(extents, [page(24_576), page(548_864)]);
    assert_eq!(
        layers_first.extents(SlotIndex(3), 1..2).unwrap(),
        [page(548_864)]
    );

    let blocks_first = Layout::block_major(2, 64, 8192).unwrap();
    let extents = blocks_first.extents(SlotIndex(3), 0..2).unwrap();
    assert_eq!(
        extents,
        [Extent {
            offset: 49_152,
            len: 16_384
        }]
    );
    assert!(blocks_first.extents(SlotIndex(3), 1..1).unwrap().is_empty());
    assert_eq!(blocks_first.end(), 1 << 20);
    assert_eq!(blocks_first.block_bytes(), 16_384);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Every byte of a region is painted by at most one block and layer; padding by none; neighbours are merged.
    #[test]
    fn pages_never_overlap(
        base in 0u64..20,
        layers in 1u32..5,
        blocks in 1u32..5,
        page in 1u64..9,
        gaps in (0u64..4, 0u64..4),
        layers_first in any::<bool>(),
    ) {
        let inner = page + gaps.0;
        let (layer_stride, block_stride) = if layers_first {
            (inner * u64::from(blocks) + gaps.1, inner)
        } else {
            (inner, inner * u64::from(layers) + gaps.1)
        };
        let layout = Layout::new(base, layers, blocks, page, layer_stride, block_stride).unwrap();
        let mut owners = vec![None; layout.end() as usize];
        for slot in 0..blocks {
            let extents = layout.extents(SlotIndex(slot), 0..layers).unwrap();
            for pair in extents.windows(2) {
                prop_assert_ne!(pair[0].offset + pair[0].len, pair[1].offset);
            }
            for extent in extents {
                for byte in extent.offset..extent.offset + extent.len {
                    prop_assert_eq!(owners[byte as usize].replace(slot), None);
                }
            }
        }
        let painted = owners.iter().flatten().count() as u64;
        prop_assert_eq!(painted, u64::from(blocks) * layout.block_bytes());
        prop_assert!(owners.last().unwrap().is_some());
    }

    /// Any strides at all: either refused, or no page overlaps another (checked page against page).
    #[test]
    fn accepted_strides_keep_pages_apart(
        layers in 1u32..4,
        blocks in 1u32..4,
        page in 1u64..6,
        layer_stride in 0u64..24,
        block_stride in 0u64..24,
    ) {
        let starts = (0..u64::from(layers)).flat_map(|layer| {
            (0..u64::from(blocks)).map(move |block| layer * layer_stride + block * block_stride)
        });
        let mut starts: Vec<_> = starts.collect();
        starts.sort_unstable();
        let apart = starts.windows(2).all(|pair| pair[0] + page <= pair[1]);
        let layout = Layout::new(0, layers, blocks, page, layer_stride, block_stride);
        if layout.is_ok() {
            prop_assert!(apart);
        } else if apart {
            // Interleaved directions, in which neither run lies outside the other, are the only other way to be apart.
            let runs = [
                u64::from(blocks - 1) * block_stride + page,
                u64::from(layers - 1) * layer_stride + page,
            ];
            prop_assert!(layer_stride < runs[0] && block_stride < runs[1]);
        }
    }

    /// Each byte of a whole block is labelled with layer, token, head and place; after the pieces are copied, every
    /// target rank's block must be what that rank would have computed itself, each byte written exactly once.
    #[test]
    fn every_byte_is_mapped_exactly_once(
        layers in 1u32..4,
        token_count in 1u32..5,
        heads_log in 0u32..4,
        head_bytes in 1u32..4,
        sizes_log in (0u32..5, 0u32..5),
        tokens_first in any::<bool>(),
    ) {
        let order = if tokens_first { PageOrder::TokensFirst } else { PageOrder::HeadsFirst };
        let form = BlockForm {
            layers, tokens: tokens(token_count), heads: 1 << heads_log, head_bytes, order,
        };
        let (source_size, target_size) = (1 << sizes_log.0, 1 << sizes_log.1);
        let reshard = Reshard::new(form, source_size, target_size).unwrap();
        let sources: Vec<_> = (0..source_size).map(|rank| labels(&form, rank, source_size)).collect();
        for rank in 0..target_size {
            let expected = labels(&form, rank, target_size);
            prop_assert_eq!(expected.len() as u64, reshard.target_bytes());
            let mut written = vec![None; expected.len()];
            let pieces = reshard.pieces(rank).unwrap();
            let mut end = 0;
            for piece in &pieces {
                prop_assert_eq!(piece.target_offset, end, "pieces follow each other");
                end += piece.len;
                let source = &sources[piece.source_rank as usize];
                prop_assert_eq!(source.len() as u64, reshard.source_bytes());
                for i in 0..piece.len {
                    let label = source[(piece.source_offset + i) as usize];
                    let place = &mut written[(piece.target_offset + i) as usize];
                    prop_assert_eq!(place.replace(label), None);
                }
            }
            prop_assert_eq!(written, expected.into_iter().map(Some).collect::<Vec<_>>());
            if source_size == target_size {
                prop_assert_eq!(pieces.len(), 1, "the same sharding is one copy");
            }
        }
    }
}

/// Which layer, token, head and byte of a head lies where in a rank's block, written out the slow way.
fn labels(form: &BlockForm, rank: u32, size: u32) -> Vec<(u32, u32, u32, u32)> {
    let heads = Tensor::new(rank, size).unwrap().heads(form.heads).unwrap();
    let mut labels = Vec::new();
    for layer in 0..form.layers {
        let mut page = Vec::new();
        for head in heads.clone() {
            for token in 0..form.tokens.get() {
                page.extend((0..form.head_bytes).map(|byte| (layer, token, head, byte)));
            }
        }
        if form.order == PageOrder::TokensFirst {
            page.sort_by_key(|(_, token, head, byte)| (*token, *head, *byte));
        }
        labels.extend(page);
    }
    labels
}

/// Eight ranks of a latent model to two: each target takes the whole block from one source, and not all from one.
#[test]
fn latents_are_copied_whole_from_different_sources() {
    let attention = model("deepseek-v3").unwrap().groups()[0].attention;
    let order = PageOrder::HeadsFirst;
    let form = BlockForm::new(61, tokens(16), attention, Element::Bf16, order).unwrap();
    let reshard = Reshard::new(form, 8, 2).unwrap();
    for rank in 0..2 {
        let pieces = reshard.pieces(rank).unwrap();
        let (source_offset, target_offset, len) = (0, 0, 1098 * 1024);
        let whole = reshard::Piece {
            source_rank: rank,
            source_offset,
            target_offset,
            len,
        };
        assert_eq!(pieces, [whole]);
    }
    assert!(refusal(reshard.pieces(2)).contains("tensor_rank is 2"));
    let form = BlockForm { heads: 6, ..form };
    assert!(refusal(Reshard::new(form, 4, 2)).starts_with("source: 6 KV heads"));
    assert!(refusal(Reshard::new(form, 2, 4)).starts_with("target: 6 KV heads"));
    assert!(refusal(Reshard::new(BlockForm { layers: 0, ..form }, 1, 1)).contains("layers is 0"));
}
