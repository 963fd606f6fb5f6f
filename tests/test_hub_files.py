"""Data sets of the Hub by name, read by the real client from a Hub on this machine."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import GOLDEN
from fake_hub import FakeHub, online

from dpo_jax.cli import data_sources, fixed, splits
from dpo_jax.cli.config import Config, ConfigError, DataConfig, MixConfig, RunConfig
from dpo_jax.cli.main import main
from dpo_jax.data.hub_files import HubError, is_dataset_id, open_dataset

NAME = "org/pairs"


def rows(*names):
    return [{"prompt": f"Say {name}.", "chosen": f" {name}", "rejected": " no"} for name in names]


def jsonl(*names):
    return "".join(json.dumps(row) + "\n" for row in rows(*names)).encode()


def parquet(*names):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows(*names)), file)
    return file.getvalue()


SHARDS = {
    "README.md": b"# pairs",
    "data/train-00000-of-00002.parquet": parquet("a", "b"),
    "data/train-00001-of-00002.parquet": parquet("c"),
    "data/test-00000-of-00001.parquet": parquet("d"),
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_sources, "_COMMITS", {})
    data_sources._listing.cache_clear()
    with FakeHub() as hub, online(monkeypatch, tmp_path / "cache", hub.url):
        yield hub


def config_of(tmp_path, path=NAME, **data):
    return Config(run=RunConfig(dir=str(tmp_path / "run")), data=DataConfig(path=path, **data))


def chosen(config, split="train"):
    return [pair.chosen.strip() for pair in splits.load_split(config, split)]


def test_a_data_set_of_the_hub_is_read_by_its_name_and_only_the_split_is_fetched(hub, tmp_path):
    commit = hub.add(NAME, SHARDS)
    loaded = splits.load_split(config_of(tmp_path), "train")
    assert [pair.chosen for pair in loaded] == [" a", " b", " c"]
    assert loaded.report.source == f"{NAME}@{commit}"
    assert [file["path"] for file in loaded.report.files] == [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    assert not any("data/test" in request or "README" in request for request in hub.asked)
    assert chosen(config_of(tmp_path), "test") == ["d"]


def test_what_was_audited_is_what_is_trained_on(hub, tmp_path, capsys):
    commit = hub.add(NAME, SHARDS)
    (tmp_path / "c.yaml").write_text(
        f"data: {{path: {NAME}}}\ntokenizer: {{path: {GOLDEN / 'tokenizer'}}}\nrun: {{dir: run}}\n"
    )
    assert main(["audit", "c.yaml"]) == 0
    assert f"{NAME}@{commit}" in "".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "run" / "fixed.json").read_text())["revisions"] == {f"datasets/{NAME}": commit}


def test_what_arrives_is_counted(hub):
    hub.add(NAME, SHARDS)
    found, arrived = open_dataset(NAME), []
    found.fetch("train", progress=arrived.append)
    assert sum(arrived) == found.bytes_of("train") == sum(len(data) for path, data in SHARDS.items() if "train" in path)


def test_a_missing_held_out_split_is_told_before_the_train_split_is_downloaded(hub, tmp_path):
    train_only = {path: data for path, data in SHARDS.items() if "test" not in path}
    hub.add(NAME, train_only)
    remedy = (
        "choose with --data.train-split and --data.test-split, or hold out a part of the train split with --data.test-share"
    )
    with pytest.raises(ConfigError, match=f"^data.path: {NAME}: no file of split 'test'; it has train: {remedy} 0.05$"):
        splits.load_splits(config_of(tmp_path))
    with pytest.raises(ConfigError, match="no file of split 'wrong'"):
        splits.load_splits(config_of(tmp_path, train_split="wrong"))
    assert not any("resolve" in request for request in hub.asked)
    train, test = splits.load_splits(config_of(tmp_path, test_share=0.5))
    assert len(train) + len(test) == 3


def test_a_local_folder_of_that_name_wins(hub, tmp_path):
    hub.add(NAME, SHARDS)
    (tmp_path / NAME).mkdir(parents=True)
    (tmp_path / NAME / "train.jsonl").write_bytes(jsonl("local"))
    assert chosen(config_of(tmp_path)) == ["local"]
    assert not hub.asked
    with pytest.raises(ConfigError, match="data.revision: org/pairs is on this machine"):
        chosen(config_of(tmp_path, revision="main"))


@pytest.mark.parametrize("name", ["org/name@main", "data/pairs", "runs/label", "./org/name", "name", "a/b/c"])
def test_what_is_no_data_set_of_the_hub(name):
    assert not is_dataset_id(name)


def test_a_run_stays_at_the_commit_at_which_it_began(hub, tmp_path):
    first = hub.add(NAME, SHARDS)
    config = fixed.fix(config_of(tmp_path))
    (tmp_path / "run").mkdir()
    fixed.keep(config)
    assert config.data.revision is None
    assert chosen(config) == ["a", "b", "c"]
    assert fixed.pin_revisions(config).data.revision == first
    hub.add(NAME, {**SHARDS, "data/train-00000-of-00002.parquet": parquet("new")})
    data_sources._listing.cache_clear()  # another process
    assert chosen(config) == ["new", "c"]
    later = fixed.fix(config_of(tmp_path))
    assert later.data.revision == first
    assert json.loads((tmp_path / "run" / "fixed.json").read_text())["revisions"] == {f"datasets/{NAME}": first}
    del hub.datasets[NAME]
    with pytest.raises(ConfigError, match="no data set of the Hub"):  # nothing but that commit will do
        chosen(later, "test")
    mixed = fixed.fix(config_of(tmp_path, path=None, mix=(MixConfig(NAME, 2.0), MixConfig("org/other"))))
    assert [part.revision for part in mixed.data.mix] == [first, None]


def test_both_splits_are_of_one_commit(hub, tmp_path):
    first = hub.add(NAME, SHARDS)
    splits.load_split(config_of(tmp_path), "train")
    hub.add(NAME, {**SHARDS, "data/test-00000-of-00001.parquet": parquet("newer")})
    hub.datasets[NAME]["old"] = SHARDS
    held_out = splits.load_split(config_of(tmp_path), "test")
    assert (held_out[0].chosen, held_out.report.source) == (" d", f"{NAME}@{first}")


def test_subsets_are_chosen_by_data_config(hub, tmp_path):
    hub.add(NAME, {f"{name}/train-00000-of-00001.parquet": parquet(name) for name in ("en", "de")})
    with pytest.raises(ConfigError, match=r"several folders have a split 'train': de, en; choose one with --data.config"):
        chosen(config_of(tmp_path))
    assert not any("resolve" in request for request in hub.asked)  # before anything is fetched
    assert chosen(config_of(tmp_path, config="de")) == ["de"]
    folder = tmp_path / "copy" / "data" / "fr"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(jsonl("fr"))
    assert chosen(config_of(tmp_path, path=str(tmp_path / "copy"), config="fr")) == ["fr"]
    with pytest.raises(ConfigError, match="data.config: .*copy has no folder nl"):
        chosen(config_of(tmp_path, path=str(tmp_path / "copy"), config="nl"))


def test_what_the_hub_converted_is_read_where_there_is_nothing_else(hub, tmp_path):
    hub.add(NAME, {"pairs.py": b"...", "train.csv": b"a,b", "dataset_infos.json": b"{}"})
    with pytest.raises(ConfigError, match=r"no .*parquet file, and no parquet files that the Hub converted"):
        chosen(config_of(tmp_path))
    data_sources._listing.cache_clear()
    hub.add(NAME, {"default/train/0000.parquet": parquet("x")}, revision="refs/convert/parquet")
    assert open_dataset(NAME).splits() == ["train"]
    loaded = splits.load_split(config_of(tmp_path), "train")
    assert [pair.chosen for pair in loaded] == [" x"]
    assert any(
        "parquet files that the Hub converted are read (refs/convert/parquet, default)" in n for n in loaded.report.notes
    )
    with pytest.raises(ConfigError, match="at revision main; leave data.revision out"):
        chosen(config_of(tmp_path, revision="main"))
    hub.add(NAME, {f"{name}/train/0000.parquet": parquet(name) for name in "ab"}, revision="refs/convert/parquet")
    data_sources._listing.cache_clear()
    with pytest.raises(ConfigError, match="it has the configurations a, b: choose with --data.config"):
        chosen(config_of(tmp_path))
    assert chosen(config_of(tmp_path, config="b")) == ["b"]


def test_what_the_hub_converted_is_read_by_its_commit_as_well(hub, tmp_path):
    hub.add(NAME, {"pairs.py": b"..."})
    both = {f"default/{split}/0000.parquet": parquet(split) for split in ("train", "test")}
    commit = hub.add(NAME, both, revision="refs/convert/parquet")
    config = fixed.fix(config_of(tmp_path))
    (tmp_path / "run").mkdir()
    fixed.keep(config)
    assert chosen(config) == ["train"]
    later = fixed.pin_revisions(config)  # what the next command opens, and so do other hosts
    assert later.data.revision == commit
    data_sources._listing.cache_clear()
    assert [chosen(later, split) for split in ("train", "test")] == [["train"], ["test"]]
    hub.add(NAME, {f"{name}/train/0000.parquet": parquet(name) for name in ("de", "en")})
    with pytest.raises(HubError, match=r"^org/pairs: it has the configurations de, en: choose with --data.config$"):
        open_dataset(NAME)
    assert chosen(config_of(tmp_path, config="en")) == ["en"]


REFUSALS = {
    (404, "RepoNotFound"): "no file or folder here, and no data set of the Hub; if it is private: `hf auth login`",
    (403, "GatedRepo"): "gated: accept its terms at https://huggingface.co/datasets/org/pairs",
    (404, "RevisionNotFound"): "has no revision v9; use a branch, tag or commit",
    (500, ""): "could not be fetched from the Hub: .*500.*hf download org/pairs --repo-type dataset --local-dir data/pairs",
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_each_refusal_of_the_hub_names_its_remedy(hub, tmp_path, refusal):
    hub.add(NAME, SHARDS)
    hub.refusals["/api/datasets/"] = refusal
    with pytest.raises(ConfigError, match=f"^data.path: {NAME}: {REFUSALS[refusal]}"):
        chosen(config_of(tmp_path, revision="v9"))


def test_without_a_network_the_cache_is_read_or_the_remedy_told(hub, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    commit = hub.add(NAME, SHARDS)
    assert chosen(config_of(tmp_path)) == ["a", "b", "c"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    data_sources._listing.cache_clear()
    loaded = splits.load_split(config_of(tmp_path), "train")
    assert loaded.report.source == f"{NAME}@{commit}"
    assert any("the Hub could not be reached (OfflineModeIsEnabled)" in note for note in loaded.report.notes)
    assert chosen(config_of(tmp_path, revision=commit)) == ["a", "b", "c"]
    with pytest.raises(ConfigError, match=r"data.path: org/pairs: .*HF_HUB_OFFLINE forbids asking the Hub; .*hf download"):
        chosen(config_of(tmp_path), "test")  # that split was never fetched, and a part of one is none
    (tmp_path / "c.yaml").write_text("data: {path: org/other}\nmodel: {width: 16, layers: 1, heads: 1}\n")
    assert main(["audit", "c.yaml", "--run.dir", "r"]) == 2
    told = capsys.readouterr().err
    assert "data.path: org/other: no file or folder here, and HF_HUB_OFFLINE forbids asking the Hub" in told
    assert "hf download org/other --repo-type dataset --local-dir data/other, then --data.path data/other" in told


def test_a_file_outside_of_its_repository_is_refused(hub):
    hub.add(NAME, {"../train.jsonl": jsonl("a")})
    with pytest.raises(HubError, match="holds a file '../train.jsonl', which lies outside"):
        open_dataset(NAME)


def test_check_tells_of_a_data_set_of_the_hub_without_asking(hub, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("data: {path: org/pairs}\nmodel: {width: 16, layers: 1, heads: 1}\n")
    assert main(["audit", "c.yaml", "--run.dir", "r", "--check"]) == 0
    assert "org/pairs: from the Hub or its local cache; not checked" in capsys.readouterr().out
    assert not hub.asked
