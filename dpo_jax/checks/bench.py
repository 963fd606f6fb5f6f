"""The benchmark of `--bench`: full DPO and SFT steps of Pythia-2.8B with every attention path, and a trace of the fastest.

It reports time, pairs per second, model FLOPs utilization (`models.flops`: only necessary operations) and memory. Weights are
random and made on the devices. On a CPU, and where 2.8B parameters do not fit, a smaller shape is used and named.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.bench.flops import device_peak, step_flops
from dpo_jax.bench.profile import slowest_operations
from dpo_jax.bench.work import spread_lengths
from dpo_jax.checks.attention import random_pair
from dpo_jax.checks.machine import matmul_rate
from dpo_jax.checks.report import Result, Row, first_line, skipped
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import completion_rows
from dpo_jax.data.loader import plan_layout
from dpo_jax.dpo import dpo_step
from dpo_jax.losses import dpo_loss
from dpo_jax.models.attention_paths import PATHS, path_name
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.decoder import REMAT, make_model
from dpo_jax.models.families import decoder_config, hf_config
from dpo_jax.models.flops import pair_flops
from dpo_jax.runtime.mesh import make_mesh, row_sharding
from dpo_jax.runtime.optim import linear_warmup, make_optimizer
from dpo_jax.runtime.out_of_memory import is_out_of_memory
from dpo_jax.runtime.parallel import jit_step, mesh_partitioner, single_device
from dpo_jax.sft import sft_step
from dpo_jax.step import init_state
from dpo_jax.types import Rows, TrainState
from dpo_jax.writing import write_text

SHAPES = {  # width, layers, heads, vocabulary: the largest that fits is used
    "Pythia-2.8B": (2560, 32, 32, 50304),
    "Pythia-1B": (2048, 16, 8, 50304),
    "Pythia-410M": (1024, 24, 16, 50304),
    "Pythia-160M": (768, 12, 12, 50304),
}
TINY = "a tiny shape; its figures mean nothing"
BYTES = 14.0  # device bytes per parameter: weights, moments and gradients in float32, and some for activations
REMATS = tuple(REMAT)  # from the fastest, which takes the most memory
MEANS = (105, 45, 50)  # tokens of prompt, chosen and rejected: like Anthropic HH
TX = make_optimizer(linear_warmup(1e-6, warmup_steps=150), max_grad_norm=10.0)
STEPS, SECONDS = 6, 6.0  # most timed steps per setting, and their approximate duration


class Setting(NamedTuple):
    kind: str  # "dpo" or "sft"
    length: int  # of rows
    attention: str
    remat: str | None = None  # None: the first that fits

    @property
    def name(self) -> str:
        return ".".join(filter(None, (f"bench.{self.kind}{self.length}", self.attention, self.remat)))


class Timed(NamedTuple):
    """A compiled and timed step, kept so that it can be traced."""

    seconds: float
    setting: Setting
    compiled: Any
    rows: Rows


def rows(*, seconds: float, profile: Path | None, everything: bool) -> Iterator[Row]:
    """The default attention path comes first; the others follow only with `everything`."""
    bench = _Bench(seconds)
    failure = "this step does not run here, though the rows above passed: do not train with this setting, and report it"
    for setting in settings() if everything else settings()[:1]:
        yield Row(setting.name, failure, functools.partial(bench.measure, setting))
    if profile is not None:
        yield Row("bench.profile", "no trace could be made: run without --profile", functools.partial(bench.trace, profile))


def settings() -> list[Setting]:
    """All settings, the most informative first."""
    platform = jax.default_backend()
    dpo, *sft = (256, 128, 256) if platform == "cpu" else (1024, 2048, 4096)
    automatic = path_name("auto", platform)
    others = [name for name, path in PATHS.items() if path.platform in (None, platform) and name != automatic]
    # Kernels first. Dense last, because it runs out of memory, and compiling three times for that takes long.
    others.sort(key=lambda name: (name == "dense", PATHS[name].platform is None))
    first, *remats = (Setting("dpo", dpo, automatic, remat) for remat in REMATS)
    return [
        first,
        *(Setting("dpo", dpo, name) for name in others),
        *(Setting("sft", length, automatic) for length in sft),
        *remats,
        *(Setting("sft", length, name) for length in sft for name in others),
    ]


def model_shape() -> tuple[str, DecoderConfig]:
    """The largest of `SHAPES` whose training fits on the local devices together."""
    if jax.default_backend() == "cpu":
        return TINY, _pythia(128, 2, 2, 512)
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    memory = sum(limit or float("inf") for limit in limits)
    shapes = {name: _pythia(*sizes) for name, sizes in SHAPES.items()}
    return next(((name, c) for name, c in shapes.items() if BYTES * _parameters(c) < memory), [*shapes.items()][-1])


def _pythia(width: int, layers: int, heads: int, vocab_size: int) -> DecoderConfig:
    sizes: dict[str, Any] = {"width": width, "layers": layers, "heads": heads, "vocab_size": vocab_size, "max_positions": 4096}
    return decoder_config(hf_config("gpt_neox", eos_token_id=0, **sizes))


def _parameters(config: DecoderConfig) -> int:
    shapes = jax.eval_shape(make_model(config).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def hh_like_pairs(count: int, *, vocab_size: int, longest: int) -> list[Encoded]:
    """Pairs of random tokens, with lengths gamma distributed around `MEANS`, that fit into a row of `longest` tokens."""
    rng = np.random.RandomState(0)
    lengths = spread_lengths(rng, count, means=MEANS, most=3 * (longest // 4,))
    return [random_pair(rng, sizes, vocab_size=vocab_size) for sizes in lengths.tolist()]


class _Bench:
    """State shared by the benchmark rows: devices, model shape, a training state made once, and the remaining time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.deadline = seconds, float("inf")
        self.devices = jax.local_devices()
        self.mesh = make_mesh(devices=self.devices) if len(self.devices) > 1 else None
        self.first_fit = 0  # of REMATS
        self.fastest: Timed | None = None
        self._state: TrainState | None = None

    shape = functools.cached_property(lambda self: model_shape())

    def measure(self, setting: Setting) -> Result:
        if self.deadline == float("inf"):
            self.deadline = time.perf_counter() + self.seconds
        if time.perf_counter() > self.deadline:
            return skipped("--seconds are over")
        reasons = "; ".join(PATHS[setting.attention].refusals(self.shape[1], jnp.dtype(jnp.bfloat16)))
        if reasons:
            return skipped(reasons)
        full = ""
        for remat in (setting.remat,) if setting.remat else REMATS[self.first_fit :]:
            try:
                return self._timed(setting._replace(remat=remat))
            except Exception as error:
                full = first_line(error)
                if not is_out_of_memory(error):
                    raise
            self._forget()
            if setting == settings()[0]:
                self.first_fit = 1
        return Result(f"out of memory: {full[:100]}", None, values={"out_of_memory": full})

    def _timed(self, setting: Setting) -> Result:
        rows, flops, examples = self._batch(setting)
        begin = time.perf_counter()
        compiled = self._compile(setting, rows)
        compiling = time.perf_counter() - begin
        self._step(compiled, rows)  # the first one also allocates
        times: list[float] = []
        while len(times) < STEPS and sum(times) < SECONDS and (not times or time.perf_counter() < self.deadline):
            begin = time.perf_counter()
            self._step(compiled, rows)
            times.append(time.perf_counter() - begin)
        seconds = float(np.median(times))
        if setting.kind == "dpo" and (self.fastest is None or seconds < self.fastest.seconds):
            self.fastest = Timed(seconds, setting, compiled, rows)
        return self._result(setting, rows, seconds, flops=flops, examples=examples, compiling=compiling, compiled=compiled)

    def _batch(self, setting: Setting) -> tuple[Rows, float, int]:
        """(rows on the devices, necessary FLOPs of a step, pairs or texts in it)."""
        config, count = self.shape[1], len(self.devices)
        if setting.kind == "dpo":
            pairs = hh_like_pairs(
                64 * count if config.width > 128 else 16, vocab_size=config.vocab_size, longest=setting.length
            )
            layout = plan_layout(pairs, kind="packed", batch=len(pairs), length=setting.length, multiple=count)
            rows = layout.rows(pairs, ref_logps=np.full((len(pairs), 2), -200.0, np.float32))
            lengths = (np.array([len(getattr(pair, side)) for pair in pairs]) for side in ("prompt", "chosen", "rejected"))
            flops = float(step_flops(config, *lengths).sum())
        else:
            texts, prompt = count * max(1, 8192 // setting.length) if config.width > 128 else count, setting.length // 4
            ids = np.random.RandomState(0).randint(1, config.vocab_size, (texts, setting.length)).astype(np.int32)
            rows = completion_rows([(text[:prompt], text[prompt:]) for text in ids], length=setting.length)
            flops = texts * pair_flops(config, prompt=prompt, chosen=setting.length - prompt, rejected=0).training
        examples = int(np.asarray(rows.weight).sum())
        return jax.device_put(rows, row_sharding(self.mesh) if self.mesh else self.devices[0]), flops, examples

    def _compile(self, setting: Setting, rows: Rows) -> Any:
        path = PATHS[setting.attention].make()
        model = make_model(self.shape[1], dtype=jnp.bfloat16, remat=setting.remat or REMATS[0], attention=path)
        if setting.kind == "dpo":
            step = functools.partial(dpo_step, model=model, tx=TX, loss=functools.partial(dpo_loss, beta=0.1))
        else:
            step = functools.partial(sft_step, model=model, tx=TX)
        state = self.state  # made outside the mesh
        with self._on_mesh():
            jitted = jit_step(step, state, self.mesh) if self.mesh else jax.jit(step, donate_argnums=0)
            return jitted.lower(state, rows).compile()

    def _on_mesh(self) -> Any:
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def _step(self, compiled: Any, rows: Rows) -> None:
        state = self.state
        with self._on_mesh():
            self._state, metrics = compiled(state, rows)
        loss = float(jax.block_until_ready(metrics)["loss"])
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")

    @property
    def state(self) -> TrainState:
        if self._state is None:
            model = make_model(self.shape[1], dtype=jnp.bfloat16)
            partitioner = mesh_partitioner(self.mesh, model) if self.mesh else single_device(self.devices[0])
            variables = partitioner.make_variables(lambda: model.init(jax.random.key(0)))
            self._state = partitioner.init_state(functools.partial(init_state, tx=TX), variables)
        return self._state

    def _forget(self) -> None:
        """Frees a half-donated state that an out-of-memory step may have left."""
        if self._state is None:
            return
        for leaf in jax.tree.leaves(self._state):
            if not leaf.is_deleted():
                leaf.delete()
        self._state = None
        gc.collect()

    def _result(
        self, setting: Setting, rows: Rows, seconds: float, *, flops: float, examples: int, compiling: float, compiled: Any
    ) -> Result:
        count, peak = len(self.devices), device_peak(self.devices[0].device_kind)
        measured = matmul_rate("bfloat16")
        shares = {"mfu": flops / seconds / count / peak if peak else None, "of_matmul": flops / seconds / count / measured}
        memory = _memory_of(compiled)
        held = (self.devices[0].memory_stats() or {}).get("peak_bytes_in_use")
        told = [
            f"{seconds * 1e3:,.0f} ms a step",
            f"{examples / seconds:,.1f} {'pairs' if setting.kind == 'dpo' else 'texts'}/s",
            f"MFU {shares['mfu']:.1%}" if shares["mfu"] is not None else "MFU unknown (no data sheet)",
            f"{shares['of_matmul']:.0%} of the matmul rate here",
            f"{memory / 2**30:.1f} GiB" + (f" (process so far {held / 2**30:.1f})" if held else ""),
            f"{rows.tokens.shape[0]} rows of {rows.tokens.shape[1]}, remat {setting.remat}, {self.shape[0]}, {count} device(s)",
            f"compiled in {compiling:.0f} s",
        ]
        values = {"step_seconds": seconds, "examples_per_second": examples / seconds, "flops": flops, **shares}
        values |= {"program_bytes": memory, "peak_bytes_of_process": held, **setting._asdict()}
        return Result(", ".join(told), None, values=values | {"compile_seconds": compiling, "shape": self.shape[0]})

    def trace(self, folder: Path) -> Result:
        """Two steps of the fastest DPO setting under JAX's profiler, and a table of the slowest operations."""
        if self.fastest is None:
            return skipped("no DPO step was timed")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "hlo-0.txt", self.fastest.compiled.as_text())
        with jax.profiler.trace(str(folder)):
            for _ in range(2):
                self._step(self.fastest.compiled, self.fastest.rows)
        print(slowest_operations(folder), flush=True)
        return Result(f"two steps of {self.fastest.setting.name}, trace in {folder}", None)


def _memory_of(compiled: Any) -> float:
    """Peak device memory of a program, in bytes."""
    stats = compiled.memory_analysis()
    sizes = (getattr(stats, f"{kind}_size_in_bytes") for kind in ("argument", "output", "temp"))
    return float(sum(sizes) - stats.alias_size_in_bytes)
