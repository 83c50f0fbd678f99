"""Architectures of these years at toy size, and how much of each a null space covers.

``python tests/architectures.py`` prints the table in docs/frameworks.md.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradproj import NullSpace, ProjectedOptimizer

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
GPT2_WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True,
}  # fmt: skip
INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "layer_types": ["indexed_attention"] * 2}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
# name -> (configuration, its settings) of causal language models
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**SMALL, "head_dim": 8}),
    "gpt2": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **GPT2_WITHOUT_DROPOUT}),
    "mixtral": ("MixtralConfig", {**SMALL, **MOE}),
    "qwen2_moe": ("Qwen2MoeConfig", {**SMALL, **SPARSE, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SMALL, **SPARSE, "head_dim": 8, "decoder_sparse_step": 1}),
    "olmoe": ("OlmoeConfig", {**SMALL, **SPARSE}),
    "gpt_oss": ("GptOssConfig", {**SMALL, **MOE, "head_dim": 8}),
    "granitemoe": ("GraniteMoeConfig", {**SMALL, **MOE}),
    "deepseek_v2": ("DeepseekV2Config", {**SMALL, **DEEPSEEK, "num_key_value_heads": 4}),
    "deepseek_v3": ("DeepseekV3Config", {**SMALL, **DEEPSEEK, "num_key_value_heads": 4}),
    "phimoe": ("PhimoeConfig", {**SMALL, **MOE}),
    "llama4": ("Llama4TextConfig", {**SMALL, **MOE, "head_dim": 8, "intermediate_size_mlp": 48}),
    "deepseek_v32": ("DeepseekV32Config", {**SMALL, **DEEPSEEK, **INDEXED, "num_key_value_heads": 4}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**SMALL, **SPARSE, **DELTA, "head_dim": 8,
                                             "shared_expert_intermediate_size": 24}),
    "olmo_hybrid": ("OlmoHybridConfig", {**SMALL, **DELTA}),
    "minimax_m2": ("MiniMaxM2Config", {**SMALL, **MOE, "head_dim": 8}),
    "zaya": ("ZayaConfig", {**SMALL, **SPARSE, "num_experts_per_tok": 1, "head_dim": 8}),
    "lfm3": ("Lfm3Config", {**SMALL, "num_hidden_layers": 3, "head_dim": 8,
                            "layer_types": ["conv", "full_attention", "sliding_attention"]}),
    "gemma3n": ("Gemma3nTextConfig", {**SMALL, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8,
                                      "layer_types": ["sliding_attention", "full_attention"] * 2,
                                      "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}),
    "gemma4": ("Gemma4TextConfig", {**SMALL, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
                                    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}),
    "falcon_h1": ("FalconH1Config", {**SMALL, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
                                     "mamba_d_ssm": 64, "mamba_n_groups": 1}),
    "mamba": ("MambaConfig", {"vocab_size": 64, "hidden_size": 96, "num_hidden_layers": 2, "state_size": 4}),
}  # fmt: skip


class Case(NamedTuple):
    """A model in training mode; batches of seeded inputs; the outputs that the capability is, and the loss."""

    model: nn.Module
    batch: Callable[[int, int], dict[str, Tensor]]  # seed, size
    outputs: Callable[[nn.Module, dict[str, Tensor]], Tensor]


def _tokens(seed: int, size: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (size, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids}


def _pictures(side: int, key: str = "pixel_values"):
    return lambda seed, size: {key: torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(seed))}


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def _both(seed: int, size: int) -> dict[str, Tensor]:
    return {**_tokens(seed, size), "decoder_input_ids": _tokens(seed + 1, size)["input_ids"]}


def _whisper(seed: int, size: int) -> dict[str, Tensor]:
    sound = torch.randn(size, 8, 20, generator=torch.Generator().manual_seed(seed))
    return {"input_features": sound, "decoder_input_ids": _tokens(seed, size)["input_ids"]}


def build(name: str) -> Case:
    """Raises ImportError without transformers."""
    torch.manual_seed(0)
    if name == "nn.TransformerEncoder":
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2)
        rows = lambda seed, size: {"src": torch.randn(size, 6, 32, generator=torch.Generator().manual_seed(seed))}
        return Case(model, rows, lambda model, batch: model(**batch))
    import transformers as tf

    if name in CAUSAL:
        config, settings = CAUSAL[name]
        return Case(tf.AutoModelForCausalLM.from_config(getattr(tf, config)(**settings)), _tokens, _logits)
    if name == "bert":
        return Case(tf.BertForMaskedLM(tf.BertConfig(**ENCODER, initializer_range=0.1)), _tokens, _logits)
    if name == "vit":
        config = tf.ViTConfig(
            **{k: v for k, v in ENCODER.items() if k != "vocab_size"}, image_size=8, patch_size=4, initializer_range=0.3
        )
        return Case(tf.ViTForImageClassification(config), _pictures(8), _logits)
    if name == "t5":
        return Case(tf.T5ForConditionalGeneration(tf.T5Config(**T5)), _both, _logits)
    if name == "switch_transformers":
        config = tf.SwitchTransformersConfig(
            **T5, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, router_jitter_noise=0.0
        )
        return Case(tf.SwitchTransformersForConditionalGeneration(config), _both, _logits)
    if name == "whisper":
        config = tf.WhisperConfig(
            vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=10,
            max_target_positions=16, dropout=0.0, init_std=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )  # fmt: skip
        return Case(tf.WhisperForConditionalGeneration(config), _whisper, _logits)
    if name == "mobilenet_v2":
        config = tf.MobileNetV2Config(image_size=32, depth_multiplier=1.0, num_labels=64, classifier_dropout_prob=0.0)
        case = Case(tf.MobileNetV2ForImageClassification(config), _pictures(32), _logits)
        for module in case.model.modules():  # statistics of one batch, as if trained
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            case.outputs(case.model.train(), case.batch(3, 32))
        return case
    if name == "convnext":
        config = tf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=2, image_size=16)
        return Case(tf.ConvNextForImageClassification(config), _pictures(16), _logits)
    raise ValueError(name)


NAMES = [
    *CAUSAL,
    "bert",
    "t5",
    "switch_transformers",
    "whisper",
    "vit",
    "mobilenet_v2",
    "convnext",
    "nn.TransformerEncoder",
]


class Result(NamedTuple):
    """``covered``: of the weights that train, embeddings and vectors apart. ``moved``: how far the captured outputs
    went, as a part of how far they go without protection. ``learned``: the loss on others, after as a part of
    before."""

    covered: float
    moved: float
    learned: float
    said: list[str]


def measure(name: str, steps: int = 6) -> Result:
    case = build(name)
    lr = 1e-4 if name == "mobilenet_v2" else 3e-3
    model = case.model.eval()  # routers of some draw at random while training
    start = {key: value.clone() for key, value in model.state_dict().items()}
    few = case.batch(1, 1)

    def train(protection: NullSpace | None) -> tuple[float, float]:
        model.load_state_dict(start)
        opt = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        stepping: Any = opt if protection is None else ProjectedOptimizer(opt, protection)
        with torch.no_grad():
            before = case.outputs(model, few)
        losses = []
        for _ in range(steps):
            stepping.zero_grad()
            losses.append(_loss(case, model, case.batch(10, 8)))
            losses[-1].backward()
            stepping.step()
        with torch.no_grad():
            moved = (case.outputs(model, few) - before).abs().max().item()
            return moved, (_loss(case, model, case.batch(10, 8)) / losses[0]).item()

    free, _ = train(None)
    model.load_state_dict(start)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        protection = NullSpace(model, share=0.9)
        with protection.capture():
            case.outputs(model, few).float().square().mean().backward()
        moved, learned = train(protection)
    covered = {id(p) for matrix in protection.matrices for p in matrix.parameters}
    seen = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    counted = [p for p in model.parameters() if p.dim() > 1 and id(p) not in seen]
    part = sum(p.numel() for p in counted if id(p) in covered) / sum(p.numel() for p in counted)
    said = [str(w.message) for w in caught if "NullSpace" in str(w.message)]
    return Result(part, moved / free, learned, said)


def _loss(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    outputs = case.outputs(model, batch).float()
    wanted = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5))
    return (outputs - wanted).square().mean()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| architecture | covered | captured outputs moved | loss on others |\n| --- | ---: | ---: | ---: |")
    for name in sys.argv[1:] or NAMES:
        found = measure(name)
        print(f"| {name} | {found.covered:.1%} | {found.moved:.0e} | {found.learned:.2f} |", *found.said, flush=True)
