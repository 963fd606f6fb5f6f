"""`dpo-jax plan`: memory and time of training on TPUs or GPUs. Nothing is trained; neither weights nor data are read."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError
from dpo_jax.cli.plan.one import plan
from dpo_jax.cli.plan.report import print_ranking, report
from dpo_jax.cli.plan.search import nearest, scale, sweep
from dpo_jax.runtime.chips import slice_devices, slice_of
from dpo_jax.runtime.rundir import write_json
from dpo_jax.untrusted import Unreadable, read_object

__all__ = ["plan", "report", "run"]


def run(config: Config) -> int:
    jax.config.update("jax_platforms", "cpu")  # constants; the planned devices are never used
    topology = config.plan.topology
    assert topology is not None  # checked with the configuration
    chip, chips = slice_of(topology)
    out = Path(config.plan.json or f"{config.run.dir}/plan/plan.json")
    _refuse_foreign(out)
    _, source = build.model_without_weights(config, platform=chip.platform)
    slice_devices(topology)
    print(
        f"{topology}: {chips} {'chip' if chips == 1 else 'chips'} of {chip.hbm_bytes / 1e9:.0f} GB; model: {source}", flush=True
    )
    if config.run.devices != "mesh" and chips * chip.cores > 1:
        print(f"run.devices is {config.run.devices}; the plan is for mesh, which shards parameters over devices")
    plans = sweep(config, topology) if config.plan.sweep else [plan(config, topology, refs=True)]
    if config.plan.sweep:
        print_ranking(plans)
    else:
        print(report(plans[0], chip), flush=True)
    if not any(one.step.fits for one in plans):
        plans += nearest(config, topology)
    if config.plan.scale:
        plans += scale(config, topology)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"plans": [one.to_json() for one in plans]})
    print(f"figures: {out}")
    refs = plans[0].refs
    if refs is not None and not refs.fits:
        half = config.refs.batch // 2
        fewer = f"; take fewer pairs at a time: --refs.batch {half}" if half else ""
        print(f"the reference pass does not fit: {refs.problem}{fewer}")
    return 0 if config.plan.sweep or (plans[0].step.fits and (refs is None or refs.fits)) else 2


def _refuse_foreign(out: Path) -> None:
    """Raises `ConfigError` for a file that does not hold plans."""
    if not out.is_file():
        return
    with contextlib.suppress(Unreadable):
        if "plans" in read_object(out):
            return
    raise ConfigError(f"plan.json: {out} already exists and holds no plans of dpo-jax: move it away, or name another file")
