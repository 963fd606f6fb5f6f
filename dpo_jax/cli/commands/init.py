"""`dpo-jax init [FILE]`: writes a configuration for your own data, to be filled in."""

from __future__ import annotations

from pathlib import Path

from dpo_jax.cli.config import ConfigError
from dpo_jax.writing import writing

USAGE = """\
usage: dpo-jax init [FILE.yaml]

Writes a configuration for preference data and a model of your own, with comments, to FILE.yaml (default: dpo.yaml), and says
what comes next. An existing file is not overwritten."""

TEMPLATE = """\
# DPO on your own preference pairs. Change what is marked with <--. Every option is explained by: dpo-jax dpo --help

run:
  dir: runs/mine # <-- a folder for each experiment; everything is written there, and continued from there
  devices: single # one device. All of them: pmap (each holds the whole model) or mesh (parameters sharded; see section mesh)
  precision: float32 # bfloat16 on an accelerator
  save_every_minutes: 15

data:
  source: files
  # A folder with train.jsonl and test.jsonl (also .parquet, .jsonl.gz, or a downloaded repository of the Hugging Face Hub). A
  # row has "prompt", "chosen" and "rejected": texts, or lists of chat messages.
  path: data/mine # <--
  train_split: train
  test_split: test
  max_length: 1024 # of prompt and completion together, in tokens
  max_prompt_length: 512

model:
  path: Qwen/Qwen3-0.6B # <-- a Hugging Face folder, or a Hub id
  remat: full # less memory, a third more time; none if the model fits

sft: # first: learn to answer like the chosen completions
  batch: 64
  epochs: 1
  lr: 1.0e-5
  optimizer: adamw
  warmup_steps: 10
  microbatches: 16 # parts the batch is processed in, to save memory; the result is the same

dpo: # then: learn the preferences
  # policy: model # starts from model.path, without sft: for a model that is already fine-tuned
  beta: 0.1 # KL penalty: smaller goes further from the start
  batch: 64
  epochs: 1
  lr: 1.0e-6
  warmup_steps: 10 # more for a long run: the paper has 150
  microbatches: 16
"""


def main(args: list[str], *, prog: str) -> int:
    """Writes the file that `args` names. Raises `ConfigError` if it exists, and for anything but one name."""
    if {"-h", "--help"} & set(args):
        print(USAGE)
        return 0
    if len(args) > 1 or args[:1] and args[0].startswith("-"):
        raise ConfigError(f"{' '.join(args)}: {prog} takes the name of one file\n{USAGE}")
    path = Path(args[0] if args else "dpo.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(path, "x") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise ConfigError(f"{path} already exists and is left as it is; give another name: {prog} FILE.yaml") from None
    print(f"{path} is written. Change what is marked with <--, then:\n")
    for command, what in (
        (f"dpo-jax dpo {path} --check-after=sft", "could it run after sft?"),
        (f"dpo-jax audit {path}", "is the data fit for training?"),
        (f"dpo-jax sft {path}", "the starting policy"),
        (f"dpo-jax dpo {path}", ""),
        (f"dpo-jax eval {path}", "what has changed, on held-out pairs"),
    ):
        print(f"  {command:<60}{what}".rstrip())
    return 0
