"""`dpo-jax refs`: the reference pass. `dpo` and `eval` call the same functions, so they compute missing values themselves."""

from __future__ import annotations

from dpo_jax import loss_table
from dpo_jax.cli import build
from dpo_jax.cli.config import Config
from dpo_jax.cli.reference_pass import check_reference, load_pairs, load_reference, reference_values
from dpo_jax.cli.repeats import check_repeats
from dpo_jax.cli.trainable import trainable_of

SIDES = {"pairs": ("chosen", "rejected"), "rankings": ("best", "worst"), "unpaired": ("completion", "mismatched ones")}


def run(config: Config) -> int:
    with build.open_run(config, "refs") as run_dir:
        tokenizer = build.tokenizer_of(config, model_path=config.dpo_policy(), name="dpo.policy")
        both, vision = load_pairs(config, tokenizer)
        check_repeats(config, *both)
        model = build.policy_model(config, config.dpo_policy(), tokenizer, name="dpo.policy", images=vision is not None)
        check_reference(config, model, tokenizer, vision)
        trainable = trainable_of(config, config.dpo, model, config.dpo_policy())
        partitioner = trainable.partitioner(config)
        build.describe(run_dir, config, *(split.report for split in both))
        if vision is not None:
            vision.compute(config)
        variables, digests = load_reference(config, trainable, partitioner)
        values = reference_values(
            config,
            trainable.reader(variables),
            variables,
            tokenizer,
            both,
            partitioner=partitioner,
            weights=digests["start"],
            vision=vision,
        )
        for name, logps in zip(("train", "test"), values, strict=True):
            what, (one, other) = loss_table.example_word(config.dpo.loss), SIDES[loss_table.rows_of(config.dpo.loss)]
            first, last = logps.mean(axis=0)[[0, -1]]
            print(f"{name}: {len(logps):,} {what}, mean log pi_ref({one}) {first:.2f}, of {other} {last:.2f} nats")
    return 0
