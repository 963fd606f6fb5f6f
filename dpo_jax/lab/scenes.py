"""Hallucination in captions of rendered scenes: a tiny Gemma 3 with images, SFT on careless captions, and preferences."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax.data import scenes as data
from dpo_jax.data.encode import Encoded, PromptImages
from dpo_jax.data.groups import PairGroup, group_pairs
from dpo_jax.data.images import ImageFile, Processing, as_png, open_image, pixels
from dpo_jax.data.layout import Completion
from dpo_jax.data.loader import plan_layout, train_batches
from dpo_jax.evals.intervals import score_interval
from dpo_jax.lab.methods import PairData, PairMethod, grouped_data, in_layout
from dpo_jax.lab.scene_encoder import encoder_config, train_encoder
from dpo_jax.lab.world import Points, with_interval
from dpo_jax.losses import dpo_loss, preferred_ft_loss
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import weights_digest
from dpo_jax.models.families import decoder_config
from dpo_jax.runtime.optim import linear_warmup, make_optimizer, make_schedule
from dpo_jax.runtime.parallel import single_device
from dpo_jax.runtime.progress import reported
from dpo_jax.sampling import generate, left_pad, left_pad_images
from dpo_jax.sft import sft_step
from dpo_jax.step import init_state
from dpo_jax.training.features import image_features, on_devices, open_features
from dpo_jax.training.run import Saving, train
from dpo_jax.types import Metrics, Rows, TrainState, Variables

NEW_TOKENS = 24  # limit for a sampled caption; a true one of three objects takes 15
PROCESSING = Processing(height=data.SIZE, width=data.SIZE, tokens=data.CELLS**2)
LOSSES: Mapping[str, Callable[..., Any]] = {"dpo": dpo_loss, "preferred-ft": preferred_ft_loss}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The part of configuration section `scenes` that the experiment itself reads."""

    train: int
    test: int
    pairs: int
    adds: float
    omits: float
    pair_omits: float
    width: int
    layers: int
    encoder_width: int
    encoder_steps: int
    encoder_lr: float
    sft_steps: int
    sft_batch: int
    sft_lr: float
    batch: int
    epochs: float
    evaluations: int


def gemma(width: int, layers: int, *, encoder_width: int) -> dict[str, Any]:
    """The `config.json` of a tiny `Gemma3ForConditionalGeneration` that reads scenes, with full attention in all layers."""
    vision = encoder_config(encoder_width)
    start, soft, end = map(data.WORDS.index, data.MARKS)
    text = {
        "model_type": "gemma3_text",
        "vocab_size": len(data.WORDS),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": width // 2,
        "query_pre_attn_scalar": width // 2,
        "layer_types": ["full_attention"] * layers,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "rope_parameters": {
            kind: {"rope_theta": 10000.0, "rope_type": "default"} for kind in ("full_attention", "sliding_attention")
        },
    }
    return {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": start,
        "image_token_index": soft,
        "eoi_token_index": end,
        "eos_token_id": 0,
        "mm_tokens_per_image": vision.tokens,
        "initializer_range": 0.1,
        "text_config": {**text, "initializer_range": 0.1},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "vision_use_head": False,
        },
    }


def image_of(scene: data.Scene) -> ImageFile:
    """The scene as a PNG, read like any other image from then on."""
    return open_image(as_png(scene.image))


class ScenesWorld:
    """The model, its reference (after SFT), and the data and measures of its policies. A `lab.world.TrainingWorld`."""

    def __init__(self, sizes: Sizes, folder: Path, *, seed: int, fingerprint: Mapping[str, Any]) -> None:
        self.sizes, self.seed, self.partitioner, self.begin = sizes, seed, single_device(), init_state
        hf = gemma(sizes.width, sizes.layers, encoder_width=sizes.encoder_width)
        self.model = make_model(decoder_config(hf, images=True))
        self.prompt = data.prompt_ids(PROCESSING.tokens)
        self.folder, self.fingerprint = folder, fingerprint
        self.test = data.scenes(sizes.test, seed, split="test")
        self._generate = self.partitioner.compile_map(self._draw)
        self._methods: dict[tuple[str, float], PairMethod] = {}
        self.features: Mapping[str, np.ndarray] = {}
        self.reference: Variables = {}

    def prepare(self) -> None:
        """Trains the encoder, caches features of all images, trains the reference by SFT. Finished parts are not repeated."""
        sizes = self.sizes
        with reported("drawing scenes"):
            taught = data.scenes(sizes.train, self.seed, split="train")
            paired = data.scenes(sizes.pairs, self.seed, split="pairs")
            self._images = {id(scene): image_of(scene) for scene in (*taught, *paired, *self.test)}
        self._taught, self._paired = taught, paired
        config = encoder_config(sizes.encoder_width)
        read = np.stack([pixels(self._images[id(scene)], PROCESSING) for scene in taught])
        options = {"steps": sizes.encoder_steps, "lr": sizes.encoder_lr, "seed": self.seed}
        encoder = train_encoder(taught, read, self.folder / "encoder", config=config, fingerprint=self.fingerprint, **options)
        cache = open_features(self.folder / "features", weights_digest(encoder), config, PROCESSING)
        compiled = functools.partial(on_devices, encoder, config, jax.local_devices()[:1])
        self.features = image_features(list(self._images.values()), cache=cache, encoder=compiled, processing=PROCESSING)
        self.reference = self._sft()

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the reference and of the features that it reads."""
        return weights_digest({"params": self.partitioner.to_host(self.reference)["params"], "features": dict(self.features)})

    def shown(self, scene: data.Scene) -> PromptImages:
        return PromptImages(np.array([1], np.int32), (self._images[id(scene)].digest,), PROCESSING.tokens, self.features)

    def _sft(self) -> Variables:
        sizes, partitioner, rng = self.sizes, self.partitioner, np.random.default_rng([self.seed, 10])
        captions = [data.careless(scene.things, rng, adds=sizes.adds, omits=sizes.omits) for scene in self._taught]
        texts = [
            Completion(self.prompt, data.caption_ids(data.caption(things)), None, self.shown(scene))
            for scene, things in zip(self._taught, captions, strict=True)
        ]
        layout = plan_layout(texts, kind="plain", batch=sizes.sft_batch)
        rate = make_schedule("cosine", sizes.sft_lr, warmup_steps=sizes.sft_steps // 20, total_steps=sizes.sft_steps)
        tx = _adam(rate)

        def step(state: TrainState, rows: Rows) -> tuple[TrainState, Metrics]:
            return sft_step(state, rows, model=self.model, tx=tx)

        variables = partitioner.make_variables(lambda: self.model.init(jax.random.key(self.seed)))
        with reported("SFT on captions", total=sizes.sft_steps, unit="steps") as task:
            state = train(
                partitioner.compile_step(step),
                partitioner.init_state(functools.partial(init_state, tx=tx), variables),
                train_batches(texts, layout=layout, batch=sizes.sft_batch, seed=self.seed),
                folder=self.folder / "sft",
                total_steps=sizes.sft_steps,
                saving=Saving(every=500),
                fingerprint=self.fingerprint,
                partitioner=partitioner,
                check=lambda step, metrics: task.advance(note="loss {loss:.3f}".format(**metrics)),
            )
        return partitioner.put_variables({"params": partitioner.to_host(state.params)["params"]})

    def groups(self, kind: str, seed: int) -> list[PairGroup]:
        """A pair of captions of each scene, the better one first, drawn by `seed`.

        `kind`: the better caption has mistakes like the SFT captions ("careless"), or none ("true"). The worse has one more.
        """
        sizes, rng, pairs = self.sizes, np.random.default_rng([seed, 11]), []
        mistakes = {"adds": sizes.adds, "omits": sizes.omits} if kind == "careless" else {"adds": 0.0, "omits": 0.0}
        for number, scene in enumerate(self._paired):
            better = data.careless(scene.things, rng, **mistakes)
            worse = data.spoilt(better, scene.things, rng, omits=sizes.pair_omits)
            chosen, rejected = (data.caption_ids(data.caption(things)) for things in (better, worse))
            pairs.append(Encoded(self.prompt, chosen, rejected, uid=f"scene {number}", images=self.shown(scene)))
        return group_pairs(pairs)

    def run(
        self, method: str, folder: Path, *, kind: str, seed: int, lr: float, settings: Mapping[str, float]
    ) -> tuple[Points, Variables]:
        """Points of a run of "dpo" or "preferred-ft" on the pairs of `kind` and `seed`, and its policy."""
        trained = self._method(method, lr)
        own = in_layout(self, trained.data, self.groups(kind, seed))
        return trained.train(
            folder,
            settings=settings,
            evaluations=self.sizes.evaluations,
            seed=seed,
            data=own,
            measure=functools.partial(self.measure, seed=seed),
        )

    def _method(self, method: str, lr: float) -> PairMethod:
        if (method, lr) not in self._methods:
            tx = _adam(linear_warmup(lr, warmup_steps=5))
            self._methods[method, lr] = PairMethod(self, self._data, loss=LOSSES[method], tx=tx, epochs=self.sizes.epochs)
        return self._methods[method, lr]

    @functools.cached_property
    def _data(self) -> PairData:
        return grouped_data(self, self.groups("careless", self.seed), batch=self.sizes.batch)

    def captions(self, variables: Variables, *, seed: int) -> list[str]:
        """A sampled caption of each test scene."""
        tokens, lengths = left_pad([self.prompt] * len(self.test))
        images = left_pad_images([self.shown(scene) for scene in self.test], lengths, columns=tokens.shape[1])
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        drawn = self._generate(variables, {"tokens": tokens, "lengths": lengths, "images": images, "key": key})
        return [data.caption_text(ids[:n]) for ids, n in zip(drawn.tokens, drawn.lengths, strict=True)]

    def _draw(self, variables: Variables, rows: Mapping[str, Any]) -> Any:
        key = jax.random.wrap_key_data(rows["key"])
        options = {"max_new_tokens": NEW_TOKENS, "eos_id": data.WORDS.index(data.END)}
        return generate(self.model, variables, rows["tokens"], rows["lengths"], key, images=rows["images"], **options)

    def measure(self, variables: Variables, /, *, seed: int = 0) -> dict[str, float]:
        """Hallucination and recall of sampled captions of the test scenes, with 95 % intervals over scenes.

        `hallucinated`: share of the mentioned objects that are not there (CHAIR); `recalled`: share of the present objects that
        are mentioned; `mentioned`: number of objects in a caption.
        """
        return point_of(self.captions(variables, seed=seed), self.test, seed=self.seed)


def point_of(captions: Sequence[str], scenes: Sequence[data.Scene], *, seed: int) -> dict[str, float]:
    """The measured point of captions; see `ScenesWorld.measure`."""
    counts = np.array([data.count(text, scene.things) for text, scene in zip(captions, scenes, strict=True)], np.float64)
    mentioned, hallucinated, recalled, there = counts.T
    return {
        **_share("hallucinated", hallucinated, mentioned),
        **_share("recalled", recalled, there),
        **with_interval("mentioned", mentioned, seed),
    }


def _share(name: str, part: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """sum(part) / sum(whole) as `name`, with its 95 % interval over scenes. No event is no certainty, unlike in a bootstrap."""
    some = whole > 0
    if not some.any():
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), 0.0)
    low, high = score_interval(part[some] / whole[some], whole[some])
    return {name: float(part.sum() / whole.sum()), f"{name}_low": low, f"{name}_high": high}


def _adam(rate: Any) -> Any:
    return make_optimizer(rate, name="adamw", b2=0.99, max_grad_norm=1.0)
