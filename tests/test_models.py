"""The decoder against Hugging Face's logits, against itself with a cache, and its settings one by one."""

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file

from dpo_jax.cli.config.model import Family
from dpo_jax.data.encode import Encoded
from dpo_jax.data.layout import packed_rows, plain_rows, shared_rows
from dpo_jax.logps import completion_logps
from dpo_jax.losses import dpo_loss
from dpo_jax.models import decoder
from dpo_jax.models.attention import Rope, Scoring, VisibleKeys, attend, rotate
from dpo_jax.models.decoder import _round_kernels, make_model
from dpo_jax.models.families import FAMILIES, decoder_config, hf_config
from dpo_jax.models.hf import load_config, load_hf
from dpo_jax.models.layers import Norm
from dpo_jax.training.fingerprint import architecture
from dpo_jax.types import Rows

CASES = sorted(folder.name for folder in (GOLDEN / "models").iterdir())


def text_rows(tokens, *, start=0):
    """Rows of plain text whose first `start[r]` columns are left padding."""
    tokens = np.asarray(tokens, np.int32)
    rows, length = tokens.shape
    column = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    start = np.broadcast_to(np.asarray(start, np.int32), rows)[:, None]
    none = np.zeros((rows, 1), np.int32)
    return Rows(
        tokens=tokens,
        positions=np.maximum(column - start, 0),
        k_start=np.where(column < start, column, start).astype(np.int32),
        k_end=column + 1,
        source=none,
        target=none,
        slot=none + 1,
        weight=np.ones(rows, np.float32),
        index=np.arange(rows, dtype=np.int32),
    )


@functools.cache
def golden(case):
    """(model, variables, tokens, logits) of a golden checkpoint."""
    folder = GOLDEN / "models" / case
    expected = load_file(folder / "logits.safetensors")
    return *load_hf(folder), expected["input_ids"], expected["logits"]


def logits_of(model, variables, rows):
    return jax.jit(lambda v, r: model.unembed(v, model.forward(v, r)))(variables, rows)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hugging_face(case):
    model, variables, tokens, expected = golden(case)
    logits = logits_of(model, variables, text_rows(tokens))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_logits_of_the_original_implementation(family):
    model, variables = load_hf(GOLDEN / family / "init")
    expected = load_file(GOLDEN / family / "logits.safetensors")
    logits = logits_of(model, variables, text_rows(expected["input_ids"]))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)


def test_all_fifteen_families_have_a_golden_checkpoint_and_an_option():
    assert {golden(case)[0].config.family for case in CASES} == set(FAMILIES)
    assert get_args(Family) == tuple(FAMILIES)
    readme = " ".join((GOLDEN.parent.parent / "README.md").read_text().split())
    assert all(family.title in readme for family in FAMILIES.values())
    assert len(FAMILIES) == 15


def test_settings_that_came_later_change_no_fingerprint():
    """A run that began before OLMo 2 continues. The digest is that of the version before."""
    assert architecture(golden("llama")[0]) == "4c3ecce18981f8b9"
    config = golden("olmo2")[0].config
    digests = {architecture(make_model(dataclasses.replace(config, pre_norms=on))) for on in (False, True)}
    assert len(digests) == 2


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
@pytest.mark.parametrize("case", CASES)
def test_prefill_and_single_tokens_equal_forward(case, apart):
    """Left-padded prompts of 9 and 4 tokens, then ten tokens each: past the sliding windows of 7."""
    model, variables, tokens, expected = golden(case)
    lengths, width, steps = [9, 4], 9, 10
    start = np.array([width - n for n in lengths], np.int32)
    prompts = np.stack(
        [np.concatenate([np.zeros(s, np.int32), row[:n]]) for row, n, s in zip(tokens, lengths, start, strict=True)]
    )
    cache = model.init_cache(2, width + steps + 2)
    weights, cache = model.by_layer(variables, cache) if apart else (variables, cache)
    decode = jax.jit(model.decode)
    hidden, cache = decode(weights, text_rows(prompts, start=start), cache)
    states = [hidden[:, -1:]]
    for i in range(steps):
        new = text_rows(np.array([[row[n + i]] for row, n in zip(tokens, lengths, strict=True)]))
        positions = np.array(lengths, np.int32)[:, None] + i
        end = np.full((2, 1), width + i + 1, np.int32)
        hidden, cache = decode(weights, new.replace(positions=positions, k_start=start[:, None], k_end=end), cache)
        states.append(hidden)
    assert int(cache["length"]) == width + steps
    logits = model.unembed(variables, jnp.concatenate(states, axis=1))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(logits[row], expected[row, n - 1 : n + steps], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_shared_and_packed_rows_equal_plain_rows(case):
    """Log-probabilities and gradients of a DPO loss; prompt plus completion reach beyond the sliding windows of 7."""
    model, variables, tokens, _ = golden(case)
    (first, second), pairs = tokens, []
    for prompt, chosen, rejected in ((first[:9], first[9:17], second[:5]), (second[5:8], second[8:10], first[:11])):
        pairs.append(Encoded(prompt=prompt, chosen=chosen, rejected=rejected))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiled 33 times, run once each
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(variables, rows):
        logps = completion_logps(model, variables, rows)
        losses, _ = dpo_loss(logps, jnp.zeros_like(logps), beta=0.1)
        return losses.mean(), logps

    (_, plain), plain_gradient = loss(variables, plain_rows(pairs, length=20))
    for rows in (shared_rows(pairs, length=24), packed_rows(pairs, length=48, pairs_per_row=2)):
        assert len(rows.tokens) == len(pairs) * 24 // rows.tokens.shape[1]  # packed: both in one row, the longer one first
        (_, logps), gradient = loss(variables, rows)
        np.testing.assert_allclose(logps, plain[rows.index], rtol=1e-6, atol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), gradient, plain_gradient)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("gpt2", {"activation": "gelu"}),
        ("gpt2", {"attention_scale": 1.0}),
        ("gptj", {"ropes": (Rope(10000.0, 4),) * 3}),
        ("gptj", {"ropes": (Rope(10000.0, 8, interleaved=True),) * 3}),
        ("gpt_neox", {"parallel_residual": False}),
        ("llama", {"ropes": (Rope(100.0, 8),) * 3}),
        ("llama", {"norm_eps": 0.1}),
        ("mistral", {"windows": ()}),
        ("mistral", {"windows": (8, 8, 8)}),
        ("qwen2", {"windows": (7, 7, 7)}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma2", {"embedding_scale": 1.0}),
        ("gemma2", {"norm": "rms"}),
        ("gemma3_text", {"windows": (7,) * 6}),
        ("gemma3_text", {"ropes": (Rope(50.0, 12),) * 6}),
        ("gemma3_text", {"ropes": (Rope(50.0, 12),) * 5 + (Rope(1000.0, 12),)}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_every_setting_changes_the_result(case, change):
    model, variables, tokens, expected = golden(case)
    other = make_model(dataclasses.replace(model.config, **change))
    logits = logits_of(other, variables, text_rows(tokens))
    assert np.abs(logits - expected).max() > 1e-4  # ten times what the golden logits allow


def test_attend_equals_a_loop_over_queries():
    random = np.random.default_rng(0)
    rows, length, keys, heads, kv_heads, size = 2, 5, 7, 4, 2, 3
    q = random.normal(size=(rows, length, heads, size)).astype(np.float32)
    k, v = random.normal(size=(2, rows, keys, kv_heads, size)).astype(np.float32)
    k_start = random.integers(0, 3, (rows, length), dtype=np.int32)
    k_end = random.integers(4, keys + 1, (rows, length), dtype=np.int32)
    q_positions = random.integers(0, 8, (rows, length), dtype=np.int32)
    k_positions = random.integers(0, 8, (rows, keys), dtype=np.int32)
    # The first visible key of every query is within the window.
    k_positions[:, 3] = 8
    out = attend(
        *(jnp.asarray(a) for a in (q, k, v)),
        VisibleKeys(k_start, k_end, q_positions, k_positions, window=3),
        Scoring(0.7, softcap=1.3),
    )
    for r, i, n in np.ndindex(rows, length, heads):
        seen = [t for t in range(k_start[r, i], k_end[r, i]) if q_positions[r, i] - k_positions[r, t] < 3]
        scores = 1.3 * np.tanh(0.7 * k[r, seen, n // 2] @ q[r, i, n] / 1.3)
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(out[r, i, n], weights @ v[r, seen, n // 2], atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_products_depend_on_distance_only(interleaved):
    rope = Rope(100.0, 4, interleaved=interleaved)
    random = np.random.default_rng(0)
    q, k = jnp.asarray(random.normal(size=(2, 1, 1, 1, 6)).astype(np.float32))

    def product(q_position, k_position):
        turned = [
            rotate(x, *rope.angles(np.array([[p]], np.int32)), interleaved=interleaved)
            for x, p in ((q, q_position), (k, k_position))
        ]
        return float(jnp.vdot(*turned))

    assert product(3, 1) == pytest.approx(product(12, 10), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-3)
    assert product(0, 0) == pytest.approx(float(jnp.vdot(q, k)), abs=1e-6)


def test_remat_gives_the_same_gradient_in_less_memory():
    model, variables, tokens, _ = golden("gemma3_text")
    rows = text_rows(np.tile(tokens[:1], (8, 1)))
    gradients, held = [], []
    for remat in ("none", "save_attention", "full"):
        again = make_model(model.config, remat=remat)
        loss = functools.partial(lambda v, model: jnp.square(model.forward(v, rows)).mean(), model=again)
        compiled = jax.jit(jax.grad(loss)).lower(variables).compile()
        gradients.append(compiled(variables))
        held.append(compiled.memory_analysis().temp_size_in_bytes)
    for other in gradients[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients[0], other)
    assert held[0] > held[1] > held[2]
    with pytest.raises(ValueError, match="remat"):
        make_model(model.config, remat="some")


def stacks_converted(function, *arguments, dtype=jnp.bfloat16):
    """How many stacks of matrices [layers, A, B] a function converts to `dtype`, not counting what its loops do."""
    equations = [one for one in jax.make_jaxpr(function)(*arguments).eqns if one.primitive.name == "convert_element_type"]
    return sum(one.outvars[0].aval.dtype == dtype and one.outvars[0].aval.ndim == 3 for one in equations)


@pytest.mark.parametrize("case", ["gpt_neox", "gemma3_text"])
def test_kernels_are_rounded_once_without_remat(case, monkeypatch):
    """In bfloat16: outside of the scan over layers, where otherwise each layer rounds its own. The gradients are the same."""
    exact, variables, tokens, _ = golden(case)
    rows = text_rows(tokens)

    def gradient():
        model = make_model(exact.config, dtype=jnp.bfloat16)

        def total(variables):
            return (model.forward(variables, rows).astype(jnp.float32) ** 2).mean()

        return jax.jit(jax.grad(total))(variables)["params"], stacks_converted(total, variables)

    ours, rounded = gradient()
    monkeypatch.setattr(decoder, "_round_kernels", lambda variables, dtype: variables)
    expected, others = gradient()
    is_kernel = [path[-1].key == "kernel" for path, _ in jax.tree_util.tree_leaves_with_path(ours["layers"])]
    assert rounded - others == sum(is_kernel)
    for leaf, kernel in zip(jax.tree.leaves(ours["layers"]), is_kernel, strict=True):
        assert leaf.dtype == jnp.float32
        assert not kernel or np.array_equal(leaf, leaf.astype(jnp.bfloat16).astype(jnp.float32))
    # A CPU may multiply in float32 and spare itself the rounding of a gradient.
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(leaf - other) <= 0.004 * np.linalg.norm(other)


def test_parameters_of_the_compute_type_are_read_as_they_are():
    """Their gradients are then added to one sum; those of copies would be made beside it."""
    model, variables, _, _ = golden("llama")
    assert _round_kernels(variables, jnp.float32) is variables
    half = jax.tree_util.tree_leaves_with_path(_round_kernels(variables, jnp.bfloat16)["params"]["layers"])
    assert {(path[-1].key, leaf.dtype.name) for path, leaf in half} == {("kernel", "bfloat16"), ("scale", "float32")}


def test_bfloat16_compute_stays_close_and_keeps_float32_logits():
    model, variables, tokens, expected = golden("qwen3")
    logits = logits_of(make_model(model.config, dtype=jnp.bfloat16), variables, text_rows(tokens))
    assert logits.dtype == jnp.float32
    errors = np.abs(logits - expected)
    assert np.sqrt(np.square(errors).mean()) < 0.010
    assert errors.max() < 0.1


@pytest.mark.parametrize("kind", ["layer", "rms", "rms_plus_one"])
def test_a_norm_in_bfloat16_is_rounded_once(kind):
    """Half a unit in the last place off the result in float64: its statistics and its scale are not rounded before."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(1.0, 3.0, size=(2, 3, 4096)), jnp.bfloat16)
    weights = {name: random.normal(1.0, 0.3, 4096).astype(np.float32) for name in ("scale", "bias")[: 1 + (kind == "layer")]}
    found = jax.jit(Norm(kind, 1e-5).apply)({"params": weights}, x)
    assert found.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = exact - (exact.mean(-1, keepdims=True) if kind == "layer" else 0)
    exact = exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-5)
    exact = exact * (weights["scale"].astype(np.float64) + (kind == "rms_plus_one")) + weights.get("bias", 0)
    half = 2.0 ** (np.frexp(exact)[1] - 9)
    assert (np.abs(np.asarray(found, np.float64) - exact) - 1.001 * half).max() < 2e-6


def test_ids_and_positions_outside_their_tables_are_not_hidden():
    model, variables, tokens, _ = golden("gpt2")
    rows = text_rows(tokens[:, :4])
    wrong_id, wrong_position = rows.tokens.copy(), rows.positions.copy()
    wrong_id[0, 2] = model.config.vocab_size
    wrong_position[0, 2] = model.config.max_positions
    forward = jax.jit(model.forward)
    for changed in (rows.replace(tokens=wrong_id), rows.replace(positions=wrong_position)):
        assert jnp.isnan(forward(variables, changed)[0, 2]).all()
        assert jnp.isfinite(forward(variables, changed)[1]).all()


def test_cache_too_small_for_the_prompt():
    model, variables, tokens, _ = golden("gpt2")
    with pytest.raises(ValueError, match="24 tokens do not fit a cache of 8 columns"):
        model.decode(variables, text_rows(tokens), model.init_cache(2, 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_new_models(family):
    """A configuration for a new model is complete, and each parameter axis has a logical name."""
    hf = hf_config(family, vocab_size=50, width=16, layers=2, heads=2, max_positions=16, eos_token_id=0)
    model = make_model(decoder_config(hf))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    axes = model.axes()
    assert jax.tree.structure(shapes) == jax.tree.structure(axes)
    jax.tree.map(lambda shape, spec: None if len(spec) == shape.ndim else pytest.fail(f"{shape} {spec}"), shapes, axes)
    assert model.config.hf == hf
    assert ("head_kernel" in shapes["params"]) == (not hf["tie_word_embeddings"])


def test_models_of_equal_configuration_share_what_makes_their_variables():
    """JAX remembers what it traced by function, and a command makes its model many times."""
    config = golden("gemma3_text")[0].config
    first, second = make_model(config), make_model(dataclasses.replace(config), dtype=jnp.bfloat16, remat="full")
    assert (first.init, first.axes) == (second.init, second.axes)
    assert make_model(dataclasses.replace(config, init_std=0.5)).init is not first.init


def test_the_weights_of_a_seed_are_those_of_earlier_versions():
    """How Flax traces the layers decides their random keys: a run from scratch must not depend on that."""
    sizes = {"vocab_size": 64, "width": 64, "layers": 2, "heads": 8, "max_positions": 64, "eos_token_id": 0}
    model = make_model(decoder_config(hf_config("llama", kv_heads=4, **sizes)))
    params = jax.jit(model.init)(jax.random.key(0))["params"]
    layers = params["layers"]
    for found, expected in (
        (layers["attention"]["query"]["kernel"][1, 0], (0.02548288, -0.01422533, -0.02719252)),
        (layers["mlp"]["down"]["kernel"][0, 0], (-0.0047015, 0.00458104, -0.00520991)),
        (params["token_embedding"][0], (0.00152285, -0.03231492, -0.03371545)),
    ):
        np.testing.assert_allclose(found[:3], expected, rtol=1e-5)


def test_initial_predictions_are_nearly_uniform():
    hf = hf_config("gpt_neox", vocab_size=50, width=16, layers=2, heads=2, max_positions=16, eos_token_id=0)
    model = make_model(decoder_config(hf))
    variables = jax.jit(model.init)(jax.random.key(0))
    logps = jax.nn.log_softmax(logits_of(model, variables, text_rows([[1, 2, 3]])))
    np.testing.assert_allclose(logps, -np.log(50), atol=0.5)


PYTHIA_28 = {
    "model_type": "gpt_neox",
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 10240,
    "max_position_embeddings": 2048,
    "vocab_size": 50304,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
}
GPTJ_6B = {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048, "vocab_size": 50400}
GPT2_LARGE = {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20, "n_positions": 1024, "vocab_size": 50257}


@pytest.mark.parametrize(
    ("hf", "parameters"),
    [(PYTHIA_28, 2_775_208_960), (GPTJ_6B | {"rotary_dim": 64}, 6_050_882_784), (GPT2_LARGE, 774_030_080)],
    ids=["pythia-2.8b", "gpt-j-6b", "gpt2-large"],
)
def test_parameter_counts_of_published_models(hf, parameters):
    shapes = jax.eval_shape(make_model(decoder_config(hf)).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


GEMMA3_4B = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "vision_config": {"hidden_size": 1152},
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}


def test_sparse_multimodal_gemma3_config():
    """The published configuration leaves most keys to the defaults of transformers."""
    config = decoder_config(GEMMA3_4B)
    assert (config.heads, config.kv_heads, config.head_size, config.vocab_size, config.tied) == (8, 4, 256, 262208, True)
    assert config.windows[:7] == (1024,) * 5 + (None, 1024)
    assert config.ropes[0] == Rope(1e4, 256)
    assert config.ropes[5] == Rope(1e6, 256, scaling="linear", factor=8.0, original_max_positions=131072)
    assert config.hf["eos_token_id"] == [1, 106]
    assert config.family == "gemma3_text"


def test_rotary_settings_of_transformers_4_and_5_mean_the_same():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    common = sizes | {"model_type": "llama", "vocab_size": 9, "max_position_embeddings": 16}
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
    old = common | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = common | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    assert decoder_config(old).ropes == decoder_config(new).ropes
    assert decoder_config(old).ropes[0].scaling == "llama3"


def test_positions_of_longer_texts_than_the_decoder_knows_are_not_read():
    phi = load_config(GOLDEN / "models" / "phi3")
    assert (phi["max_position_embeddings"], decoder_config(phi).max_positions) == (64, 32)
    assert decoder_config(phi | {"sliding_window": 32}).windows == ()
    dynamic = phi | {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}}
    default = phi | {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert decoder_config(dynamic).ropes == decoder_config(default).ropes


def test_the_first_names_of_long_rope_in_phi():
    """transformers reads su and yarn in a Phi-3 as longrope."""
    phi = load_config(GOLDEN / "models" / "phi3")
    key = "rope_scaling" if phi.get("rope_scaling") else "rope_parameters"
    for name in ("su", "yarn"):
        older = {k: v for k, v in phi[key].items() if k != "rope_type"} | {"type": name}
        found, same = decoder_config(phi | {key: older}), decoder_config(phi)
        assert (found.ropes, found.max_positions) == (same.ropes, same.max_positions)


def test_every_layer_of_a_qwen3_mixture_has_the_window():
    """In transformers, `max_window_layers` and `layer_types` count in the dense model only."""
    mixture, dense = (load_config(GOLDEN / "models" / name) for name in ("qwen3_moe", "qwen3"))
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28, "layer_types": None}
    assert set(decoder_config(mixture | window).windows) == {8}
    assert set(decoder_config(dense | window).windows) <= {None}
    assert not decoder_config(mixture | window | {"use_sliding_window": False}).windows


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"model_type": "bert"}, 'model_type "bert" is not supported; supported: gpt2, gptj'),
        (GPT2_LARGE | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true is not supported"),
        (GPT2_LARGE | {"activation_function": "quick_gelu"}, 'activation_function = "quick_gelu" is not supported'),
        (GPT2_LARGE | {"n_embd": 1281}, "width 1281 is not a multiple of the 20 attention heads"),
        (GPT2_LARGE | {"n_embd": "wide"}, 'n_embd = "wide" is not a positive integer'),
        ({k: v for k, v in GPT2_LARGE.items() if k != "vocab_size"}, "vocab_size is missing"),
        (PYTHIA_28 | {"rope_scaling": {"rope_type": "xpos", "factor": 2.0}}, 'rope_type = "xpos" is not supported'),
        (
            PYTHIA_28 | {"rope_scaling": {"rope_type": "linear"}},
            "config.json: rope_scaling: factor is missing",
        ),
        (PYTHIA_28 | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (PYTHIA_28 | {"layer_norm_eps": "small"}, 'layer_norm_eps = "small" is not a number'),
        (PYTHIA_28 | {"model_type": "llama", "num_key_value_heads": 5}, "32 heads are not a multiple of 5 key/value heads"),
        (PYTHIA_28 | {"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types"),
        (PYTHIA_28 | {"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (
            PYTHIA_28 | {"model_type": "mistral", "num_attention_heads": 24},
            "width 2560 is not a multiple of the 24 attention heads",
        ),
        ({"model_type": "gemma3"}, "text_config is missing"),
    ],
)
def test_unsupported_configurations_are_refused_by_name(hf, message):
    with pytest.raises(ValueError, match=message):
        decoder_config(hf)


def test_new_models_refuse_sizes_the_family_has_no_setting_for():
    sizes = {"vocab_size": 9, "width": 16, "layers": 1, "heads": 2, "max_positions": 8, "eos_token_id": 0}
    with pytest.raises(ValueError, match="gpt2 has neither key/value heads"):
        hf_config("gpt2", kv_heads=1, **sizes)
    with pytest.raises(ValueError, match="family 'gpt5'"):
        hf_config("gpt5", **sizes)
    assert decoder_config(hf_config("qwen3", kv_heads=1, head_size=4, **sizes)).head_size == 4
