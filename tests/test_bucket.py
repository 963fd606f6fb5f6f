"""Checkpoints in a bucket: `gs://...` goes to orbax as it was given, and what is done with folders is done there as well."""

import importlib.util
import logging
import sys
import types

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from test_checkpoint import abstract, digest, numbered

from dpo_jax.cli.config import Config, ConfigError, DpoConfig, RunConfig
from dpo_jax.cli.earlier import earlier_run
from dpo_jax.runtime.checkpoint import CheckpointDamaged, Checkpoints, has_steps
from dpo_jax.runtime.seal import check_seal, write_seal


class Bucket(MemoryFileSystem):
    """Objects in memory under the name of Google's buckets: a folder is there as long as something is in it."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs = {}, [""]
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("gs://", "memory://"))

    def mkdir(self, path, create_parents=True, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rename(self, path, target, **options):
        for name in self.find(path):
            self.mv_file(name, self._strip_protocol(target) + name[len(self._strip_protocol(path)) :])

    def mv_file(self, path, target):
        self.store[target] = self.store.pop(path)


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(type(epath.backend.fsspec_backend), "fs", lambda self, path: Bucket())
    monkeypatch.setattr(Bucket, "store", {})
    flat = types.SimpleNamespace(reload=lambda: None, hierarchical_namespace_enabled=False)
    client = types.SimpleNamespace(bucket=lambda name: flat, get_bucket=lambda name: flat)
    storage = types.ModuleType("google.cloud.storage")  # what orbax asks for the kind of bucket
    storage.Client = lambda *args, **options: client
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage
    monkeypatch.setitem(sys.modules, "google.cloud", cloud)
    return Bucket.store


def test_the_name_of_a_bucket_stays_as_it_is(bucket):
    config = Config(run=RunConfig(dir="runs/hh", checkpoints="gs://bucket/hh"))
    assert config.checkpoints_of("dpo") == "gs://bucket/hh/dpo"
    with Checkpoints(config.checkpoints_of("dpo"), read_only=True) as checkpoints:
        assert str(checkpoints.directory) == "gs://bucket/hh/dpo"
        assert checkpoints.restore_latest(abstract()) is None
    assert bucket == {}
    assert Config(run=RunConfig(dir="runs/hh")).checkpoints_of("sft") == "runs/hh/sft/checkpoints"


def test_a_bucket_without_its_package_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run.checkpoints: gs:// needs the package gcsfs: (uv )?pip install -e .*\[gcs\]"):
        earlier_run(Config(run=RunConfig(checkpoints="gs://bucket/hh")), "dpo", DpoConfig())


def test_a_seal_in_a_bucket(bucket):
    folder = epath.Path("gs://bucket/run/20")
    (folder / "state" / "d" / "0").write_bytes(b"abc")
    (folder / "record" / "metadata").write_text("{}")
    write_seal(folder)
    check_seal(folder)
    (folder / "state" / "d" / "0").write_bytes(b"abd")
    with pytest.raises(ValueError, match="the file state/d/0 was changed"):
        check_seal(folder)


def test_leftovers_are_purged_and_what_does_not_verify_is_moved(bucket):
    directory = epath.Path("gs://bucket/run/dpo")
    (directory / "deleting" / "10" / "record" / "metadata").write_text("{}")
    (directory / "20" / "record" / "metadata").write_text("{")
    (directory / "20" / "commit_success.txt").write_text("")
    assert has_steps("gs://bucket/run/dpo")
    with Checkpoints("gs://bucket/run/dpo") as checkpoints, pytest.raises(CheckpointDamaged, match="gs://bucket/run/dpo/quar"):
        checkpoints.restore_latest(abstract())
    assert sorted(bucket) == [
        "/bucket/run/dpo/quarantine/20-0/commit_success.txt",
        "/bucket/run/dpo/quarantine/20-0/record/metadata",
        "/bucket/run/dpo/quarantine/README",
    ]
    assert not has_steps("gs://bucket/run/dpo")


@pytest.mark.soak
def test_save_and_restore_in_an_emulated_bucket(monkeypatch, caplog):
    """The real way through gcsfs and TensorStore, to a server on this machine."""
    reason = "needs: pip install gcsfs gcp-storage-emulator"
    pytest.importorskip("gcsfs", reason=reason)
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason=reason)
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, "http://localhost:9023")
    server = emulator.create_server("localhost", 9023, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        with Checkpoints("gs://bucket/a run/dpo", max_to_keep=2) as checkpoints:
            for step in (10, 20, 30):
                checkpoints.save(step, numbered(step), {"step": step})
        directory = epath.Path("gs://bucket/a run/dpo")
        assert sorted(path.name for path in directory.iterdir()) == ["20", "30"]
        for step in (30, 20):
            with Checkpoints("gs://bucket/a run/dpo") as checkpoints, caplog.at_level(logging.WARNING, "dpo_jax"):
                state, meta = checkpoints.restore_latest(abstract())
            assert meta == {"step": step}
            assert digest(state) == digest(numbered(step))
            (directory / "30" / "state" / "_METADATA").write_text("{}")
        assert "step 30 does not verify (ValueError: the file state/_METADATA was changed)" in caplog.text
        assert (directory / "quarantine" / "30-0" / "files.json").exists()
    finally:
        server.stop()
