"""The program on preferences whose prompts show images: every command in order, a kill, devices, and what is refused."""

import dataclasses
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from conftest import GOLDEN
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_images import MARKS, TEMPLATE
from tiny_run import _compilation_cache as _compilation_cache
from tiny_run import _plots_once as _plots_once
from tiny_run import bytes_of, call, refused

from dpo_jax.cli.commands.sft import _targets
from dpo_jax.cli.config import load_config as configured
from dpo_jax.data.completion_files import read_completions
from dpo_jax.data.hash_split import is_held_out
from dpo_jax.data.image_prompts import ImageTokens, encode_images
from dpo_jax.data.pairs import DataError
from dpo_jax.data.prepare import encode_targets
from dpo_jax.data.repeats import find_overlap
from dpo_jax.data.segments import Completion
from dpo_jax.data.sources import load_preferences
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from dpo_jax.data.unpaired import mismatched, one_prompt
from dpo_jax.models.decoder import make_model
from dpo_jax.models.digest import weights_digest
from dpo_jax.models.encoder_folder import encoder_digest, encoder_in_hf_form, load_encoder
from dpo_jax.models.families import decoder_config
from dpo_jax.models.hf import load_config, load_hf, save_hf
from dpo_jax.runtime.metrics import is_evaluation, read_metrics

FOLDER = GOLDEN / "gemma3_images"
PROCESSOR = {"size": {"height": 16, "width": 16}, "image_seq_length": 4}
CONFIG = """\
run: {{dir: {dir}/run, save_every_steps: 2, eval_every_examples: 16}}
data: {{path: {dir}/data, max_length: 96, max_prompt_length: 64, layout: packed, on_bad: drop,
  max_dropped_share: 0.2}}
model: {{path: {dir}/base}}
sft: {{batch: 8, lr: 1.0e-3, optimizer: adamw, warmup_steps: 2}}
refs: {{batch: 8}}
dpo: {{batch: 8, epochs: 2, lr: 1.0e-3, warmup_steps: 2}}
eval: {{batch: 8, samples: 4, max_new_tokens: 4}}
sample: {{prompts: 3, max_new_tokens: 4, temperature: 0}}
"""
COLORS = ("red", "green", "blue", "gray")
TRAIN, TEST = 16, 6


def base_model(folder):
    """A tiny Gemma 3 with the golden encoder, and a vocabulary for the toy's tokenizer."""
    tokenizer = train_tokenizer(["What color is this? Red, green, blue or gray."], vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = TEMPLATE
    hf = json.loads((FOLDER / "config.json").read_text())
    start, soft, end = (tokenizer.convert_tokens_to_ids(MARKS[n]) for n in range(3))
    hf |= {"boi_token_index": start, "image_token_index": soft, "eoi_token_index": end}
    hf["text_config"] |= {"vocab_size": 296, "max_position_embeddings": 256}
    model = make_model(decoder_config(hf, images=True))
    variables = jax.jit(model.init)(jax.random.key(0))
    save_hf(folder, model, variables, others=encoder_in_hf_form(*load_encoder(FOLDER)))
    save_tokenizer(tokenizer, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


def picture(color, seed):
    values = np.random.default_rng(seed).integers(0, 60, (9, 12, 3), np.uint8)
    channel = COLORS.index(color)
    values[:, :, slice(channel, channel + 1) if channel < 3 else slice(None)] += 180
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def write_data(folder):
    """Rows that show an image or two, one without any, and one whose image is damaged."""
    folder.mkdir()
    for split, count, first in (("train", TRAIN, 0), ("test", TEST, 100)):
        rows = []
        for number in range(count):
            color, other = (COLORS[(number + shift) % 4] for shift in (0, 1))
            names = [f"{split}{number}-{one}.png" for one in range(2 if number == 1 else 1)]
            for one, name in enumerate(names):
                (folder / name).write_bytes(picture(color, first + number + 50 * one))
            places = [{"type": "image", "image": name} for name in names]
            if number == 2:
                places = []
            content = [part for place in places for part in (place, {"type": "text", "text": "What is this?"})]
            rows.append(
                {
                    "prompt": [{"role": "user", "content": content or "Which one?"}],
                    "chosen": [{"role": "assistant", "content": color}],
                    "rejected": [{"role": "assistant", "content": other}],
                }
            )
        (folder / "bad.png").write_bytes(picture("red", 0)[:60])
        rows.append({**rows[0], "prompt": [{"role": "user", "content": [{"type": "image", "image": "bad.png"}]}]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model, data and configuration, and what each command printed."""
    folder = tmp_path_factory.mktemp("images")
    base_model(folder / "base")
    write_data(folder / "data")
    (folder / "images.yaml").write_text(CONFIG.format(dir=folder))
    return folder


@pytest.fixture(scope="module")
def done(made):
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_jax.plotting.training_curves.plot_training", lambda rows, directory: directory.mkdir(exist_ok=True))
        for command in ("audit", "sft", "refs", "dpo", "eval", "sample", "export"):
            result = call(command, made / "images.yaml")
            assert result.code == 0, (command, result)
            printed[command] = result.out
    return made, printed


def last_evaluation(run):
    return [row for row in read_metrics(run / "metrics.jsonl") if is_evaluation(row)][-1]


def timeless(rows):
    return [{name: value for name, value in row.items() if not name.endswith("_per_second")} for row in rows]


def test_bad_images_and_what_reads_the_others_is_told(done):
    folder, printed = done
    assert "20 of 22 prompts show images: 4 tokens each, read by the vision encoder of" in printed["audit"]
    report = json.loads((folder / "run/audit/data_report.json").read_text())["train"]
    assert (report["read"], report["kept"], report["dropped"], report["images"]) == (17, 16, {"bad_image": 1}, 16)
    assert "features of 0 of 22 images are already cached; all take 5.5 KiB, 256 bytes each" in printed["sft"]
    assert "features of 22 of 22 images are already cached" in printed["dpo"]
    assert "21 of 21 pairs are already cached" in printed["dpo"]  # a text of the train split is held out, too
    assert json.loads((folder / "run/dpo/data_report.json").read_text())["test"]["dropped"] == {"bad_image": 1}


def test_a_run_starts_at_its_reference_and_moves_what_reads_images(done):
    folder, _ = done
    rows = read_metrics(folder / "run/dpo/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    before, after = (load_hf(folder / "run" / task / "export", images=True)[1]["params"] for task in ("sft", "dpo"))
    assert np.abs(before["image_kernel"] - after["image_kernel"]).max() > 1e-4
    assert json.loads((folder / "run/eval/report.json").read_text())["policy"]["loss"] == pytest.approx(
        last_evaluation(folder / "run/dpo")["eval/loss"], abs=1e-5
    )


def test_the_encoder_is_exported_as_it_was(done):
    folder, _ = done
    assert encoder_digest(folder / "base") == weights_digest(load_encoder(FOLDER)[1])
    for task in ("sft", "dpo"):
        export = folder / "run" / task / "export"
        assert encoder_digest(export) == encoder_digest(folder / "base")
        assert json.loads((export / "preprocessor_config.json").read_text()) == PROCESSOR
        assert load_config(export)["architectures"] == ["Gemma3ForConditionalGeneration"]
        assert "AutoModelForImageTextToText" in (export / "README.md").read_text()
        assert 'pipeline_tag: "image-text-to-text"' in (export / "README.md").read_text()


def test_the_report_knows_the_weights(done):
    folder, _ = done
    result = call("report", folder / "run")
    assert result.code == 0, result
    assert "as it is now: it was trained" not in (folder / "run/report/report.md").read_text()


def test_prompts_with_images_are_completed_and_shown(done):
    folder, printed = done
    lines = [json.loads(line) for line in printed["sample"].splitlines()]
    assert [len(line.get("images", ())) for line in lines] == [1, 2, 0]
    assert lines[1]["turns"] == [{"role": "user", "content": "[image]What is this?[image]What is this?"}]
    assert lines[0]["images"] == [str(folder / "data/test0-0.png")]
    sampled = [json.loads(line) for line in (folder / "run/eval/samples.jsonl").read_text().splitlines()]
    assert [one["prompt"] for one in sampled[:3]] == [line["prompt"] for line in lines]
    assert sampled[0]["images"] != sampled[3]["images"]
    assert sampled[0]["prompt"] == sampled[3]["prompt"]


def test_prompts_of_a_file_show_images(done, tmp_path):
    folder, printed = done
    (tmp_path / "one.png").write_bytes((folder / "data/test0-0.png").read_bytes())
    content = [{"type": "image", "image": "one.png"}, {"type": "text", "text": "What is this?"}]
    rows = [{"messages": [{"role": "user", "content": content}]}, {"prompt": "What is this?", "images": ["one.png"]}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = call("sample", folder / "images.yaml", "--sample.prompts-file", tmp_path / "asked.jsonl")
    assert (result.code, "2 of 2 prompts show images" in result.err) == (0, True), result
    known = json.loads(printed["sample"].splitlines()[0])
    for line in map(json.loads, result.out.splitlines()):
        assert line["completion"] == known["completion"]
        assert line["logp"] == pytest.approx(known["logp"], abs=1e-4)
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "What?", "images": ["none.png"]}))
    message = refused(2, "sample", folder / "images.yaml", "--sample.prompts-file", tmp_path / "asked.jsonl")
    assert "asked.jsonl:1: images.0: no_image: there is no file" in message


def interrupted(run):
    """The run as it was before its last save."""
    shutil.rmtree(run / "dpo" / "checkpoints" / "4")
    shutil.rmtree(run / "dpo" / "export")
    metrics = run / "dpo" / "metrics.jsonl"
    rows = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] < 2]
    metrics.write_text("".join(f"{line}\n" for line in rows))


@pytest.mark.parametrize("features", ["kept", "lost"])
def test_a_killed_run_ends_with_the_same_bits(done, tmp_path, features):
    folder, _ = done
    shutil.copytree(folder / "run", tmp_path / "run")
    interrupted(tmp_path / "run")
    if features == "lost":
        shutil.rmtree(tmp_path / "run" / "features")
    result = call("dpo", folder / "images.yaml", "--run.dir", tmp_path / "run", "--dpo.policy", folder / "run/sft/export")
    assert (result.code, "after 2 steps" in result.out) == (0, True), result
    assert bytes_of(tmp_path / "run/dpo/export") == bytes_of(folder / "run/dpo/export")
    ours, theirs = (timeless(read_metrics(run / "dpo" / "metrics.jsonl")) for run in (tmp_path / "run", folder / "run"))
    assert ours == theirs


def test_an_image_that_changes_is_other_data(done, tmp_path):
    folder, _ = done
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "data", tmp_path / "data")
    flags = ("--run.dir", tmp_path / "run", "--dpo.policy", folder / "run/sft/export", "--data.path", tmp_path / "data")
    assert call("dpo", folder / "images.yaml", *flags).code == 0
    (tmp_path / "data" / "train0-0.png").write_bytes(picture("gray", 77))
    message = refused(2, "dpo", folder / "images.yaml", *flags)
    assert "holds a run with other data:\n  images: was '" in message


WAYS = {
    "plain": ("--data.layout", "plain"),
    "shared": ("--data.layout", "shared"),
    "microbatches": ("--dpo.microbatches", 2),
    "pmap": ("--run.devices", "pmap"),
    "mesh": ("--run.devices", "mesh", "--mesh.fsdp", 2, "--mesh.tensor", 2, "--mesh.data", 1),
}


@pytest.mark.parametrize("way", WAYS)
def test_however_it_is_run_it_is_one_run(done, tmp_path, way):
    folder, _ = done
    result = call("dpo", folder / "images.yaml", "--run.dir", tmp_path, "--dpo.policy", folder / "run/sft/export", *WAYS[way])
    assert result.code == 0, result
    ours, theirs = (last_evaluation(run / "dpo") for run in (tmp_path, folder / "run"))
    for name in ("eval/loss", "eval/rewards/margins", "eval/displacement/chosen"):
        assert ours[name] == pytest.approx(theirs[name], abs=2e-4), name


@pytest.mark.parametrize("way", ["pmap", "mesh"])
def test_a_policy_is_measured_and_sampled_on_devices(done, tmp_path, way):
    folder, printed = done
    named = ("--eval.policy", folder / "run/dpo/export", "--dpo.policy", folder / "run/sft/export")
    result = call("eval", folder / "images.yaml", "--run.dir", tmp_path, *named, *WAYS[way])
    assert result.code == 0, result
    ours, theirs = (json.loads((run / "eval/report.json").read_text())["policy"] for run in (tmp_path, folder / "run"))
    for name in ("loss", "kl"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-3), name
    drawn = call("sample", folder / "images.yaml", "--sample.policy", folder / "run/dpo/export", *WAYS[way]).out
    assert [json.loads(line)["completion"] for line in drawn.splitlines()] == [
        json.loads(line)["completion"] for line in printed["sample"].splitlines()
    ]


def test_an_adapter_is_trained_beside_what_reads_images(done, tmp_path):
    folder, _ = done
    flags = ("--run.dir", tmp_path, "--dpo.policy", folder / "run/sft/export", "--lora.rank", 2, "--dpo.lr", 0.1)
    assert call("dpo", folder / "images.yaml", *flags).code == 0
    result = call("eval", folder / "images.yaml", *flags[:6], "--eval.samples", 0)
    assert result.code == 0, result
    judged = json.loads((tmp_path / "eval/report.json").read_text())["policy"]
    assert judged["loss"] == pytest.approx(last_evaluation(tmp_path / "dpo")["eval/loss"], abs=1e-4)
    assert abs(judged["loss"] - np.log(2)) > 1e-3
    settings = json.loads((tmp_path / "dpo/export/adapter_config.json").read_text())
    with safe_open(tmp_path / "dpo/export/adapter_model.safetensors", "np") as file:
        modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in file.keys()}  # noqa: SIM118
    assert modules == {name for name in modules if name.startswith("model.language_model.layers.")}
    assert all(re.fullmatch(settings["target_modules"], name) for name in modules)  # as PEFT looks for them
    assert not re.fullmatch(settings["target_modules"], "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    merged = call("export", folder / "images.yaml", "--run.dir", tmp_path, "--export.merge", "--export.out", tmp_path / "whole")
    assert merged.code == 0, merged
    assert encoder_digest(tmp_path / "whole") == encoder_digest(folder / "base")


def test_preferences_are_enough(made, tmp_path):
    """A model and data are named, and no more: from the audit to the export."""
    flags = ("--run.dir", tmp_path, "--dpo.policy", made / "base")
    told = call("audit", made / "images.yaml", *flags[:2]).out
    assert "dropped, bad_image" in told
    assert "different images in prompts" in told
    assert not (tmp_path / "features").exists()  # the audit reads no encoder
    result = call("dpo", made / "images.yaml", *flags)
    assert result.code == 0, result
    assert "20 of 22 prompts show images: 4 tokens each" in result.out
    rows = read_metrics(tmp_path / "dpo/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert encoder_digest(tmp_path / "dpo/export") == encoder_digest(made / "base")
    before, after = (load_hf(path, images=True)[1]["params"] for path in (made / "base", tmp_path / "dpo/export"))
    assert np.abs(before["image_kernel"] - after["image_kernel"]).max() > 1e-4


def test_sft_scores_whole_texts_but_no_tokens_of_images(made, tmp_path):
    result = call("sft", made / "images.yaml", "--run.dir", tmp_path, "--sft.scored", "all")
    assert result.code == 0, result
    rows = [row for row in read_metrics(tmp_path / "sft/metrics.jsonl") if not is_evaluation(row)]
    texts = _targets(configured(tmp_path / "sft/config.yaml"), load_tokenizer(made / "base")).train
    shown = [0 if text.images is None else len(text.images.starts) for text in map(Completion.of, texts)]
    assert (len(texts), sum(shown)) == (TRAIN, 16)
    # Nothing predicts the first token, and nobody writes the 4 of an image.
    whole = sum(len(text[0]) + len(text[1]) - 1 for text in texts) - 4 * sum(shown)
    assert 8 * sum(row["tokens"] for row in rows) == pytest.approx(whole)
    for row in (*rows, last_evaluation(tmp_path / "sft")):
        assert np.isfinite([value for name, value in row.items() if "loss" in name]).all()


@pytest.mark.parametrize("command", ["ppo", "online", "frontier", "label", "reward-model", "prepare"])
def test_commands_for_texts_refuse_the_first_image(made, tmp_path, command):
    flags = {
        "ppo": ("--frontier.reward", "hf", "--frontier.classifier", "none"),
        "online": ("--frontier.reward", "hf", "--frontier.classifier", "none"),
        "label": ("--frontier.reward", "hf", "--frontier.classifier", "none"),
        "frontier": ("--frontier.reward", "hf", "--frontier.classifier", "none"),
    }
    start = () if command == "prepare" else ("--dpo.policy", made / "base")
    options = ("--run.dir", tmp_path, *start, *flags.get(command, ()))
    for check in ((), ("--check",)):
        message = refused(2, command, made / "images.yaml", *options, *check)
        assert "train.jsonl:1: the prompt shows an image, but this command reads only texts" in message


def test_a_model_without_an_encoder_is_refused_by_row_and_option(done, tmp_path):
    folder, _ = done
    text, variables = load_hf(folder / "base")
    save_hf(tmp_path / "text", text, variables)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (folder / "base" / file).is_file():
            shutil.copy(folder / "base" / file, tmp_path / "text")
    blind = "train.jsonl:1: the prompt shows an image, but .*/text has no vision encoder"
    for flags in ((), ("--check",)):
        for command, option in (("sft", "model.path"), ("dpo", "dpo.policy")):
            message = refused(
                2, command, folder / "images.yaml", "--run.dir", tmp_path, f"--{option}", tmp_path / "text", *flags
            )
            assert re.search(f"{option}: .*{blind}", message), message
    other = tmp_path / "other"
    shutil.copytree(folder / "base", other)
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("post_layernorm.bias"))
    save_file({**tensors, name: tensors[name] + 1}, other / "model.safetensors")
    flags = ("--run.dir", tmp_path, "--dpo.policy", folder / "base", "--dpo.reference", other)
    assert "dpo.reference: " in (message := refused(2, "dpo", folder / "images.yaml", *flags))
    assert "have different vision encoders, but must share one" in message


def test_what_does_not_fit_is_refused_before_anything_is_computed(made, tmp_path):
    context = ("--run.devices", "mesh", "--mesh.context", 2, "--run.dir", tmp_path)
    shutil.copytree(made / "base", tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").unlink()
    for flags in ((), ("--check",)):
        assert "mesh.context: 2 splits rows, but rows with images must stay whole" in refused(
            2, "sft", made / "images.yaml", *context, *flags
        )
        message = refused(2, "sft", made / "images.yaml", "--run.dir", tmp_path, "--model.path", tmp_path / "base", *flags)
        assert (
            "an image becomes 896 x 896 pixels and 4 tokens by preprocessor_config.json (missing; these are Gemma 3's)"
            in message
        )
    short = ("--run.dir", tmp_path, "--data.max-prompt-length", 20, "--data.max-length", 40, "--data.max-dropped-share", 0.1)
    message = refused(65, "sft", made / "images.yaml", *short)
    assert "image tokens are left: truncation cut an image; raise max_prompt_length" in message


def test_texts_alone_train_the_text_model(made, tmp_path):
    rows = [{"prompt": f"{number}?", "chosen": "red", "rejected": "gray"} for number in range(8)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = call("sft", made / "images.yaml", "--run.dir", tmp_path / "run", "--data.path", tmp_path)
    assert (result.code, "is read as its text model, without its vision encoder" in result.out) == (0, True), result
    assert load_config(tmp_path / "run/sft/export")["model_type"] == "gemma3_text"


def test_a_check_says_that_images_are_read(made, tmp_path):
    told = call("sft", made / "images.yaml", "--run.dir", tmp_path, "--check").out
    assert "train (trl, with images, 1 file, 17 rows)" in told
    assert "gemma3, 3 layers x 24, with its vision encoder" in told


def test_completions_of_prompts_with_images_are_not_compared(tmp_path):
    line = {"prompt": "What?", "completion": "red", "images": ["a.png"]}
    (tmp_path / "c.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"c\.jsonl:1: images: the prompt shows images, but only texts are compared"):
        read_completions(tmp_path / "c.jsonl")


def test_prompts_with_equal_texts_and_other_images_are_other_prompts(made):
    tokenizer = load_tokenizer(made / "base")
    pairs = load_preferences(made / "data", "train", tokenizer=tokenizer, on_bad="drop")
    same = [pair for pair in pairs if pair.prompt == pairs[0].prompt]
    assert len(same) == TRAIN - 2
    assert len({is_held_out(pair, 0.5) for pair in same}) == 2
    images, limits = ImageTokens(4, {}), {"max_length": 96, "max_prompt_length": 64}
    encoded = [encode_images(pair, tokenizer, images=images, **limits) for pair in same]
    assert find_overlap(encoded[:2], encoded[2:]).prompts.pairs == 0
    assert len(encode_targets(same, tokenizer, images=images, **limits)[0]) == len(same)
    single = [dataclasses.replace(one, desirable=True) for one in encoded]
    assert not one_prompt(single)
    assert mismatched(single, max_length=96)[0].rejected.tolist() == encoded[1].chosen.tolist()
