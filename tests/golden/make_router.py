"""Writes router.json: the load-balancing loss that Hugging Face transformers computes for the golden mixtures of experts.

    python tests/golden/make_router.py

Needs torch and transformers (made with torch 2.13, transformers 5.23, CPU, float32). For each checkpoint: the loss of its two
texts, and that of the same texts with the second one padded on the right from `SHORT` tokens on.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
MODELS, SHORT = ("mixtral", "olmoe", "qwen3_moe"), 15


def losses(name: str) -> dict[str, float]:
    folder = HERE / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = load_file(folder / "logits.safetensors")["input_ids"].long()
    mask = torch.ones_like(tokens)
    mask[1, SHORT:] = 0
    with torch.no_grad():
        found = {
            case: model(tokens, attention_mask=seen, output_router_logits=True).aux_loss.item()
            for case, seen in (("whole", torch.ones_like(tokens)), ("padded", mask))
        }
    return found


if __name__ == "__main__":
    stored = {"short": SHORT, "losses": {name: losses(name) for name in MODELS}}
    (HERE / "router.json").write_text(json.dumps(stored, indent=2) + "\n")
    print(json.dumps(stored, indent=2))
