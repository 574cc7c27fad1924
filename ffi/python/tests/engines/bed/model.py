"""Small models with random weights: enough for an engine to be real, too small to be slow."""

import dataclasses
import json
import os
import pathlib
import shutil
import uuid
from typing import Callable, Dict

HEAD_DIM = 32
# Elements of a latent, and of its part for the position: the CPU's kernels have these only.
LATENT, LATENT_POSITION = 512, 64
VOCABULARY = 512
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
# The first token that is neither special nor past the vocabulary, and how many there are.
FIRST_TOKEN, TOKENS = 3, 500


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a model looks like. Two shapes that differ in anything are two folders."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    positions: int = 2048
    dtype: str = "bfloat16"
    # Other weights of the same shape.
    seed: int = 0
    # Two layers of three look back on so many tokens only; 0: all look back on everything.
    window: int = 0
    # Attention over a latent of each token instead of keys and values of heads, as DeepSeek's.
    latent: bool = False

    @property
    def name(self) -> str:
        plain = (
            f"llama-{self.layers}x{self.hidden}-{self.heads}-{self.kv_heads}"
            f"-{self.positions}-{self.dtype}-{self.seed}"
        )
        if self.latent:
            plain = plain.replace("llama", "deepseek", 1)
        return f"{plain}-w{self.window}" if self.window else plain

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of this many tokens, all layers."""
        element = 4 if self.dtype == "float32" else 2
        if self.latent:
            return self.layers * (LATENT + LATENT_POSITION) * element * tokens
        return self.layers * 2 * self.kv_heads * HEAD_DIM * element * tokens


TINY = Shape()
# Two layers of full attention and three of windows: three cache groups, one with a layer less.
HYBRID = Shape(layers=5, window=64)
DEEPSEEK = Shape(latent=True)


def model(models: pathlib.Path, shape: Shape = TINY) -> pathlib.Path:
    """A model folder of this shape, made when it is not there yet."""
    return _made_once(models / shape.name, lambda folder: _write_model(folder, shape))


def adapter(models: pathlib.Path, shape: Shape = TINY, seed: int = 1) -> pathlib.Path:
    """A LoRA adapter for models of this shape, made when it is not there yet."""
    name = f"lora-{shape.name}-{seed}"
    return _made_once(models / name, lambda folder: _write_adapter(folder, shape, seed))


def _made_once(folder: pathlib.Path, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    if folder.exists():
        return folder
    unfinished = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        write(unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:
            # Another process was first: its folder has the same files.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write_json(path: pathlib.Path, content: Dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_model(folder: pathlib.Path, shape: Shape) -> None:
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, shape.dtype)
    random = torch.Generator().manual_seed(shape.seed)

    def matrix(rows: int, columns: int, scale: float = 0.1) -> "torch.Tensor":
        return (torch.randn(rows, columns, generator=random) * scale).to(dtype)

    hidden, inner = shape.hidden, 2 * shape.hidden
    query, keys = shape.heads * HEAD_DIM, shape.kv_heads * HEAD_DIM
    # Embeddings weigh enough that tokens matter, or every prompt would get the same answer.
    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, hidden, 1.0),
        "model.norm.weight": torch.ones(hidden, dtype=dtype),
        "lm_head.weight": matrix(VOCABULARY, hidden),
    }
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        weights[f"{at}.input_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
        weights[f"{at}.post_attention_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
        attention = [
            ("self_attn.q_proj", query, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, query),
        ]
        if shape.latent:
            attention = [
                ("self_attn.q_proj", shape.heads * (HEAD_DIM + LATENT_POSITION), hidden),
                ("self_attn.kv_a_proj_with_mqa", LATENT + LATENT_POSITION, hidden),
                ("self_attn.kv_b_proj", 2 * query, LATENT),
                ("self_attn.o_proj", hidden, query),
            ]
            weights[f"{at}.self_attn.kv_a_layernorm.weight"] = torch.ones(LATENT, dtype=dtype)
        for name, rows, columns in (
            *attention,
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            weights[f"{at}.{name}.weight"] = matrix(rows, columns)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(shape))
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    _write_tokenizer(folder, shape)


def _config(shape: Shape) -> Dict[str, object]:
    config: Dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": shape.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": shape.dtype,
    }
    if shape.latent:
        config.update(
            architectures=["DeepseekV2ForCausalLM"],
            model_type="deepseek_v2",
            num_key_value_heads=shape.heads,
            q_lora_rank=None,
            kv_lora_rank=LATENT,
            qk_nope_head_dim=HEAD_DIM,
            qk_rope_head_dim=LATENT_POSITION,
            v_head_dim=HEAD_DIM,
            # No layer has experts.
            first_k_dense_replace=shape.layers,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=shape.hidden,
            moe_layer_freq=1,
        )
        del config["head_dim"]
    if shape.window:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        config["sliding_window"] = shape.window
        config["layer_types"] = [kinds[layer % 3] for layer in range(shape.layers)]
    return config


def _write_tokenizer(folder: pathlib.Path, shape: Shape) -> None:
    """One token per byte, and words nobody writes up to the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [UNKNOWN, BEGIN, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<word{number}>" for number in range(len(words), VOCABULARY)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([UNKNOWN, BEGIN, END])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": UNKNOWN,
            "bos_token": BEGIN,
            "eos_token": END,
            "model_max_length": shape.positions,
        },
    )


def _write_adapter(folder: pathlib.Path, shape: Shape, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    rank = 8
    random = torch.Generator().manual_seed(seed)
    outputs = {"q_proj": shape.heads * HEAD_DIM, "v_proj": shape.kv_heads * HEAD_DIM}
    weights = {}
    for layer in range(shape.layers):
        for name, rows in outputs.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(rank, shape.hidden, generator=random) * 0.1
            weights[f"{at}.lora_B.weight"] = torch.randn(rows, rank, generator=random) * 0.1
    save_file(weights, str(folder / "adapter_model.safetensors"))
    _write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted(outputs),
            "bias": "none",
            "lora_dropout": 0.0,
            "base_model_name_or_path": shape.name,
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )


def prompt(seed: int, tokens: int) -> list:
    """A prompt of this many token ids: the same for a seed, and a prefix of its longer ones."""
    state, made = seed, []
    for _ in range(tokens):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        made.append(FIRST_TOKEN + (state >> 33) % TOKENS)
    return made
