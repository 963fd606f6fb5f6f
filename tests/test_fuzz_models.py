"""Damaged and hostile folders of models and tokenizers are read as what they say, or refused by file, field and cause."""

import itertools
import json
import math
import re
import resource
import shutil
import signal

import numpy as np
import pytest
from conftest import GOLDEN
from mutate import mutants, mutations, outcome, time_limit
from safetensors.numpy import save_file
from test_models import CASES
from tokenizers import Regex, Tokenizer, pre_tokenizers

from dpo_jax.cli.build import naming_option
from dpo_jax.cli.config import ConfigError
from dpo_jax.cli.exit_codes import exit_code
from dpo_jax.data.chat import chat_preference
from dpo_jax.data.display import chat_turns
from dpo_jax.data.pairs import BadRow, DataReport, Preference, PreferenceSet
from dpo_jax.data.prepare import encode_all
from dpo_jax.data.rendering import Refused, render
from dpo_jax.data.template import template_parts
from dpo_jax.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_of
from dpo_jax.models.config import DecoderConfig
from dpo_jax.models.families import decoder_config
from dpo_jax.models.folder import read_config
from dpo_jax.models.generation import GENERATION, end_tokens
from dpo_jax.models.origin import License, model_origin
from dpo_jax.models.tensors import contents
from dpo_jax.models.weights import Checkpoint
from dpo_jax.untrusted import LIMITS, Unreadable

MODELS = GOLDEN / "models"


@pytest.fixture
def limits():
    before = dict(vars(LIMITS))
    yield LIMITS
    vars(LIMITS).update(before)


# config.json

MEANS = {
    "vocab_size": ("vocab_size",),
    "width": ("hidden_size", "n_embd"),
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "head_size": ("head_dim",),
    "mlp_width": ("intermediate_size", "n_inner"),
    "max_positions": ("max_position_embeddings", "n_positions"),
    "norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"),
    "init_std": ("initializer_range",),
    "tied": ("tie_word_embeddings",),
    "attention_softcap": ("attn_logit_softcapping",),
    "logit_softcap": ("final_logit_softcapping",),
}
UNREAD = {
    **{family: {"kv_heads", "head_size"} for family in ("gpt_neox", "gpt2", "gptj")},
    "phi3": {"max_positions"},  # LongRoPE's positions are those of shorter texts
    "qwen3_moe": {"mlp_width"},  # intermediate_size is that of layers without experts
}
NO_CAPS = {"attention_softcap", "logit_softcap"}
CONFIGS = {case: json.loads((MODELS / case / "config.json").read_text()) for case in CASES}
CONFIGS["llama"] |= {
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "rope_parameters": None,
}


def check_meaning(content, config):
    """What was accepted is what stands in the file, of the type that it must have."""
    unread = UNREAD.get(config.family, set()) | (set() if config.family.startswith("gemma") else NO_CAPS)
    for field, keys in MEANS.items():
        for key in keys:
            if field not in unread and content.get(key) is not None:
                found = getattr(config, field)
                assert (found, isinstance(found, bool)) == (content[key], isinstance(content[key], bool)), key
    assert len(config.ropes) in (0, config.layers)
    assert len(config.windows) in (0, config.layers)
    assert math.isfinite(config.attention_scale)
    assert config.attention_scale > 0
    for rope in set(config.ropes):
        assert 0 < rope.size <= config.head_size
        assert rope.factor > 0
        assert np.isfinite(rope.frequencies()).all()


def read(work, folder, names):
    """What a command makes of `work`, which reads something in `folder`: its result, or its error, which `names` the file."""

    def named():
        with naming_option("model.path", str(folder)):
            return work()

    return outcome(named, names=names)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_means_what_it_says_or_is_refused(case, tmp_path):
    file, accepted, refused = tmp_path / "config.json", 0, 0
    for mutant in mutations(json.dumps(CONFIGS[case]).encode(), count=mutants(60)):
        file.write_bytes(mutant)
        found = read(lambda: decoder_config(read_config(tmp_path), where=file), tmp_path, "config.json")
        refused += isinstance(found, Unreadable | ConfigError)
        if isinstance(found, DecoderConfig):
            check_meaning(json.loads(mutant), found)
            accepted += 1
    assert accepted > 5
    assert refused > 15


@pytest.mark.parametrize(
    ("case", "changes", "told"),
    [
        ("llama", {"num_hidden_layers": 10**9}, r"1,000,000,000 layers .*--limits.layers"),
        (
            "llama",
            {"vocab_size": 2**31 - 1, "hidden_size": 2**30, "head_dim": 8},
            r"[\d,]+ billion parameters; .*--limits.model-b",
        ),
        ("llama", {"vocab_size": 10**399}, "vocab_size = 1000+... is not a positive integer of at most 2,147,483,647"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads = 0 is not a positive integer"),
        ("llama", {"num_key_value_heads": True}, "num_key_value_heads = true is not a positive integer"),
        ("llama", {"tie_word_embeddings": "false"}, 'tie_word_embeddings = "false" is not true or false'),
        ("llama", {"rms_norm_eps": 1e308}, r"rms_norm_eps = 1e\+308 is not a number above 0"),
        ("llama", {"model_type": ["llama"]}, r'model_type = \["llama"\] is not a string'),
        ("llama", {"hidden_act": {}}, "hidden_act = {} is not a string"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling: factor = 0 is not a number above 0"),
        ("llama", {"rope_scaling": [1]}, r"rope_scaling = \[1\] is not an object"),
        ("llama", {"rope_scaling": {"type": 3}}, "rope_scaling: type = 3 is not a string"),
        ("llama", {"rope_theta": None, "rope_parameters": None}, "rope_theta = null is not a number above 0"),
        (
            "llama",
            {"rope_scaling": CONFIGS["llama"]["rope_scaling"] | {"high_freq_factor": 1.0}},
            "rope_scaling: high_freq_factor = 1.0 is not above low_freq_factor = 1",
        ),
        ("gptj", {"rotary_dim": 64}, "rotary_dim = 64 is not at most the size of a head, 8"),
        ("gpt_neox", {"rotary_pct": 2, "rope_parameters": None}, "rotary_pct = 2 is not a number above 0 and at most 1"),
        ("gemma2", {"layer_types": [{}]}, r"layer_types = \[\{\}\] is not an array of texts"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0 is not a number above 0"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping = -1.0 is not a number above 0"),
    ],
)
def test_a_wrong_value_is_told_with_file_field_value_and_what_is_right(case, changes, told):
    content = CONFIGS[case] | changes
    with pytest.raises(Unreadable, match=f"^m/config.json: ?{told}") as caught, time_limit():
        decoder_config(content, where="m/config.json")
    assert exit_code(caught.value) == 74


def test_a_limit_can_be_raised(limits):
    content = CONFIGS["llama"] | {"num_hidden_layers": 1001}
    with pytest.raises(Unreadable):
        decoder_config(content)
    limits.layers = 1001
    assert decoder_config(content).layers == 1001


# generation_config.json, adapters, model cards


def test_sampling_settings_mean_what_they_say_or_are_refused(tmp_path):
    good = json.dumps({"eos_token_id": [1, 106], "temperature": 0.7, "pad_token_id": 0}).encode()
    refused = 0
    for mutant in mutations(good, count=mutants(100)):
        (tmp_path / GENERATION).write_bytes(mutant)
        found = read(lambda: end_tokens(tmp_path, {"eos_token_id": 5}), tmp_path, GENERATION)
        refused += isinstance(found, Unreadable)
        if isinstance(found, list):
            ids = json.loads(mutant).get("eos_token_id")
            assert found == sorted({5, *(ids if isinstance(ids, list) else [] if ids is None else [ids])})
    assert refused > 20


def test_an_adapter_is_told_as_what_it_is(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}))
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "adapter_model.safetensors")
    told = r"holds an adapter \(LoRA: adapter_config.json\), not a model; merge it into its base model 'org/base'"
    with pytest.raises(FileNotFoundError, match=told):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=told):
        Checkpoint(tmp_path, contents(decoder_config(CONFIGS["llama"])))
    (tmp_path / "adapter_config.json").write_bytes(b"\xff")
    with pytest.raises(FileNotFoundError, match="merge it into its base model "):
        load_tokenizer(tmp_path)


def test_a_model_card_is_read_or_left_alone(tmp_path):
    card = "---\nlicense: other\nlicense_name: gemma\nbase_model: org/base\n---\n# A model\n"
    (tmp_path / "README.md").write_text(card)
    assert model_origin(str(tmp_path)) == ("org/base", License("other", "gemma"))
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "x" * 3000 + "/x"}))
    for mutant in mutations(card.encode(), count=mutants(100)):
        (tmp_path / "README.md").write_bytes(mutant)
        found = outcome(lambda: model_origin(str(tmp_path)))
        for text in (found.hub_id, *(found.license or ())):
            assert text is None or (text.isprintable() and text.encode() in mutant)


# Tokenizers


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a tokenizer that has a padding token, an extra one and a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(["say hello to the world, say it again"], vocab_size=270)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    special = {"eos_token": "<|endoftext|>", "pad_token": {"content": "<pad>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_is_that_of_its_files_or_refused(name, small, tmp_path):
    folder = tmp_path / "t"
    shutil.copytree(small, folder)
    text, good, refused = "Hello, say <pad> it<|im_start|>", (folder / name).read_bytes(), 0
    for mutant in mutations(good, count=mutants(80)):
        (folder / name).write_bytes(mutant)
        found = read(lambda: load_tokenizer(folder), folder, str(folder))
        refused += isinstance(found, Unreadable | ConfigError)
        if isinstance(found, Exception):
            continue
        assert found.eos_token is None or found.convert_ids_to_tokens(found.eos_token_id) == found.eos_token
        assert isinstance(found.decode(found(text)["input_ids"]), str)
        if name == "tokenizer.json":
            plain = Tokenizer.from_str(mutant.decode())
            plain.no_padding()
            plain.no_truncation()
            assert found(text, add_special_tokens=False)["input_ids"] == plain.encode(text, add_special_tokens=False).ids
    assert refused > 15


def test_a_check_without_transformers_finds_a_damaged_tokenizer(small, tmp_path):
    good = (small / "tokenizer.json").read_bytes()
    for mutant in mutations(good, count=mutants(100)):
        (tmp_path / "tokenizer.json").write_bytes(mutant)
        found = outcome(lambda: vocabulary_of(tmp_path), names="tokenizer.json")
        if isinstance(found, dict):
            assert found == Tokenizer.from_str(mutant.decode()).get_vocab()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),  # a panic in Rust
        ("tokenizer.json", {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}}),  # when it encodes
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"eos_token": ["<|endoftext|>"]}),
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", {"chat_template": []}),
        ("tokenizer_config.json", {"notes": "\ud800"}),
        ("tokenizer_config.json", {"tokenizer_class": {}}),
        ("special_tokens_map.json", {"pad_token": 3}),
    ],
)
def test_wrong_types_in_a_tokenizer_are_one_error(file, change, small, tmp_path):
    folder = tmp_path / "t"
    shutil.copytree(small, folder)
    for other in {"chat_template.jinja", "special_tokens_map.json"} - {file}:
        (folder / other).unlink(missing_ok=True)
    content = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(content))
    found = read(lambda: load_tokenizer(folder), folder, str(folder))
    assert isinstance(found, Unreadable)
    assert exit_code(found) == 74


LONGER = {"type": "Replace", "pattern": {"String": "l"}, "content": "l" * 12}
SLOW = {"type": "Split", "pattern": {"Regex": "(?:a|a){16}[bc]"}, "behavior": "Isolated", "invert": False}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [LONGER] * 12}}, "normalizer: .*--limits.growth"),
        ({"decoder": {"type": "Sequence", "decoders": [LONGER] * 12}}, "decoder: .*--limits.growth"),
        ({"normalizer": {"type": "Prepend", "prepend": "l" * 200}}, "normalizer: makes a text up to 201 times as long"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": True}] * 24}},
            "pre_tokenizer: makes a text up to 16,777,216 times as long; the limit is 100 .raise it with --limits.growth",
        ),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [SEQUENCE] * 500, "pair": [], "special_tokens": {}}},
            "post_processor: makes a text up to 500 times",
        ),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}},
            "normalizer: 1,000 steps, but the limit is 100",
        ),
        ({"pre_tokenizer": SLOW}, "regular expressions .*take too long; .*--limits.pattern-s"),
        ({"pre_tokenizer": SLOW | {"pattern": {"Regex": "(?:a|a){40}[bc]"}}}, "need too many steps for 10,000 characters"),
        ({"decoder": {"type": "Strip", "content": "l", "start": 0, "stop": 9}}, "out of"),
    ],
)
def test_steps_of_a_tokenizer_that_do_not_end_are_told_before_they_run(change, told, small, tmp_path, limits):
    folder = tmp_path / "t"
    shutil.copytree(small, folder)
    limits.pattern_s = 1 if "too long" in told else 60  # which of two reasons comes first is no matter of load
    content = json.loads((folder / "tokenizer.json").read_text()) | change
    (folder / "tokenizer.json").write_text(json.dumps(content))
    found = read(lambda: load_tokenizer(folder), folder, str(folder))
    assert isinstance(found, Unreadable)
    assert re.search(told, str(found)), str(found)


def test_steps_of_public_tokenizers_are_allowed(small, tmp_path):
    """Those of Llama 2 and 3, Gemma, T5 and CLIP, in effect."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    words += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [{"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}, bytes_of]
    content = json.loads((small / "tokenizer.json").read_text())
    for change in (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, spaces]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": splits}},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
        assert "<pad>" in vocabulary_of(tmp_path)


def test_a_text_that_a_tokenizer_cannot_encode_is_told(small):
    """A regular expression whose steps grow with the text may pass the trial."""
    tokenizer = load_tokenizer(small)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?:a|a){40}[bc]"), "isolated")
    pairs = PreferenceSet([Preference("p", "a" * 100, "r", "1")], DataReport("s", "train", "trl", read=1, kept=1, rows=1))
    found = outcome(lambda: encode_all(pairs, tokenizer, max_length=64, max_prompt_length=32))
    assert isinstance(found, Unreadable)
    assert "the tokenizer: " in str(found)


def test_a_tokenizer_with_code_of_its_own_is_sound_and_refused(small, tmp_path):
    folder = tmp_path / "t"
    shutil.copytree(small, folder)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    content |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    found = read(lambda: load_tokenizer(folder), folder, str(folder))
    assert isinstance(found, ConfigError)
    assert exit_code(found) == 2


def test_a_tokenizer_file_too_large_is_not_read(small, tmp_path, limits):
    folder = tmp_path / "t"
    shutil.copytree(small, folder)
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(2**31)
    with pytest.raises(Unreadable, match=r"tokenizer.json: 2,147,483,648 bytes; .*--limits.file-mb"), time_limit():
        load_tokenizer(folder)


# Chat templates

ASKED = [{"role": "user", "content": "Hi"}]
ANSWERED = [{"role": "assistant", "content": "Yes."}], [{"role": "assistant", "content": "No."}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LARGE = {
    "repeated": "{{ 'x' * 9000000000 }}",
    "padded": "{{ 'x'.ljust(9000000000) }}",
    "doubled": "{% set n = namespace(x='xx') %}{% for a in range(90) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "joined": "{{ (['x' * 300000] * 300000) | join }}",
}


def with_template(template):
    tokenizer = train_tokenizer(["a"], vocab_size=257)
    tokenizer.chat_template, tokenizer.name_or_path = template, "runs/x"
    return tokenizer


@pytest.mark.parametrize("template", [ENDLESS, "{{ 9 ** (9 ** 9) }}"], ids=["loops", "power"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the time may be over within a finalizer
def test_a_template_that_does_not_end_is_ended(template, limits):
    limits.template_s = 0.2
    tokenizer, before = with_template(template), resource.getrlimit(resource.RLIMIT_AS)
    told = r"^chat template of runs/x: did not end; the limit is 0.2 s \(raise it with --limits.template-s\)"
    for work in (
        lambda: render(tokenizer, ASKED),
        lambda: chat_preference(ASKED, *ANSWERED, uid="a:1", tokenizer=tokenizer),
        lambda: template_parts(tokenizer),
        lambda: chat_turns("x", tokenizer),
    ):
        with pytest.raises(Unreadable, match=told) as caught, time_limit():
            work()
        assert exit_code(caught.value) == 74
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("name", LARGE)
def test_a_template_that_wants_gigabytes_is_ended(name, limits):
    limits.template_mb, limits.template_s = 64, 60
    tokenizer, before = with_template(LARGE[name]), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(Unreadable, match="^chat template of runs/x: too much memory; .*--limits.template-mb"), time_limit():
        render(tokenizer, ASKED)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deep"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ raise_exception('not these') }}", "TemplateError: not these"),
        ("", "writes no text"),
        ({"other": "x"}, "multiple chat templates with no default"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_a_template_may_raise_anything_and_is_named(template, told):
    tokenizer = with_template(template)
    with pytest.raises(Refused, match=f"^chat template of runs/x: .*{told}"):
        render(tokenizer, ASKED)
    with pytest.raises(BadRow, match=f"the template refuses these messages: chat template of runs/x: .*{told}"):
        chat_preference(ASKED, *ANSWERED, uid="a:1", tokenizer=tokenizer)
    assert chat_turns("x", tokenizer) is None
    assert template_parts(tokenizer).generation_prompt is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the time may be over within a finalizer
def test_damaged_templates_render_as_themselves_or_are_refused(limits):
    limits.template_s = 1  # Jinja takes exponential time to compile a chain of filters
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    tokenizer, refused, rendered = with_template(template), 0, 0
    for mutant in mutations(template.encode(), count=mutants(100)):
        tokenizer.chat_template = mutant.decode(errors="replace")
        try:
            assert render(tokenizer, ASKED) == tokenizer.apply_chat_template(ASKED, tokenize=False)
            rendered += tokenizer.chat_template != template
        except (Refused, Unreadable):
            refused += 1
    assert refused > 20
    assert rendered > 5


def test_timers_of_others_ring_and_are_not_ours():
    tokenizer, rung = with_template("{{ messages[0].content }}"), []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        tries = itertools.takewhile(lambda _: len(rung) < 20, range(10**6))
        assert all(render(tokenizer, ASKED) == "Hi" for _ in tries)
        assert len(rung) >= 20
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
