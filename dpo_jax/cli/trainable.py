"""The trained parameters of a command: all weights, some of them (`trainable`), or a low-rank adapter beside them (`lora`)."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError, TrainingConfig
from dpo_jax.cli.model_folders import check_adapter
from dpo_jax.models.adapter import read_adapter, resumed
from dpo_jax.models.folder import adapter_base
from dpo_jax.models.hf import read_weights, variable_shapes
from dpo_jax.models.hub import resolve
from dpo_jax.models.lora import LORA, Lora, adapter_shapes, lora_model, lora_targets, merge_adapter, new_adapter
from dpo_jax.models.partial import TRAINED, Chosen, chosen_parameters, join, partial_model, split
from dpo_jax.reward_model import with_scalar_head
from dpo_jax.runtime.hosts import shared_digest
from dpo_jax.runtime.progress import reported
from dpo_jax.step import init_state
from dpo_jax.types import Model, Partitioner, TrainState, Variables


class Trainable(NamedTuple):
    """The trained part of a model. `model` reads the variables of a training state; `base` those of the whole model."""

    base: Model
    model: Model
    seed: int = 0
    lora: Lora | None = None
    chosen: Chosen | None = None
    adapter: bool = False  # training continues the adapter of a folder
    dtype: str = "float32"  # type of the frozen weights; of all, if all are trained

    def partitioner(self, config: Config, *, head: bool = False) -> Partitioner:
        """The partitioner, with a scalar `head` if there is one. Whole models are placed like `base`, states like `model`."""
        model, base = (with_scalar_head(one) if head else one for one in (self.model, self.base))
        found = build.make_partitioner(config, model)
        if self.chosen is None:
            return found
        whole = build.make_partitioner(config, base)

        def put_variables(variables: Variables) -> Variables:
            return (found if TRAINED in variables else whole).put_variables(variables)

        return found._replace(
            load_variables=whole.load_variables, make_variables=whole.make_variables, put_variables=put_variables
        )

    def load(self, path: str, partitioner: Partitioner, *, name: str) -> tuple[Variables, dict[str, str]]:
        """The weights of `path` on the devices, and two digests: "start" of all, and "base" of those beside an adapter."""
        with build.naming_option(name, path), reported(f"loading the weights of {path}"):
            digest = shared_digest()
            shapes = dict(variable_shapes(self.base, build.PRECISIONS[self.dtype]))
            if self.adapter and self.lora is not None:
                shapes[LORA] = adapter_shapes(self.base.config, self.lora)
            pieces = read_weights(path, self.base, digest=digest, merge=not self.adapter)
            variables = partitioner.load_variables(shapes, pieces)
        start = build.digest_in(digest, "float32" if self.adapter else self.dtype)
        return variables, {"start": start} | ({} if self.lora is None else {"base": digest.base or digest.hexdigest()})

    def reader(self, variables: Variables) -> Model:
        """The model that reads `variables` as returned by `load`: with the adapter, if they already have one."""
        return self.model if LORA in variables else self.base

    def stored(self) -> Model:
        """`base`, with new weights in the type in which they are kept."""
        kept = functools.partial(jax.tree.map, lambda x: x.astype(build.PRECISIONS[self.dtype]))
        return self.base._replace(init=lambda key: kept(self.base.init(key)))

    def begin(self, partitioner: Partitioner, variables: Variables, tx: Any) -> TrainState:
        """The state before the first step. `variables`, from `load`, are consumed: a large model does not fit twice."""
        with reported("placing weights and optimizer"):
            return partitioner.init_state(functools.partial(self.state, tx=tx), variables)

    def state(self, variables: Variables, *, tx: Any) -> TrainState:
        """Like `begin`, but pure."""
        if self.lora is not None and LORA not in variables:
            variables = {**variables, LORA: new_adapter(self.base.config, self.lora, jax.random.key(self.seed))}
        if self.chosen is not None:
            variables = split(variables, self.chosen)
        kept = {"params": jax.tree.map(lambda x: x.astype(build.PRECISIONS[self.dtype]), variables["params"])}
        if self.lora is None and self.chosen is None:
            return init_state({**variables, **kept}, tx)
        return init_state({name: tree for name, tree in variables.items() if name != "params"}, tx, frozen=kept)

    def written(self, partitioner: Partitioner, state: TrainState) -> Variables:
        """The weights to export, in the form of `get_state`: the variables of the whole model, or the adapter alone."""
        if self.lora is not None:
            return partitioner.get_state(state.replace(frozen={})).variables
        return self.whole(partitioner.get_state(state).variables)

    def whole(self, variables: Variables) -> Variables:
        """The variables of the whole model from those that `model` reads; an adapter stays separate."""
        return join(variables)

    def merged(self, variables: Variables) -> Variables:
        """Like `whole`, with an adapter merged into its base."""
        return self.whole(variables) if self.lora is None else merge_adapter(variables, self.lora)


def planned_trainable(config: Config, section: TrainingConfig, model: Model) -> Trainable:
    """The parameters of `model` that `section` trains, whatever they start from: no file is read. Raises `ConfigError`."""
    if section.trainable is not None:
        try:
            chosen = chosen_parameters(section.trainable, model)
        except ValueError as error:
            raise ConfigError(f"{section.name}.trainable: {error}") from error
        # Layers separated from their stack are copied when the state is made.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return Trainable(model, partial_model(model, chosen), chosen=chosen)
    if config.lora.rank is None:
        return Trainable(model, model, dtype=section.param_dtype)
    options = config.lora
    try:
        lora = Lora(config.lora.rank, options.alpha, lora_targets(options.targets, model.config), options.rslora)
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error}") from error
    return Trainable(model, lora_model(model, lora), config.run.seed, lora, dtype=options.base_dtype)


def trainable_of(config: Config, section: TrainingConfig, model: Model, path: str | None) -> Trainable:
    """The parameters of `model` that `section` trains, starting from the folder `path`. Raises `ConfigError`."""
    trainable, options = planned_trainable(config, section, model), config.lora
    if trainable.lora is None:
        return trainable
    check_adapter(config, path)
    assert path is not None
    folder = resolve(path)
    if adapter_base(folder) is None:
        return trainable
    found, dtype = _adapter_of(folder, model, path=path)
    if found != trainable.lora:
        raise ConfigError(
            f"lora: {path} is an adapter of {_words(found)}, but {_words(trainable.lora)} is requested. To train it "
            "further, set section lora to match; or merge it (dpo-jax export --export.merge) and start from the result."
        )
    if dtype != options.base_dtype:
        raise ConfigError(f"lora.base_dtype: {path} was trained on a base in {dtype}; set it to that")
    return trainable._replace(adapter=True)


def _adapter_of(folder: Path, model: Model, *, path: str) -> tuple[Lora, str]:
    with build.naming_option("lora", path):
        adapter = read_adapter(folder, model.config)
        return resumed(adapter, model.config)[0], adapter.base_dtype


def _words(lora: Lora) -> str:
    targets = ", ".join(target.rpartition("/")[2] for target in lora.targets)
    return f"rank {lora.rank}, alpha {lora.alpha:g}{' (rslora)' if lora.rslora else ''} on {targets}"
