"""Reward models as folders: what is written is read again, and transformers scores texts with it as we do."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN
from safetensors.numpy import load_file, save_file

from dpo_jax.cli import build
from dpo_jax.cli.config import Config, ConfigError, DataConfig, ModelConfig
from dpo_jax.cli.rewards import learned_reward
from dpo_jax.data.layout import completion_rows
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer
from dpo_jax.lab.reward_model import save_reward_model
from dpo_jax.models.checkpoint_stream import assemble
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import FAMILIES, decoder_config, hf_config
from dpo_jax.models.hf import load_config, load_hf, read_weights, variable_shapes
from dpo_jax.models.scorer import read_head
from dpo_jax.reward_model import completion_rewards, with_scalar_head

SIZES = {"vocab_size": 520, "width": 32, "layers": 2, "heads": 4, "max_positions": 64, "eos_token_id": 0, "pad_token_id": 7}


def written(folder, family, *, pad=None, dtype=None, scale=1.0, **sizes):
    """A reward model of random weights in `folder`, and a function of (prompt ids, completion ids) that scores as it does."""
    model = make_model(decoder_config(hf_config(family, **SIZES | sizes)))
    kernel = scale * jax.random.normal(jax.random.key(1), (32,))
    variables = jax.device_get(
        {**jax.jit(model.init)(jax.random.key(0)), "head": {"kernel": kernel, "bias": jnp.float32(0.25)}}
    )
    save_reward_model(folder, model, variables, pad_token_id=pad, dtype=dtype)
    compiled = jax.jit(functools.partial(completion_rewards, with_scalar_head(model)))
    return lambda texts: np.asarray(compiled(variables, completion_rows(texts, length=48)))


TEXTS = [(np.arange(3, 3 + n, dtype=np.int32), np.arange(40, 40 + n + 2, dtype=np.int32)) for n in (2, 5, 9)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gpt_neox"])
def test_what_is_written_scores_alike_when_read(family, tmp_path):
    expected = written(tmp_path / "model", family)(TEXTS)
    hf = load_config(tmp_path / "model")
    model = make_model(decoder_config(hf))
    weights = assemble(variable_shapes(model), read_weights(tmp_path / "model", model), put=jnp.asarray)
    head = read_head(tmp_path / "model", hf, width=32)
    rows = completion_rows(TEXTS, length=48)
    found = jax.jit(functools.partial(completion_rewards, with_scalar_head(model)))({**weights, "head": head}, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert hf["architectures"] == [FAMILIES[family].architecture.replace("ForCausalLM", "").replace("LMHeadModel", "") + KIND]
    assert "head_kernel" not in weights["params"]


KIND = "ForSequenceClassification"


def test_a_reward_model_has_the_type_of_weights_that_is_asked_for(tmp_path):
    written(tmp_path / "model", "llama", dtype=jnp.bfloat16)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"bfloat16"}
    assert "score.weight" in stored
    assert load_config(tmp_path / "model")["dtype"] == "bfloat16"
    with pytest.raises(OverflowError, match=r"tensor score.weight: 32 values are too large for float16"):
        written(tmp_path / "half", "llama", dtype=jnp.float16, scale=1e9)


def test_a_reward_model_is_no_policy_and_a_policy_no_reward_model(tmp_path):
    written(tmp_path / "reward", "llama")
    with pytest.raises(ValueError, match=r"is a reward model or classifier \(LlamaForSequenceClassification\), not a language"):
        load_hf(tmp_path / "reward")
    config = Config(model=ModelConfig(path=str(tmp_path / "reward")))
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    with pytest.raises(ConfigError, match="model.path: .* is a reward model or classifier"):
        build.start_model(config, tokenizer)
    for name, message in (("init", "is not a reward model"), ("earlier", "was written by an earlier version")):
        folder = GOLDEN / "gpt_neox" / "init"
        if name == "earlier":
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text((folder / "config.json").read_text())
            (tmp_path / name / "reward_head.safetensors").write_bytes(b"")
            folder = tmp_path / name
        with pytest.raises(ConfigError, match=message):
            build.policy_model(config, str(folder), tokenizer, name="ppo.reward_model", scorer=True)


def test_a_published_reward_model_scores_prompts_of_its_own_template_only(tmp_path):
    """One that has no bias, keeps bfloat16, and whose tokenizer has another template than the policy's."""
    score = written(tmp_path / "reward", "gpt_neox")
    content = json.loads((tmp_path / "reward" / "config.json").read_text())
    del content["reward_bias"]
    (tmp_path / "reward" / "config.json").write_text(json.dumps(content))
    tensors = load_file(tmp_path / "reward" / "model.safetensors")
    save_file({name: x.astype(jnp.bfloat16) for name, x in tensors.items()}, tmp_path / "reward" / "model.safetensors")
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    save_tokenizer(tokenizer, tmp_path / "policy")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template = template + "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    save_tokenizer(tokenizer, tmp_path / "policy")
    tokenizer.chat_template = template + "<|im_start|>"
    save_tokenizer(tokenizer, tmp_path / "reward")
    config = Config(data=DataConfig(max_length=64, max_prompt_length=32))
    how = {"name": "ppo.reward_model", "batch": 2, "policy": str(tmp_path / "policy")}
    reward = learned_reward(config, str(tmp_path / "reward"), **how)
    prompt, completion = "The film was", " a delight."
    ids = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in (prompt, completion)]
    expected = score([(ids[0], np.append(ids[1], np.int32(tokenizer.eos_token_id)))])[0] - 0.25
    np.testing.assert_allclose(reward([prompt], [completion]), [expected], atol=0.05)
    with pytest.raises(ConfigError, match=r"ppo.reward_model: .* has another chat template than the policy"):
        reward(["<|im_start|>user: hi\n<|im_start|>assistant: "], ["yes"])


@pytest.mark.parity
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "olmoe"])  # of which transformers has none
def test_transformers_scores_as_we_do(family, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification

    score = written(tmp_path / "model", family, pad=7)
    options = {"output_loading_info": True, "torch_dtype": torch.float32}
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", **options)
    assert not {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}
    whole = [np.concatenate(text) for text in TEXTS]
    padded = np.stack([np.pad(ids, (0, 30 - len(ids)), constant_values=7) for ids in whole])
    with torch.inference_mode():
        mask = torch.tensor(np.arange(30)[None] < np.array([len(ids) for ids in whole])[:, None]).long()
        found = model.eval()(torch.tensor(padded, dtype=torch.long), attention_mask=mask).logits[:, 0].numpy()
    np.testing.assert_allclose(found + 0.25, score(TEXTS), rtol=1e-4, atol=1e-4)
