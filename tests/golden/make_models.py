"""Make `tests/golden/models/`: one tiny checkpoint per family with the logits that Hugging Face transformers computes for it.

    python tests/golden/make_models.py [FAMILY ...]

Needs torch and transformers (made with torch 2.13, transformers 5.23, CPU, float32). Deterministic. Every parameter is random,
biases and norms too, so that one that is skipped or swapped changes the logits. Windows are shorter than the text, and every
setting of a family that the decoder reads is used.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent / "models"
VOCABULARY, ROWS, LENGTH = 61, 2, 24

GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
}
LLAMA = SIZES | {"num_key_value_heads": 2}
NEOX = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 3.0],
    "long_factor": [2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict]] = {
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox_sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False, "attention_bias": False}),
    "llama": ("llama", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
    "llama_biased": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", LLAMA | {"sliding_window": 7, "head_dim": 12}),
    "qwen2": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        LLAMA
        | {"head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 10}
        | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    ),
    "gemma3_text": (
        "gemma3_text",
        LLAMA
        | {"num_hidden_layers": 6, "hidden_size": 24, "head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 10}
        | {"rope_parameters": GEMMA3_ROPE},
    ),
    "smollm3": (
        "smollm3",
        LLAMA
        | {"num_hidden_layers": 4, "no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 7}
        | {"rope_parameters": YARN},
    ),
    "phi3": (
        "phi3",
        LLAMA
        | {"sliding_window": 7, "original_max_position_embeddings": 32, "tie_word_embeddings": True}
        | {"rope_parameters": LONGROPE},
    ),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 5, "sliding_window": 7, "intermediate_size": 24}),
    "olmoe": ("olmoe", LLAMA | {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24}),
    "qwen3_moe": (
        "qwen3_moe",
        LLAMA
        | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        | {"head_dim": 12, "tie_word_embeddings": True},
    ),
    "olmo2": ("olmo2", LLAMA | {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
}


def make(case: str) -> None:
    family, settings = CASES[case]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, dtype="float32", **ids, **settings)
    # eager: sdpa knows no softcap, and the masks are the reference here.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data = parameter.data * (parameter.ndim == 1) + spread * torch.randn(parameter.shape, generator=random)
    # A text in which every token matters: logits of order one, attention far from uniform.
    model.get_output_embeddings().weight.data *= 0.5
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=random)
    with torch.no_grad():
        logits = model(tokens).logits
    folder = HERE / case
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"input_ids": tokens.to(torch.int32), "logits": logits}, folder / "logits.safetensors")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{case:20} {size / 1000:6.1f} kB, logits within {logits.abs().max():.2f}, std {logits.std():.2f}")


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        make(name)
