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
  devices: single # <-- several devices: mesh (parameters sharded) or pmap (each holds the whole model)
  precision: float32 # <-- on a GPU or TPU: bfloat16
  save_every_minutes: 15

data:
  source: files
  # A folder with train.jsonl and test.jsonl (also .parquet, .jsonl.gz, or a downloaded repository of the Hugging Face Hub). A
  # row has "prompt", "chosen" and "rejected": texts, or lists of chat messages.
  path: data/mine # <--
  train_split: train
  test_split: test
  # test_share: 0.05 # for a single file: holds out this share of the prompts; leave out the two splits then
  # columns: {prompt: instruction, chosen: better, rejected: worse} # if yours have other names
  # format: chat_texts # texts are turns of a chat: for an instruct model
  on_bad: drop # skips rows with an empty text or equal completions and counts them; refuse stops at the first
  max_length: 1024 # of prompt and completion together, in tokens
  max_prompt_length: 512

model:
  path: Qwen/Qwen3-0.6B # <-- a Hugging Face folder, or a Hub id
  remat: full # less memory, a third more time; none if the model fits

# lora: {rank: 16, base_dtype: bfloat16} # trains an adapter; then with a higher dpo.lr: 5.0e-6 to 2.0e-4

sft: # first: learn to answer like the chosen completions
  batch: 64
  epochs: 1
  lr: 1.0e-5
  optimizer: adamw
  warmup_steps: 10
  microbatches: 16 # parts of a batch, one after the other, to save memory; on N devices at most batch / N. Same result

dpo: # then: learn the preferences
  # policy: model # starts from model.path, without sft: for an instruct model
  beta: 0.1 # KL penalty: smaller goes further from the start
  batch: 64
  epochs: 1
  lr: 1.0e-6
  warmup_steps: 10 # more for a long run: the paper has 150
  microbatches: 16

eval:
  samples: 64 # completions to compare with those of the reference
  max_new_tokens: 512
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
        (f"dpo-jax sft {path}", "the starting policy (not with dpo.policy: model)"),
        (f"dpo-jax dpo {path}", ""),
        (f"dpo-jax eval {path}", "what has changed, on held-out pairs"),
    ):
        print(f"  {command:<60}{what}".rstrip())
    return 0
