"""`dpo-jax dpo`: train the policy on preferences, against the cached log-probabilities of the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dpo_jax import loss_table
from dpo_jax.cli import build, identity
from dpo_jax.cli.balancing import router_aux_loss, tell_switches
from dpo_jax.cli.card import dpo_card
from dpo_jax.cli.config import Config, DpoConfig
from dpo_jax.cli.earlier import earlier_run
from dpo_jax.cli.exports import write_model, write_outputs, writer
from dpo_jax.cli.reference_pass import cache_identity, check_reference, load_pairs, load_reference, reference_values
from dpo_jax.cli.repeats import check_repeats
from dpo_jax.cli.train import train
from dpo_jax.cli.trainable import trainable_of
from dpo_jax.cli.training_plan import TrainingData, TrainingPlan, plan_training
from dpo_jax.cli.training_samples import sampler_of
from dpo_jax.data.loader import eval_batches
from dpo_jax.dpo import dpo_step
from dpo_jax.evals.preference import held_out_logps, summary_by_source
from dpo_jax.logps import completion_logps
from dpo_jax.losses import whole_set_signals
from dpo_jax.runtime.rundir import RunDir
from dpo_jax.training.fingerprint import check_weights
from dpo_jax.training.refresh import RefreshedReference
from dpo_jax.training.run import steps_of
from dpo_jax.training.start_check import TOLERANCE, starts_at_reference
from dpo_jax.types import Array, Partitioner, Rows, TrainState, Variables


def run(config: Config) -> int:
    section = config.dpo
    with build.open_run(config, "dpo") as run_dir:
        loss = build.make_loss(section)
        saved = earlier_run(config, "dpo", section)
        tokenizer = build.tokenizer_of(config, model_path=config.dpo_policy(), name="dpo.policy")
        (pairs, held_out), vision = load_pairs(config, tokenizer)
        check_repeats(config, pairs, held_out)
        model = build.policy_model(config, config.dpo_policy(), tokenizer, name="dpo.policy", images=vision is not None)
        check_reference(config, model, tokenizer, vision)
        trainable = trainable_of(config, section, model, config.dpo_policy())
        balancing = router_aux_loss(section, model)
        partitioner = trainable.partitioner(config)
        data = TrainingData(pairs, held_out, [pairs.report, held_out.report], vision=vision)
        # A run that does not fit is refused here, before the reference pass, which may take hours.
        plan = plan_training(config, section, data, tokenizer=tokenizer, partitioner=partitioner, saved=saved)
        variables, digests = load_reference(config, trainable, partitioner)
        reference = digests["start"]
        with identity.refusing_mismatch():
            check_weights(saved, reference=reference)
        known = {"partitioner": partitioner, "weights": reference, "vision": vision}
        reader = trainable.reader(variables)
        ref_logps, held_out_ref = reference_values(config, reader, variables, tokenizer, [pairs, held_out], **known)
        if saved is None:
            first = next(iter(eval_batches(pairs, layout=plan.layout, batch=section.batch, part=partitioner.host_part)))
            tell_switches(config, run_dir, model, variables, first.rows, partitioner=partitioner)
        if section.reference:
            build.free(variables)
            variables, digests = trainable.load(config.dpo_policy(), partitioner, name="dpo.policy")
        logps = partitioner.compile_map(functools.partial(completion_logps, trainable.model, ld_alpha=section.ld_alpha))
        sample = sampler_of(config, run_dir, partitioner, trainable.model, tokenizer, held_out)

        def evaluate(state: TrainState, done: int) -> Mapping[str, Any]:
            found = held_out_logps(
                lambda rows: logps(state.variables, rows),
                eval_batches(held_out, layout=plan.held_out_layout, batch=section.batch, part=partitioner.host_part),
                pairs=len(held_out),
            )
            return {**summary_by_source(held_out, found, held_out_ref, loss=loss), **sample(state.variables, done)}

        refresh, start = None, digests["start"]
        if section.refresh_reference_steps is not None:
            named = cache_identity(config, trainable.model, start, tokenizer, vision) | {"start": start}
            refresh = _refresh(config, plan, partitioner, run_dir, values=ref_logps, score=logps, named=named)
        state = train(
            config,
            run_dir,
            section,
            plan,
            step=functools.partial(
                dpo_step, model=trainable.model, loss=loss, ld_alpha=section.ld_alpha, router_aux_loss=balancing
            ),
            trainable=trainable,
            variables=variables,
            weights={**digests, "reference": reference},
            partitioner=partitioner,
            evaluate=evaluate,
            ref_logps=ref_logps if refresh is None else refresh.values,
            check=functools.partial(
                starts_at_reference,
                expected_loss=loss_at_reference(section, completions=len(pairs[0].completions)),
                tolerance=TOLERANCE[config.run.precision],
                first=start == reference,
                every=section.refresh_reference_steps or 0,
            ),
            refresh=refresh,
        )
        write = writer(trainable, write_model, source=config.dpo_policy(), dtype=config.export.dtype, digests=digests)
        final = trainable.written(partitioner, state)
        card = functools.partial(dpo_card, config, run_dir, step=steps_of(state, partitioner))
        write_outputs(run_dir, model, final, tokenizer, card=card, write=write)
    return 0


def _refresh(
    config: Config,
    plan: TrainingPlan,
    partitioner: Partitioner,
    run_dir: RunDir,
    *,
    values: np.ndarray,
    score: Callable[[Variables, Rows], Array],
    named: Mapping[str, Any],
) -> RefreshedReference:
    """The reference that becomes the policy every `dpo.refresh_reference_steps` steps. `values`: those of the first one."""
    section, pairs = config.dpo, plan.data.train
    assert section.refresh_reference_steps is not None
    return RefreshedReference(
        section.refresh_reference_steps,
        pairs=pairs,
        values=values,
        total_steps=plan.steps,
        read_by=functools.partial(plan.read_by, batch=section.batch, seed=config.run.seed),
        score=score,
        folder=run_dir.path / "references",
        layout=build.row_layout(config, pairs, batch=config.refs.batch, parts=partitioner.row_shards),
        batch=config.refs.batch,
        part=partitioner.host_part,
        identity=named,
    )


def loss_at_reference(section: DpoConfig, *, completions: int = 2) -> float | None:
    """The loss of a policy that equals its reference: ln 2 for DPO. None where that depends on the data."""
    if section.desirable_weight != 1 or section.undesirable_weight != 1:
        return None
    if section.reference_free or section.wpo or not all(term.loss.at_reference for term in loss_table.terms(section.loss)):
        return None
    same, loss = np.zeros((1, completions), np.float32), build.make_loss(section)
    signals = whole_set_signals(loss, np.ones_like(same), pairs=1, desirable=np.ones(1, np.float32))
    # jit compiles one program instead of one for each operation.
    losses, _ = jax.jit(loss)(same, same, **signals)
    return float(np.asarray(losses)[0])
