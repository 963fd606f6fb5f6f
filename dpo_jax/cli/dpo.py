"""`dpo-jax dpo`: train the policy on preferences, against the cached log-probabilities of where it started."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dpo_jax.cli import build, identity
from dpo_jax.cli.card import dpo_card
from dpo_jax.cli.config import BASELINES, Config, DpoConfig
from dpo_jax.cli.export import write_model, writer
from dpo_jax.cli.refs import check_reference, load_reference, reference_values
from dpo_jax.cli.repeats import check_repeats
from dpo_jax.cli.train import earlier_run, leave_results, train
from dpo_jax.cli.trained import trained
from dpo_jax.data.loader import few_shapes, in_order, skippable, stream, total_steps
from dpo_jax.data.prepare import data_digest
from dpo_jax.dpo import dpo_step
from dpo_jax.evals.preference import held_out_logps, preference_summary
from dpo_jax.reference import reference_logps
from dpo_jax.types import TrainState


class WrongStart(RuntimeError):
    """The policy is not its reference at step 0."""


def run(config: Config) -> int:
    section = config.dpo
    with build.open_run(config, "dpo", continues=True) as run_dir:
        earlier = earlier_run(config, "dpo", section)
        tokenizer = build.tokenizer_of(config, model_path=config.dpo_policy(), name="dpo.policy")
        model = build.policy_model(config, config.dpo_policy(), tokenizer, name="dpo.policy")
        check_reference(config, model, tokenizer)
        part = trained(config, section, model, config.dpo_policy())
        partitioner = part.partitioner(config)
        pairs, held_out = (
            build.encode_split(config, build.load_split(config, split, tokenizer), tokenizer) for split in ("train", "test")
        )
        check_repeats(config, pairs, held_out)
        parts = build.batch_parts(section, partitioner.row_shards, layout=config.data.layout)
        plan = functools.partial(build.pair_layout, config, [*pairs, *held_out], batch=section.batch)
        layout = few_shapes(
            plan(parts=parts, microbatches=skippable(section.microbatches, partitioner.row_shards)),
            examples=len(pairs),
            batch=section.batch,
        )
        forward_layout = few_shapes(plan(parts=partitioner.row_shards), examples=len(held_out), batch=section.batch)
        data = identity.data_record(config, tokenizer, [pairs.report, held_out.report], held_out=data_digest(held_out))
        behind = identity.behind(earlier, examples=len(pairs), batch=section.batch)
        steps = total_steps(len(pairs), batch=section.batch, epochs=section.epochs, behind=behind)
        identity.check_data(earlier, data_digest(pairs), data)  # before the reference pass, which may take hours
        identity.check_length(earlier, steps=steps)
        variables, digests = load_reference(config, part, partitioner)
        reference = digests["start"]
        identity.check_weights(earlier, reference=reference)
        ref_logps, held_out_ref = reference_values(
            config,
            part.reader(variables),
            variables,
            tokenizer,
            [pairs, held_out],
            partitioner=partitioner,
            weights=reference,
        )
        if section.reference:
            build.free(variables)
            variables, digests = part.load(config.dpo_policy(), partitioner, name="dpo.policy")
        loss, tx = build.make_loss(section), build.make_tx(section, steps=steps)
        step = functools.partial(
            dpo_step, model=part.model, tx=tx, loss=loss, microbatches=section.microbatches, axis_name=partitioner.axis_name
        )
        policy_logps = partitioner.compile_map(functools.partial(reference_logps, part.model))

        def evaluate(state: TrainState, done: int) -> Mapping[str, Any]:
            logps = held_out_logps(
                lambda rows: policy_logps(state.variables, rows),
                in_order(held_out, layout=forward_layout, batch=section.batch, part=partitioner.host_part),
                pairs=len(held_out),
            )
            return preference_summary(logps, held_out_ref, loss=loss)

        at_reference = functools.partial(
            starts_at_reference, expected_loss=loss_at_reference(section), tolerance=TOLERANCE[config.run.precision]
        )
        print(f"{len(pairs):,} pairs to train on, {len(held_out):,} held out; rows of {layout.length} tokens", flush=True)
        state = train(
            config,
            run_dir,
            section,
            step=step,
            state=part.begin(partitioner, variables, tx),
            stream=stream(
                pairs,
                layout=layout,
                batch=section.batch,
                seed=config.run.seed,
                epochs=section.epochs,
                behind=behind,
                ref_logps=ref_logps,
                part=partitioner.host_part,
            ),
            total_steps=steps,
            lr=build.make_schedule(section, steps=steps),
            fingerprint={
                **identity.settings(config, section),
                "data": data_digest(pairs),
                **digests,
                "reference": reference,
                "architecture": identity.architecture(model),
                "behind": behind,
            },
            earlier=earlier,
            data=data,
            reports=[pairs.report, held_out.report],
            partitioner=partitioner,
            evaluate=evaluate,
            shapes=max(1, len(layout.row_counts)),
            check=at_reference if digests["start"] == reference else None,
        )
        write = writer(part, write_model, source=config.dpo_policy(), dtype=config.export.dtype, digests=digests)
        leave_results(
            run_dir, model, part.written(partitioner, state), tokenizer, card=lambda: dpo_card(config, run_dir), write=write
        )
    return 0


def loss_at_reference(section: DpoConfig) -> float | None:
    """The loss of a policy that is its reference: ln 2 for DPO. None where the loss compares with no reference."""
    if section.reference_free or section.loss in BASELINES:
        return None
    same = np.zeros((1, 2), np.float32)
    losses, _ = jax.jit(build.make_loss(section))(same, same)  # one program, and not one for each operation
    return float(np.asarray(losses)[0])


# How far, in nats, a policy may seem to be from its own cached log-probabilities because rows of another shape are summed in
# another order. In bfloat16 a completion's log-probability moves by some tenths of a nat.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def starts_at_reference(step: int, metrics: Mapping[str, float], *, expected_loss: float | None, tolerance: float) -> None:
    """Raises `WrongStart` unless the policy of step 0 is its reference: displacement 0, and the loss (DPO: ln 2) as expected.

    `expected_loss` is that of equal log-probabilities; None where the loss knows no reference.
    """
    if step != 0:
        return
    displaced = max(abs(metrics["displacement/chosen"]), abs(metrics["displacement/rejected"]))
    off = 0.0 if expected_loss is None else abs(metrics["loss"] - expected_loss) / max(1.0, expected_loss)
    if displaced > tolerance or off > tolerance:
        raise WrongStart(
            f"step 0 has loss {metrics['loss']:.6f}"
            + (f" where a policy equal to its reference has {expected_loss:.6f}" if expected_loss is not None else "")
            + f", and is {displaced:.4f} nats from its reference: the cached log-probabilities belong to other weights or "
            "other code. Delete the reference cache and run `dpo-jax refs` again."
        )
