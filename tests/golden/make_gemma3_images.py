"""Make `tests/golden/gemma3_images/`: a tiny Gemma 3 with images, and the logits of transformers for prompts that show some.

    python tests/golden/make_gemma3_images.py

Needs torch and transformers (made with torch 2.13, transformers 5.23, CPU, float32). Deterministic. Every parameter is random.
The image of the first text stands in the middle, the second text has two, the third none.
"""

from pathlib import Path

import torch
from make_models import GEMMA3_ROPE, LLAMA
from safetensors.torch import save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

FOLDER = Path(__file__).parent / "gemma3_images"
VOCABULARY, LENGTH, IMAGE, TOKENS = 61, 24, 60, 4
PLACES = [[6], [1, 14], []]  # where the images of each text begin
TEXT = LLAMA | {
    "head_dim": 12,
    "hidden_size": 24,
    "query_pre_attn_scalar": 10,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": GEMMA3_ROPE,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_use_head": False,
}


def main() -> None:
    config = Gemma3Config(
        text_config=TEXT,
        vision_config=VISION,
        mm_tokens_per_image=TOKENS,
        image_token_index=IMAGE,
        boi_token_index=58,
        eoi_token_index=59,
        dtype="float32",
    )
    config._attn_implementation = "eager"
    model = Gemma3ForConditionalGeneration(config).eval()
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        spread = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = parameter.data * (parameter.ndim == 1) + spread * torch.randn(parameter.shape, generator=random)
    tokens = torch.randint(58, (len(PLACES), LENGTH), generator=random)
    kinds = torch.zeros_like(tokens)
    for row, places in enumerate(PLACES):
        for place in places:
            tokens[row, place : place + TOKENS] = IMAGE
            kinds[row, place : place + TOKENS] = 1
    pixels = torch.randn((sum(map(len, PLACES)), 3, VISION["image_size"], VISION["image_size"]), generator=random)
    with torch.no_grad():
        logits = model(tokens, pixel_values=pixels, token_type_ids=kinds).logits
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    found = {"input_ids": tokens.to(torch.int32), "pixels": pixels.permute(0, 2, 3, 1).contiguous(), "logits": logits}
    save_file(found, FOLDER / "logits.safetensors")
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    print(f"{size / 1000:6.1f} kB, logits within {logits.abs().max():.2f}, std {logits.std():.2f}")


if __name__ == "__main__":
    main()
