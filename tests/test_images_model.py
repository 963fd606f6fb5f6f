"""A Gemma 3 with images equals transformers', in every row layout, on devices, when sampled, and after export."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from dpo_jax.data.encode import Encoded, PromptImages
from dpo_jax.data.layout import Layout, causal_rows
from dpo_jax.data.loader import make_batch, plan_layout
from dpo_jax.dpo import dpo_step
from dpo_jax.logps import completion_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models.attention import DENSE, Scoring, VisibleKeys, attend
from dpo_jax.models.attention_gpu import flash_path
from dpo_jax.models.attention_paths import BLOCKS, attention_path
from dpo_jax.models.attention_tpu import splash_path
from dpo_jax.models.decoder import make_model
from dpo_jax.models.encoder_folder import encoder_in_hf_form, load_encoder
from dpo_jax.models.families import decoder_config
from dpo_jax.models.hf import load_hf, save_hf
from dpo_jax.models.siglip import encode_images, encoder_shapes, init_encoder
from dpo_jax.models.vision_config import vision_settings
from dpo_jax.reference import pair_key
from dpo_jax.runtime.mesh import make_mesh
from dpo_jax.runtime.parallel import mesh_partitioner, pmap_partitioner, single_device
from dpo_jax.sampling import generate, left_pad, left_pad_images
from dpo_jax.step import init_state
from dpo_jax.types import RowImages
from dpo_jax.untrusted import Unreadable

FOLDER = GOLDEN / "gemma3_images"
IMAGE, TOKENS = 60, 4
PLACES = [[6], [1, 14], []]


@functools.cache
def golden():
    return *load_hf(FOLDER, images=True), load_file(FOLDER / "logits.safetensors")


@functools.cache
def features():
    """Of the golden images, {name: [T, W]}."""
    config, encoder = load_encoder(FOLDER)
    found = jax.jit(functools.partial(encode_images, config=config))(encoder, golden()[2]["pixels"])
    return {f"image {number}": np.asarray(one) for number, one in enumerate(found)}


def shown(starts, names):
    return PromptImages(np.array(starts, np.int32), tuple(names), TOKENS, features())


def golden_rows():
    """The golden texts as rows whose every token is scored."""
    tokens, numbers = golden()[2]["input_ids"], iter(range(3))
    rows = causal_rows(tokens)
    values, index = np.zeros((3, 8, 16), np.float32), np.full(tokens.shape, -1, np.int32)
    k_end = rows.k_end.copy()
    for row, places in enumerate(PLACES):
        for place, start in enumerate(places):
            values[row, 4 * place : 4 * place + 4] = features()[f"image {next(numbers)}"]
            index[row, start : start + 4] = 4 * place + np.arange(4)
            k_end[row, start : start + 4] = start + 4
    return rows.replace(images=RowImages(values, index), k_end=k_end)


def logits_of(model, variables, rows):
    return jax.jit(lambda v, r: model.unembed(v, model.forward(v, r)))(variables, rows)


@pytest.mark.parametrize("path", ["dense", "blocks", "chunked"])
def test_logits_equal_transformers(path):
    model, variables, expected = golden()
    chosen = attention_path(path, platform="cpu", config=model.config, dtype=jnp.float32)
    model = make_model(model.config, attention=chosen)
    np.testing.assert_allclose(logits_of(model, variables, golden_rows()), expected["logits"], rtol=0, atol=1e-5)


def test_an_image_matters_and_text_before_it_does_not_see_it():
    model, variables, expected = golden()
    rows = golden_rows()
    other = rows.replace(images=dataclasses.replace(rows.images, features=rows.images.features + 1))
    apart = np.abs(logits_of(model, variables, other) - expected["logits"]).max(axis=-1)
    assert apart[0, :6].max() < 1e-5
    assert apart[0, 6:].min() > 1e-3
    assert apart[2].max() < 1e-5


def test_without_images_it_is_the_text_model():
    model, variables, expected = golden()
    text, its = load_hf(FOLDER)
    rows = causal_rows(expected["input_ids"][2:])
    np.testing.assert_allclose(logits_of(text, its, rows), expected["logits"][2:], rtol=0, atol=1e-5)
    assert "image_kernel" not in its["params"]
    with pytest.raises(ValueError, match="features of width 16, but the model reads no images"):
        logits_of(text, its, golden_rows())


def pairs():
    """Pairs whose prompts show no image, one, and two, of which one is shown to two prompts."""
    rng = np.random.default_rng(0)

    def text(length):
        return rng.integers(1, 58, length).astype(np.int32)

    def soft():
        return np.full(TOKENS, IMAGE, np.int32)

    def pair(prompt, images=None):
        return Encoded(prompt, np.append(text(5), 0), np.append(text(3), 0), images=images)

    return [
        pair(np.concatenate([text(3), soft(), text(2)]), shown([3], ["image 0"])),
        pair(text(6)),
        pair(np.concatenate([text(1), soft(), text(2), soft(), text(1)]), shown([1, 7], ["image 1", "image 0"])),
        pair(np.concatenate([text(2), soft(), text(4)]), shown([2], ["image 0"])),
    ]


WIDE = [(20, 30, 25), (3, 5, 60), (0, 50, 40)]  # tokens before the image, chosen, rejected


def wide_rows(kind):
    """Rows of several blocks, whose images begin in the middle, early, and at the very beginning of their prompts."""
    rng, tokens = np.random.default_rng(0), 16
    found = []
    for number, (before, *sides) in enumerate(WIDE):
        images = PromptImages(np.array([before]), (f"{number}",), tokens, {f"{number}": np.zeros((tokens, 2), np.float32)})
        ids = (rng.integers(1, 60, n).astype(np.int32) for n in (before + tokens + 5, *sides))
        found.append(Encoded(*ids, images=images))
    length, per_row = (300, 2) if kind == "packed" else (130, 1)
    return Layout(kind, length=length, scored=length, per_row=per_row, image_shape=(48, 2)).rows(found)


@pytest.mark.parametrize("window", [None, 7, 25])
@pytest.mark.parametrize("kind", ["shared", "packed"])
@pytest.mark.parametrize("path", ["blocks", "flash", "splash"])
def test_attention_sees_images_as_dense_does(path, kind, window):
    """Of an image that a window cuts, too: each token sees those behind it in the image, however far."""
    rows, rng = wide_rows(kind), np.random.default_rng(1)
    count, length = rows.tokens.shape
    q, k, v = (rng.standard_normal((count, length, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    keys = VisibleKeys.of(rows, window=window)
    real = (rows.k_end - rows.k_start != 1) | (rows.positions == 0)

    def of(path):
        out = jax.jit(functools.partial(attend, keys=keys, scoring=Scoring(0.3), path=path))(q, k, v)
        return np.where(real[:, :, None, None], out, 0)

    paths = {"blocks": BLOCKS, "flash": flash_path(interpret=True), "splash": splash_path(interpret=True)}
    np.testing.assert_allclose(of(paths[path]), of(DENSE), atol=1e-5)


@functools.cache
def logps_and_gradient(kind):
    model, variables, _ = golden()
    layout = plan_layout(pairs(), kind=kind, batch=4)
    rows = make_batch(pairs(), np.arange(4), layout=layout, batch=4).rows

    def total(variables):
        found = completion_logps(model, variables, rows).reshape(-1, 2)
        order = np.argsort(np.where(rows.index < 0, 99, rows.index))[:4]
        return (found[order] * np.arange(1, 9, dtype=np.float32).reshape(4, 2)).sum(), found[order]

    (_, found), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(variables)
    return found, gradient


@pytest.mark.parametrize("kind", ["shared", "packed"])
def test_layouts_give_the_same_log_probabilities_and_gradients(kind):
    (found, gradient), (expected, its) = logps_and_gradient(kind), logps_and_gradient("plain")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * max(1, np.abs(b).max())), gradient, its)
    assert np.abs(gradient["params"]["image_kernel"]).max() > 1e-3
    assert np.abs(gradient["params"]["image_norm"]["scale"]).max() > 1e-3


def test_a_row_holds_an_image_once_and_as_many_as_there_are_columns():
    layout = Layout("packed", length=64, scored=32, per_row=4, image_shape=(8, 16))
    rows, index = layout.place(pairs())
    held = [[pairs()[i].images for i in row if i >= 0] for row in index.reshape(-1, 4)]
    for row, images in zip(rows.images.index, held, strict=True):
        names = {name for one in images if one is not None for name in one.names}
        assert row.max() == 4 * len(names) - 1
        assert len(names) <= 2
    with pytest.raises(ValueError, match="its images take 8 tokens, and a row has columns for 4"):
        dataclasses.replace(layout, image_shape=(4, 16)).place(pairs())
    with pytest.raises(ValueError, match="example 2: its images take"):
        Layout("plain", length=64, scored=32).place(pairs())


def test_the_keys_of_the_reference_cache_know_the_images():
    first = pairs()[0]
    keys = {pair_key(dataclasses.replace(first, images=images)) for images in (None, first.images, shown([3], ["image 1"]))}
    assert len(keys) == 3


@pytest.mark.parametrize("way", ["pmap", "mesh"])
def test_devices_take_the_same_step(way):
    model, variables, _ = golden()
    tx = optax.sgd(0.1)
    layout = plan_layout(pairs(), kind="packed", batch=4, multiple=4)
    batch = make_batch(pairs(), np.arange(4), layout=layout, batch=4, ref_logps=np.zeros((4, 2)))

    def stepped(partitioner):
        step = functools.partial(
            dpo_step, model=model, tx=tx, loss=functools.partial(dpo_loss, beta=0.1), axis_name=partitioner.axis_name
        )
        state = partitioner.init_state(functools.partial(init_state, tx=tx), partitioner.put_variables(variables))
        state, metrics = partitioner.compile_step(step)(state, batch.rows)
        return partitioner.to_host(state.params), float(np.asarray(partitioner.to_host(metrics["loss"])).reshape(-1)[0])

    other = pmap_partitioner() if way == "pmap" else mesh_partitioner(make_mesh(data=2, fsdp=2), model)
    (found, loss), (expected, its) = stepped(other), stepped(single_device())
    assert loss == pytest.approx(its, abs=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a).reshape(b.shape), b, atol=1e-5), found, expected)


def test_what_is_sampled_has_the_log_probabilities_of_the_whole_text():
    model, variables, _ = golden()
    some = pairs()
    prompts, lengths = left_pad([pair.prompt for pair in some])
    images = left_pad_images([pair.images for pair in some], lengths, columns=prompts.shape[1])
    run = jax.jit(functools.partial(generate, model, max_new_tokens=5, eos_id=-1, completions=2))
    samples = run(variables, prompts, lengths, jax.random.key(0), images=images)
    drawn = [
        dataclasses.replace(pair, chosen=samples.tokens[2 * n], rejected=samples.tokens[2 * n + 1])
        for n, pair in enumerate(some)
    ]
    layout = plan_layout(drawn, kind="plain", batch=4)
    rows = make_batch(drawn, np.arange(4), layout=layout, batch=4).rows
    np.testing.assert_allclose(samples.logps, np.asarray(completion_logps(model, variables, rows)).reshape(-1), atol=1e-4)


def test_a_folder_survives(tmp_path):
    model, variables, _ = golden()
    config, encoder = load_encoder(FOLDER)
    save_hf(tmp_path / "copy", model, variables, others=encoder_in_hf_form(config, encoder))
    for there, here in ((load_hf(tmp_path / "copy", images=True)[1], variables), (load_encoder(tmp_path / "copy")[1], encoder)):
        jax.tree.map(np.testing.assert_array_equal, there, here)
    with pytest.raises(ValueError, match="is written with its vision encoder"):
        save_hf(tmp_path / "other", model, variables)


@pytest.mark.parametrize(
    ("of", "change", "message"),
    [
        ("post_layernorm.bias", lambda array: None, "post_layernorm.bias missing in .*: not a complete vision encoder"),
        ("q_proj.weight", lambda array: array.astype(np.int8), "q_proj.weight in .* is I8; expected one of"),
        ("position", lambda array: array[:-1], r"has shape \(15, 16\); this config.json asks for \(16, 16\)"),
    ],
)
def test_a_broken_encoder_is_named(of, change, message, tmp_path):
    tensors = load_file(FOLDER / "model.safetensors")
    changed = {name: change(array) if "vision_tower" in name and of in name else array for name, array in tensors.items()}
    copied_with({name: array for name, array in changed.items() if array is not None}, tmp_path)
    with pytest.raises(ValueError, match=message):
        load_encoder(tmp_path)
    load_hf(tmp_path, images=True)  # which reads nothing of it


def test_an_encoder_with_something_else_or_half_a_file_is_refused(tmp_path):
    tensors = load_file(FOLDER / "model.safetensors")
    copied_with(tensors | {"vision_tower.head.probe": np.zeros(3, np.float32)}, tmp_path)
    with pytest.raises(ValueError, match="vision_tower.head.probe in .*: no such tensor in a vision encoder"):
        load_encoder(tmp_path)
    content = (FOLDER / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(Unreadable, match="is not a complete safetensors file"):
        load_encoder(tmp_path)


def copied_with(tensors, folder):
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((FOLDER / "config.json").read_bytes())


@pytest.mark.parity
def test_transformers_opens_what_was_exported(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, variables, expected = golden()
    save_hf(tmp_path / "copy", model, variables, others=encoder_in_hf_form(*load_encoder(FOLDER)))
    theirs, told = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path / "copy", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.tensor(expected["input_ids"]).long()
    pixels = torch.tensor(expected["pixels"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = theirs(tokens, pixel_values=pixels, token_type_ids=(tokens == IMAGE).long()).logits
    np.testing.assert_allclose(logits.numpy(), expected["logits"], atol=1e-5)


def test_new_weights_have_the_shapes_of_a_folder():
    config, encoder = load_encoder(FOLDER)
    new = jax.jit(init_encoder, static_argnums=1)(jax.random.key(0), config)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, encoder) == jax.tree.map(jnp.shape, encoder_shapes(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_tokens_per_image": 3}, "mm_tokens_per_image = 3 is not the square of a divisor of the 4 patches along a side"),
        ({"mm_tokens_per_image": 16}, "a sliding window of 7 positions is smaller than the 16 tokens"),
        ({"vision_config": {"hidden_act": "swiglu"}}, "hidden_act"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    hf = golden()[0].config.hf
    with pytest.raises(ValueError, match=message):
        decoder_config({**hf, **changes}, images=True)
    assert vision_settings(hf).tokens == TOKENS
