"""Four CPU devices, strict numerics, and compiled things shared by the whole session."""

import os
from pathlib import Path

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):  # a process of a test says how many itself
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer the golden numbers were made with: byte-level BPE, 511 entries, eos = bos = 0, no pad token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(GOLDEN / "tokenizer")
