"""Exported models on the Hub: pushed by the real client to one on this machine, or refused with the remedy."""

import pytest
from fake_hub import FakeHub, online

from dpo_jax.cli.config import Config, ConfigError, ExportConfig, check
from dpo_jax.models.hub import PushError, check_push, push

NAME = "org/model"
FILES = {"README.md": b"# card", "model.safetensors": b"weights"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    with FakeHub() as hub, online(monkeypatch, tmp_path / "cache", hub.url):
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_folder_is_one_commit_in_a_private_repository(hub, folder):
    assert push(folder, NAME, message="dpo, step 8; weights 0f1e").startswith(f"{hub.url}/{NAME}/commit/")
    assert hub.commits == [(NAME, "dpo, step 8; weights 0f1e", FILES)]
    assert hub.repos[NAME]["visibility"] == "private"
    push(folder, "org/open", message="m", public=True)
    assert hub.repos["org/open"]["visibility"] == "public"


def test_the_weights_of_an_earlier_model_are_removed(hub, folder):
    earlier = {f"model-0000{i}-of-00002.safetensors": b"old" for i in (1, 2)}
    earlier |= dict.fromkeys(["model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"], b"old")
    others = {"model.safetensors": b"old", "notes.txt": b"mine", "onnx/model.safetensors": b"mine"}
    hub.models[NAME] = {**earlier, **others}
    push(folder, NAME, message="m")
    assert hub.models[NAME] == {**others, **FILES}


REFUSALS = {
    (401, ""): "the Hub rejects this token; log in with `hf auth login`, or set HF_TOKEN",
    (403, ""): "the token has no write permission there; use one that has, or another organization",
    (507, "Quota"): "the Hub refuses it: .*507",
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("where", ["/api/repos/create", "/api/models/"])
def test_each_refusal_names_the_remedy_and_where_the_model_is(hub, folder, refusal, where):
    hub.refusals[where] = refusal
    later = f"; the model is in {folder}; later: hf upload {NAME} {folder}"
    with pytest.raises(PushError, match=f"^{NAME}: {REFUSALS[refusal]}.*{later}"):
        push(folder, NAME, message="m")
    assert not hub.commits


def test_a_hub_that_is_not_there_is_no_traceback(hub, folder):
    hub.__exit__()
    with pytest.raises(PushError, match=f"^{NAME}: .*; the model is in {folder}"):
        push(folder, NAME, message="m")
    hub.__enter__()  # which the fixture closes


def test_what_cannot_work_is_known_before_anything_is_exported(hub, monkeypatch):
    from huggingface_hub import constants

    check_push(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE forbids asking the Hub; unset it"):
        check_push(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match="no token for the Hub; log in with `hf auth login`"):
        check_push(NAME)
    assert not hub.asked
    with pytest.raises(ConfigError, match="export.push: must be a repository of the Hub, organization/name, got 'name'"):
        check(Config(export=ExportConfig(push="name")))
    with pytest.raises(ConfigError, match="export.public: is for a pushed repository, but nothing is pushed"):
        check(Config(export=ExportConfig(public=True)))
