"""Runs one contender in its own process: `python -m dpo_jax.bench.contender FOLDER NAME STEPS STARTED OUT`.

STARTED is the time at which the process was requested (seconds since 1970), OUT the JSON file for its measurements. With
`--trace FOLDER` a contender of ours is profiled; with `--weights FOLDER` a contender that trains writes its final model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from dpo_jax.bench.work import CONTENDERS, MEASUREMENTS, SAMPLERS, peak_memory, read_sampling, read_work
from dpo_jax.writing import write_text


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for argument in ("folder", "name", "steps", "started", "out"):
        parser.add_argument(argument)
    parser.add_argument("--trace")
    parser.add_argument("--weights", type=Path)
    asked = parser.parse_args(args)
    folder, name = asked.folder, asked.name
    if name in SAMPLERS:
        result = importlib.import_module(f"dpo_jax.bench.{SAMPLERS[name].module}").run(read_sampling(folder))
    elif name in CONTENDERS:
        run = importlib.import_module(f"dpo_jax.bench.{CONTENDERS[name].module}").run
        result = run(read_work(folder), name, steps=int(asked.steps), trace=asked.trace, weights=asked.weights)
        # The reference pass is excluded: rounds differ in length, and the pass is reported separately.
        waited = result.pop("first_step_at") - float(asked.started)
        result["seconds_to_first_step"] = waited - sum(result["reference_seconds"] or ())
    else:
        result = importlib.import_module(f"dpo_jax.bench.{MEASUREMENTS[name]}").run(read_work(folder), name)
    result.setdefault("peak_bytes", peak_memory())
    result["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    write_text(asked.out, json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
