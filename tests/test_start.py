"""What a command imports and compiles before its first step. Counts, no clocks."""

import json
import os
import subprocess
import sys

from conftest import GOLDEN

PROGRAM = """
import gc, json, sys
from pathlib import Path
from dpo_jax.cli import main

for command in ("sft", "dpo"):
    main._import_without_gc(f"dpo_jax.cli.commands.{command}")
imported = sorted(sys.modules)
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.runtime.compiling import keep_programs
load_tokenizer(sys.argv[1])
import jax
keep_programs(sys.argv[2])
jax.jit(lambda x: 3 * x + 1)(jax.numpy.ones(7)).block_until_ready()
print(json.dumps({"imported": imported, "then": sorted(sys.modules), "collects": gc.isenabled()}))
"""
# Each is needed by somebody, later or elsewhere, and takes a tenth of a second or more.
LATER = {
    *(
        "matplotlib",
        "pandas",
        "array_record",
        "pyarrow",
        "tensorflow",
        "tensorflow_datasets",
        "torch",
        "datasets",
        "sklearn",
        "scipy",
    ),
    *("jax.experimental.pallas.ops", "jax.experimental.pallas.triton", "tyro", "wandb", "tensorboardX"),
    *("dpo_jax.models.attention_gpu", "dpo_jax.models.attention_tpu", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.auto.configuration_auto", "transformers.modeling_utils"),
}


def test_training_imports_what_it_needs_and_keeps_all_programs(tmp_path):
    kept = tmp_path / "named"
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, GOLDEN / "tokenizer", tmp_path / "compiled"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(kept)},
    )
    found = json.loads(told.stdout.splitlines()[-1])
    assert {"jax", "optax", "dpo_jax.cli.train"} <= set(found["imported"])
    assert not LATER & set(found["imported"])
    assert not LATER & set(found["then"])  # nor to load a tokenizer that says what it is
    assert found["collects"]
    assert any("lambda" in file.name for file in kept.iterdir())  # a program of a few milliseconds
    assert not (tmp_path / "compiled").exists()
