"""Diffusion-DPO on scikit-learn's digits: real images, a known reward (stroke weight), and Bradley-Terry labels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpo_jax.data.loader import batch_indices, total_steps
from dpo_jax.diffusion.network import DitConfig, make_dit
from dpo_jax.diffusion.reference import DiffusionReferences, image_uids
from dpo_jax.diffusion.samplers import ddpm_path, guided
from dpo_jax.diffusion.schedule import Schedule, Weighting
from dpo_jax.diffusion.step import ImagePairs, Images, diffusion_dpo_step, diffusion_sft_step, pair_errors
from dpo_jax.evals.intervals import score_interval
from dpo_jax.extras import install_command
from dpo_jax.lab.world import Points, with_interval
from dpo_jax.losses import PreferenceLoss
from dpo_jax.models.digest import weights_digest
from dpo_jax.runtime.fit import Evaluation, fit
from dpo_jax.runtime.metrics import MetricsLog
from dpo_jax.runtime.optim import linear_warmup, make_optimizer, make_schedule
from dpo_jax.runtime.parallel import single_device
from dpo_jax.runtime.progress import reported
from dpo_jax.step import init_state
from dpo_jax.training.fingerprint import check_settings
from dpo_jax.training.run import Saving, saved_run, train
from dpo_jax.types import Metrics, TrainState, Variables

SETTINGS = "settings"
"""Non-trained collection of the state that holds beta and seed, so that all runs share one compiled program."""
HELD_OUT = 360
"""Number of real digits that neither network nor classifier is trained on."""


class Digits(NamedTuple):
    """`images` float32[n, 8, 8] in [-1, 1] (paper to ink), `label` int32[n]."""

    images: np.ndarray
    label: np.ndarray


def load_digits() -> tuple[Digits, Digits]:
    """The 1,797 digits of scikit-learn (extra `lab`; nothing is downloaded), split into training and `HELD_OUT` digits."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(f"the digits are those of scikit-learn: {install_command('lab')}") from error
    found: Any = datasets.load_digits()
    every = Digits((found.images / 8 - 1).astype(np.float32), found.target.astype(np.int32))
    order = np.random.default_rng(0).permutation(len(every.label))
    return Digits(*(part[order[HELD_OUT:]] for part in every)), Digits(*(part[order[:HELD_OUT]] for part in every))


class Judge(NamedTuple):
    """Measures of an image: its stroke weight, and the digit that an independent classifier reads.

    The reward is the mean ink of the visible image, in standard deviations over the real digits.
    """

    mean: float
    std: float
    classifier: Any
    accuracy: float  # of the classifier on held-out real digits

    def reward(self, images: np.ndarray) -> np.ndarray:
        """float64[n]."""
        return (_ink(images) - self.mean) / self.std

    def right(self, images: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Whether the classifier reads the requested digit: float64[n]."""
        return (self.classifier.predict(_flat(images)) == label).astype(np.float64)


def make_judge(seen: Digits, held_out: Digits) -> Judge:
    """Fits a support vector machine and the scale of ink on the real digits."""
    from sklearn.svm import SVC

    width: Any = 0.05  # its annotation knows only names
    classifier = SVC(gamma=width, C=10.0).fit(_flat(seen.images), seen.label)
    ink = _ink(seen.images)
    accuracy = float((classifier.predict(_flat(held_out.images)) == held_out.label).mean())
    return Judge(float(ink.mean()), float(ink.std()), classifier, accuracy)


def _ink(images: np.ndarray) -> np.ndarray:
    return (np.clip(np.asarray(images, np.float64), -1, 1).mean(axis=(1, 2)) + 1) / 2


def _flat(images: np.ndarray) -> np.ndarray:
    return np.clip(images, -1, 1).reshape(len(images), -1) / 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of training and sampling. `guidance` applies to all samples, of reference and policies."""

    batch: int = 64  # pairs a step, or images of Preferred-FT
    pretrain_batch: int = 128
    pretrain_steps: int = 2000
    pretrain_lr: float = 3e-3
    dropout: float = 0.1
    guidance: float = 1.0
    pairs: int = 2048
    strength: float = 2.0  # of the Bradley-Terry labels: nats for each standard deviation of ink
    samples: int = 400
    sample_batch: int = 400
    epochs: float = 4.0
    evaluations: int = 4
    draws: int = 1


class DigitsWorld:
    """A pretrained class-conditional diffusion model of digits, with the data and measures of its policies."""

    def __init__(self, network: DitConfig, schedule: Schedule, sizes: Sizes, *, seed: int) -> None:
        self.network, self.schedule, self.sizes, self.seed = network, schedule, sizes, seed
        self.init, self.predict = make_dit(network, schedule)
        self.real, self.held_out = load_digits()
        self.judge = make_judge(self.real, self.held_out)
        self._measured = jax.jit(self._path, static_argnums=4)
        self.reference: Variables = {}

    def pretrain(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        """Trains the reference by denoising on the real digits, resuming from a checkpoint in `folder`."""
        sizes, partitioner = self.sizes, single_device()
        if (saved := saved_run(folder / "checkpoints", place=str(folder))) is not None:
            check_settings(saved.place, saved.fingerprint, fingerprint)
        uids = image_uids(self.real.images, self.real.label)
        warmup = sizes.pretrain_steps // 20
        rate = make_schedule("cosine", sizes.pretrain_lr, warmup_steps=warmup, total_steps=sizes.pretrain_steps)
        tx = _adam(rate)
        step = functools.partial(self._sft_step, tx=tx, dropout=sizes.dropout)
        variables = partitioner.make_variables(lambda: self.init(jax.random.key(self.seed)))
        stream = functools.partial(_images, self.real, uids, batch=sizes.pretrain_batch, seed=self.seed)

        with reported("pretraining on the digits", total=sizes.pretrain_steps, unit="steps") as task:
            state = train(
                partitioner.compile_step(step),
                partitioner.init_state(functools.partial(_begin, tx=tx, seed=self.seed), variables),
                stream,
                folder=folder,
                total_steps=sizes.pretrain_steps,
                saving=Saving(every=500),
                fingerprint={**fingerprint, "data": weights_digest({"images": self.real.images})},
                partitioner=partitioner,
                check=lambda step, metrics: task.advance(note="loss {loss:.4f}".format(**metrics)),
            )
        self.reference = {"params": partitioner.to_host(state.params)["params"]}

    def pairs(self, seed: int) -> ImagePairs:
        """Two samples of the reference at each label, the preferred one first (a Bradley-Terry draw by `seed`)."""
        images, label = self._candidates
        rewards = self.judge.reward(images.reshape(-1, *images.shape[2:])).reshape(-1, 2)
        margin = self.sizes.strength * (rewards[:, 0] - rewards[:, 1])
        first = np.random.default_rng([seed, 1]).random(len(label)) < 1 / (1 + np.exp(-margin))
        images = np.where(first[:, None, None, None], images, images[:, ::-1])
        zeros = np.zeros(len(label), np.int32)
        return ImagePairs(images, label, image_uids(images, label), zeros, np.ones(len(label), np.float32))

    @functools.cached_property
    def _candidates(self) -> tuple[np.ndarray, np.ndarray]:
        count, size = self.sizes.pairs, self.network.size
        label = np.arange(2 * count, dtype=np.int32) // 2 % self.network.classes
        with reported("sampling pairs of the reference"):
            images, _ = self.sample(self.reference, label, seed=2**20, measure=False)
        return images.reshape(count, 2, size, size), label[::2]

    def sample(
        self, variables: Variables, label: np.ndarray, *, seed: int, measure: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """DDPM samples [n, 8, 8] of a policy at `label`, and the path KL of each to the reference, [n] nats (or 0)."""
        found, several = [], self.sizes.sample_batch
        for start in range(0, len(label), several):
            part = np.resize(label[start : start + several], several)  # one shape: compiled once
            key = jax.random.fold_in(jax.random.key(seed), start)
            found.append(jax.device_get(self._measured(variables, self.reference, part, key, measure)))
        images, kl = (np.concatenate(parts)[: len(label)] for parts in zip(*found, strict=True))
        return images, kl

    def measure(self, variables: Variables, *, seed: int) -> tuple[dict[str, float], np.ndarray]:
        """A measured point (reward, path KL, accuracy of the classifier, with intervals over samples), and the samples."""
        label = np.arange(self.sizes.samples, dtype=np.int32) % self.network.classes
        images, kl = self.sample(variables, label, seed=seed)
        values = {"reward": self.judge.reward(images), "kl": kl, "accuracy": self.judge.right(images, label)}
        found: dict[str, float] = {}
        for name, each in values.items():
            found |= with_interval(name, np.asarray(each, np.float64), self.seed)
        # The bootstrap would be certain if all are right.
        found["accuracy_low"], found["accuracy_high"] = score_interval(values["accuracy"])
        return found, images

    def run(
        self,
        method: str,
        folder: Path,
        *,
        seed: int,
        lr: float,
        loss: Callable[..., Any] | None = None,
        beta: float = 0.0,
        weighting: Weighting = "constant",
        refs: Path | None = None,
    ) -> tuple[Points, np.ndarray]:
        """Points of a run of "dpo" (with `loss(logps, ref_logps, beta=)`) or "preferred-ft", and its final samples."""
        sizes, partitioner, pairs = self.sizes, single_device(), self.pairs(seed)
        count = len(pairs.label)
        steps = total_steps(count, batch=sizes.batch, epochs=sizes.epochs)
        step, tx = self._compiled(loss if method == "dpo" else None, weighting, lr)
        if method == "dpo":
            references = self.references(refs, seed)
            stream: Callable[[int], Any] = functools.partial(_pair_batch, pairs, references, seed=seed, sizes=sizes)
        else:
            chosen = Digits(np.asarray(pairs.images)[:, 0], np.asarray(pairs.label))
            options = {"batch": sizes.batch, "seed": seed, "epochs": sizes.epochs}
            stream = functools.partial(_images, chosen, image_uids(*chosen), **options)
        points: Points = []
        drawn: list[np.ndarray] = []

        def evaluate(state: TrainState, done: int) -> Mapping[str, Any]:
            found, images = self.measure({"params": state.params["params"]}, seed=seed)
            points.append({"step": float(done), **found})
            drawn.append(images)
            return points[-1]

        variables = partitioner.put_variables(self.reference)
        begin = functools.partial(_begin, tx=tx, seed=seed, beta=beta)
        training = reported("training", total=steps, unit="steps", brief=True)
        with MetricsLog(folder / "metrics.jsonl") as log, training as task:
            fit(
                step,
                partitioner.init_state(begin, variables),
                stream,
                total_steps=steps,
                log=log,
                evaluation=Evaluation(evaluate, every=max(1, math.ceil(steps / sizes.evaluations))),
                check=lambda step, metrics: task.advance(note="loss {loss:.4f}".format(**metrics)),
                get_state=partitioner.get_state,
            )
        return points, drawn[-1]

    def references(self, folder: Path | None, seed: int) -> DiffusionReferences:
        """The reference's errors on the noise of `seed`, cached in `folder`."""
        compute = functools.partial(self._reference_errors, self.reference, seed=seed)
        identity = {"weights": self.digest, "seed": seed, "network": dataclasses.asdict(self.network)}
        identity["schedule"] = weights_digest({"signal": self.schedule.signal})
        return DiffusionReferences(folder, identity, compute, draws=self.sizes.draws, batch=256)

    @functools.cached_property
    def digest(self) -> str:
        return weights_digest(self.reference)

    @functools.cached_property
    def _reference_errors(self) -> Callable[..., jax.Array]:
        options = {"predict": self.predict, "schedule": self.schedule, "draws": self.sizes.draws}
        return jax.jit(functools.partial(pair_errors, **options))

    def _path(
        self, variables: Variables, reference: Variables, label: jax.Array, key: jax.Array, measure: bool
    ) -> tuple[jax.Array, jax.Array]:
        options = {"null": self.network.null, "guidance": self.sizes.guidance}
        policy, before = (guided(self.predict, one, label, **options) for one in (variables, reference))
        shape = (len(label), self.network.size, self.network.size)
        return ddpm_path(policy, before, self.schedule, key, shape, measure=measure)

    def _sft_step(self, state: TrainState, batch: Images, *, tx: Any, dropout: float) -> tuple[TrainState, Metrics]:
        options = {"predict": self.predict, "schedule": self.schedule, "null": self.network.null, "dropout": dropout}
        return diffusion_sft_step(state, batch, tx=tx, seed=state.frozen[SETTINGS]["seed"], **options)

    def _dpo_step(
        self, state: TrainState, pairs: ImagePairs, *, loss: Any, tx: Any, weighting: Weighting
    ) -> tuple[TrainState, Metrics]:
        settings = state.frozen[SETTINGS]
        bound: PreferenceLoss = functools.partial(loss, beta=settings["beta"])
        options = {"predict": self.predict, "schedule": self.schedule, "weighting": weighting}
        return diffusion_dpo_step(state, pairs, loss=bound, tx=tx, seed=settings["seed"], **options)

    @functools.cache  # noqa: B019  the world lives as long as the program
    def _compiled(self, loss: Any, weighting: Weighting, lr: float) -> tuple[Callable[..., Any], Any]:
        """The compiled step (DPO with a `loss`, else Preferred-FT) and its optimizer."""
        tx = _adam(linear_warmup(lr, warmup_steps=10))
        if loss is None:
            step = functools.partial(self._sft_step, tx=tx, dropout=0.0)
        else:
            step = functools.partial(self._dpo_step, loss=loss, tx=tx, weighting=weighting)
        return single_device().compile_step(step), tx


def _begin(variables: Variables, *, tx: Any, seed: int, beta: float = 0.0) -> TrainState:
    return init_state(variables, tx, frozen={SETTINGS: {"seed": jnp.uint32(seed), "beta": jnp.float32(beta)}})


def _adam(rate: Any) -> optax.GradientTransformation:
    return make_optimizer(rate, name="adamw", b2=0.99, max_grad_norm=1.0)


def _batch_of(
    count: int, *, batch: int, seed: int, step: int, epochs: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Examples of a step with their epochs and weights: [batch] each; the last batch is padded."""
    found = batch_indices(count, batch=batch, seed=seed, step=step, epochs=epochs)
    epoch = (np.arange(step * batch, step * batch + len(found)) // count).astype(np.int32)
    weight = (np.arange(batch) < len(found)).astype(np.float32)
    return np.resize(found, batch), np.resize(epoch, batch), weight


def _images(data: Digits, uids: np.ndarray, step: int, *, batch: int, seed: int, epochs: float | None = None) -> Images:
    index, epoch, weight = _batch_of(len(data.label), batch=batch, seed=seed, step=step, epochs=epochs)
    return Images(data.images[index], data.label[index], uids[index], epoch, weight)


def _pair_batch(pairs: ImagePairs, references: DiffusionReferences, step: int, *, seed: int, sizes: Sizes) -> ImagePairs:
    index, epoch, weight = _batch_of(len(pairs.label), batch=sizes.batch, seed=seed, step=step, epochs=sizes.epochs)
    fields = {name: np.asarray(getattr(pairs, name))[index] for name in ("images", "label", "uid")}
    return references.of(ImagePairs(**fields, epoch=epoch, weight=weight))
