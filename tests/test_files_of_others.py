"""Nothing is deleted or overwritten that this program has not written: reports, exports, benchmarks, sweeps, locks, outputs."""

import contextlib
import errno
import fcntl
import functools
import os
import re
import stat
import threading
import time
from pathlib import Path

import pytest
from conftest import GOLDEN
from mutate import outcome, time_limit
from test_report import PIXEL, finished, refused

from dpo_jax import locks
from dpo_jax.cli.commands.plan import _refuse_foreign as plan_file
from dpo_jax.cli.commands.report import write_page
from dpo_jax.cli.config import ConfigError
from dpo_jax.cli.exit_codes import exit_code, message
from dpo_jax.cli.model_folders import refuse_foreign, refuse_other_lines
from dpo_jax.cli.report_files import earlier_images
from dpo_jax.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_digest, train_tokenizer
from dpo_jax.lab.sweep import Run, sweep
from dpo_jax.locks import open_lock
from dpo_jax.models.hf import load_hf, save_hf
from dpo_jax.reference import ReferenceCache
from dpo_jax.report.first import TITLE
from dpo_jax.report.page import Figures, Page, Section
from dpo_jax.runtime.checkpoint import Checkpoints
from dpo_jax.runtime.rundir import RunDir, RunLocked, check_unlocked, write_json
from dpo_jax.untrusted import Unreadable, read_object
from dpo_jax.writing import empty_folder, leftovers, placing, write_text, writing

__all__ = ["finished"]  # a fixture


def tree(folder):
    """{name: content} of all that lies in a folder, but locks."""
    files = [path for path in sorted(folder.rglob("*")) if path.name != "run.lock"]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in files}


# Reports.


def page_of(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(PIXEL)
    return Page("T", "s", [Section(TITLE, [Figures([(folder / name, "a caption") for name in names])])])


@pytest.mark.parametrize("also_ours", [False, True])
@pytest.mark.parametrize("name", ["images/holiday.jpg", "images/99-loss.png", "images/old/a.png", "report.md", "report.html"])
def test_a_report_into_a_folder_of_somebody_elses_is_refused_and_changes_nothing(tmp_path, name, also_ours):
    out, page = tmp_path / "mine", page_of(tmp_path / "drawn", "loss.png")
    out.mkdir()
    if also_ours:
        write_page(out, page)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("![x](images/holiday.jpg)\n# Results\n")
    before = tree(out)
    words = f"report.out: {out} holds {'/'.join(name.split('/')[:2])}, which was not written by a report"
    for work in (earlier_images, lambda out: write_page(out, page)):
        with pytest.raises(ConfigError, match=re.escape(words)):
            work(out)
        assert tree(out) == before


def test_the_command_and_its_check_refuse_before_anything_is_written(finished, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "01-a.png").write_bytes(b"mine")
    for flags in ((), ("--check",)):
        words = refused(2, "report", finished, "--report.out", tmp_path, "--report.no-digests", *flags)
        assert "holds images/01-a.png, which was not written by a report: choose another --report.out" in words
    assert tree(tmp_path) == {"images": None, "images/01-a.png": b"mine"}
    assert not (tmp_path / "run.lock").exists()


def test_images_behind_a_link_are_not_deleted(tmp_path):
    out, page = tmp_path / "out", page_of(tmp_path / "drawn", "loss.png")
    out.mkdir()
    write_page(out, page)
    (out / "images").rename(tmp_path / "photos")
    (out / "images").symlink_to(tmp_path / "photos")
    with pytest.raises(ConfigError, match="holds images, which was not written by a report"):
        write_page(out, page)
    assert (tmp_path / "photos" / "01-loss.png").read_bytes() == PIXEL


def test_a_report_replaces_an_earlier_one_wherever_that_was_killed(tmp_path, monkeypatch):
    out, many = tmp_path / "out", page_of(tmp_path / "drawn", "a.png", "b.png", "c.png")
    few = page_of(tmp_path / "drawn", "c.png")
    out.mkdir()
    for steps in range(9):  # the end of each file and each deletion
        write_page(out, many)
        left = [steps]

        def until_killed(*arguments, real, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(*arguments)

        with monkeypatch.context() as kill, contextlib.suppress(KeyboardInterrupt):
            for name in ("replace", "unlink"):
                kill.setattr(os, name, functools.partial(until_killed, real=getattr(os, name)))
            write_page(out, few)
        write_page(out, few)
        assert [path.name for path in (out / "images").iterdir()] == ["01-c.png"]
    assert left[0] > 0, "the last one was not killed"


# Folders that are made anew.


def test_a_folder_is_emptied_only_if_it_was_made_here(tmp_path):
    folder = tmp_path / "work"
    (empty_folder(folder) / "a").write_text("x")
    assert not (empty_folder(folder) / "a").exists()
    (tmp_path / "mine").mkdir()
    empty_folder(tmp_path / "mine")  # nothing was in it
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "work.json").write_text("{}")
    empty_folder(tmp_path / "old", ours=("work.json",))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    for foreign in ("photos", "link"):
        with pytest.raises(FileExistsError) as caught:
            empty_folder(tmp_path / foreign, ours=("work.json",))
        assert message(caught.value).startswith(f"{tmp_path / foreign}: already exists and was not made by dpo-jax")
    assert (tmp_path / "photos" / "a.jpg").read_text() == "mine"


def test_a_kill_while_a_folder_is_emptied_leaves_one_that_can_be(tmp_path, monkeypatch):
    """Whatever was deleted first, and also where its mark was only half written."""
    folder = empty_folder(tmp_path / "work")
    for name in ("a", "b", "c"):
        (folder / name).mkdir()

    def killed(path):  # files first
        for file in filter(Path.is_file, path.iterdir()):
            file.unlink()
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr("dpo_jax.writing.shutil.rmtree", killed)
        pytest.raises(ZeroDivisionError, empty_folder, folder)
    (empty_folder(folder) / "d").write_text("x")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".0123abcd-.made_by_dpo_jax").write_text("dpo-jax del")
    assert (
        sorted(path.name for made in (folder, tmp_path / "new") for path in empty_folder(made).iterdir())
        == [".made_by_dpo_jax"] * 2
    )


def test_a_sweep_deletes_no_folder_of_somebody_elses(tmp_path):
    run = Run("dpo", "beta 1", {}, 0)
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="was not made by dpo-jax"):
        sweep([run], tmp_path, shared={}, perform=lambda *_: pytest.fail("performed"), say=lambda _: None)
    assert (tmp_path / run.name / "notes.txt").read_text() == "mine"


def test_an_export_replaces_only_what_an_export_has_written(tmp_path):
    folder = tmp_path / "model"
    refuse_foreign(folder)
    model, variables = load_hf(GOLDEN / "gpt2" / "init")
    save_hf(folder, model, variables)
    (folder / "model_ema.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="export.out: .*model already exists and was not written by dpo-jax export"):
        refuse_foreign(folder)
    for others in ("How I compared trl with dpo_jax\n", "---\ntags: [trl]\n---\n- dpo_jax\ntags: [dpo_jax]\n"):
        (folder / "README.md").write_text(others)
        with pytest.raises(ConfigError, match="was not written by dpo-jax export"):
            refuse_foreign(folder)
    for ours in ("---\nlicense: mit\ntags: [dpo_jax, dpo]\n---\n", "---\ntags:\n- other\n- dpo_jax\n---\nMine."):
        (folder / "README.md").write_text(ours)
        refuse_foreign(folder)
    (folder / "env.json").write_text("{}")  # a run directory has such a card as well
    with pytest.raises(ConfigError, match="was not written by dpo-jax export"):
        refuse_foreign(folder)
    (folder / "env.json").unlink()
    save_hf(folder, model, variables)
    assert (folder / "model_ema.safetensors").read_bytes() == b"mine"


def test_checkpoints_and_caches_delete_only_their_own(tmp_path):
    for name in ("deleting/4/state", "deleting/photos"):
        (tmp_path / name).mkdir(parents=True)
    with Checkpoints(tmp_path):
        pass
    assert sorted(path.name for path in (tmp_path / "deleting").iterdir()) == ["photos"]
    for name in ("notes.tmp", "identity.tmp", ".0123abcd-notes"):
        (tmp_path / name).write_text("mine")
    ReferenceCache(tmp_path, {"a": 1})
    assert {"notes.tmp", "identity.tmp", ".0123abcd-notes"} <= set(os.listdir(tmp_path))


# Locks.


def test_a_lock_follows_no_link(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for folder, lock in ((tmp_path / "run", "run.lock"), (tmp_path / "cache", "cache.lock")):
        folder.mkdir()
        (folder / lock).symlink_to(mine)
        opened = [lambda: RunDir(folder), lambda: check_unlocked(folder)] if lock == "run.lock" else []  # noqa: B023
        for work in opened or [lambda: ReferenceCache(folder, {})]:  # noqa: B023
            error = outcome(work, names=f"{folder / lock}: is a link, but a lock must be a file that nothing else uses")
            assert isinstance(error, Unreadable)
        assert mine.read_text() == "mine"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nothing", path)])
def test_a_lock_is_a_file(tmp_path, make):
    make(tmp_path / "run.lock")
    assert isinstance(outcome(lambda: RunDir(tmp_path), names="run.lock: is "), Unreadable)
    assert isinstance(outcome(lambda: check_unlocked(tmp_path), names="run.lock: is "), Unreadable)
    assert not os.path.lexists(tmp_path / "nothing")


def test_a_lock_locks_and_a_full_disk_names_it(tmp_path, monkeypatch):
    with RunDir(tmp_path):
        for work in (lambda: RunDir(tmp_path), lambda: check_unlocked(tmp_path)):
            with pytest.raises(RunLocked, match=f"pid {os.getpid()}.*delete {tmp_path}/run.lock"):
                work()
    with RunDir(tmp_path) as lost:
        lost.write_env()
        (tmp_path / "run.lock").unlink()  # as the message says: a new file is a new lock
        (tmp_path / "metrics.jsonl").touch()
        RunDir(tmp_path).close()
    check_unlocked(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space") as caught:
            RunDir(tmp_path)
    assert message(caught.value).startswith(f"{tmp_path / 'run.lock'}: No space left on device")
    RunDir(tmp_path).close()  # the lock went with the error
    os.close(open_lock(tmp_path / "run.lock", create=False))


def test_a_long_wait_for_a_lock_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "PATIENCE", 0.01)
    path = tmp_path / "cache.lock"
    held, asked = (open_lock(path) for _ in range(2))
    fcntl.flock(held, fcntl.LOCK_EX)
    waiting = threading.Thread(target=locks.wait_for_lock, args=(asked, path))
    waiting.start()
    while not caplog.records:
        assert waiting.is_alive()
        time.sleep(0.01)
    os.close(held)
    waiting.join(timeout=30)
    assert not waiting.is_alive()
    os.close(asked)
    assert f"{path}: another process has held this lock" in caplog.text


# Outputs.


def test_an_output_appears_whole_or_not_at_all(tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_text("old")
    file.chmod(0o600)

    def half():
        with writing(file) as out:
            out.write("half")
            out.flush()
            assert file.read_text() == "old"
            raise ZeroDivisionError

    pytest.raises(ZeroDivisionError, half)
    assert (file.read_text(), os.listdir(tmp_path)) == ("old", ["out.jsonl"])
    with writing(file, newline="") as out:
        out.write("new\r\n")
    assert file.read_bytes() == b"new\r\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError), writing(file, "x"):
        pass


def test_a_file_of_a_library_appears_whole_or_not_at_all(tmp_path):
    def save(path, *, full):
        Path(path).write_text("new")
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def saved(*, full=False):
        with placing(tmp_path / "loss.png") as file:
            assert file.name == "loss.png"
            save(file, full=full)

    with pytest.raises(OSError, match="No space") as caught:
        saved(full=True)
    assert message(caught.value).startswith(f"{tmp_path / 'loss.png'}: No space left on device")
    assert os.listdir(tmp_path) == []
    saved()
    assert {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)} == {"loss.png": "new"}


def test_an_output_replaces_a_link_and_nothing_behind_it(tmp_path):
    mine, link = tmp_path / "mine.txt", tmp_path / "report.html"
    mine.write_text("mine")
    link.symlink_to(mine)
    write_text(link, "page")
    assert (mine.read_text(), link.read_text(), link.is_symlink()) == ("mine", "page", False)


def test_a_pipe_is_written_and_a_folder_is_named(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "rows")
    assert os.read(reader, 10) == b"rows"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    write_text("/dev/null", "rows")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    for path, code in ((tmp_path, errno.EISDIR), (tmp_path / "no" / "file", errno.ENOENT)):
        with pytest.raises((IsADirectoryError, FileNotFoundError)) as caught:
            write_text(path, "rows")
        assert (caught.value.errno, exit_code(caught.value)) == (code, 74)
        assert message(caught.value).startswith(f"{path}: ")


def test_what_a_kill_leaves_is_known_by_its_name(tmp_path):
    for name in (".0123abcd-a.json", ".0123abcd-b.json", ".123-a.json", "a.json"):
        (tmp_path / name).touch()
    assert [path.name for path in leftovers(tmp_path, "a.*")] == [".0123abcd-a.json"]


def test_records_are_json_whatever_they_hold(tmp_path):
    write_json(tmp_path / "r.json", {"kl": float("nan"), "of": [float("inf"), 1.5], "argv": ["caf\udce9"]})
    assert read_object(tmp_path / "r.json") == {"kl": None, "of": [None, 1.5], "argv": ["caf\udce9"]}


def test_completions_replace_only_completions(tmp_path):
    out = tmp_path / "out.jsonl"
    for ours in (None, "", '{"prompt": "a", "completion": "b"}\n{'):
        if ours is not None:
            out.write_text(ours)
        refuse_other_lines(str(out))
    refuse_other_lines(None)
    refuse_other_lines("/dev/stdout")
    for others in ("run: {dir: a}\n", '{"prompt": "a"}\n', "\n", "\0"):
        out.write_text(others)
        with pytest.raises(ConfigError, match="sample.out: .*out.jsonl already exists and was not written by dpo-jax sample"):
            refuse_other_lines(str(out))
    with pytest.raises(ConfigError, match="sample.out"):
        refuse_other_lines(str(tmp_path))


def test_a_tokenizer_is_written_over_no_link_and_into_no_pipe(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer_config.json").symlink_to(mine)
    os.mkfifo(folder / "tokenizer.json")
    tokenizer = train_tokenizer(["a"], vocab_size=257)
    with time_limit():
        save_tokenizer(tokenizer, folder)
    assert mine.read_text() == "mine"
    assert tokenizer_digest(load_tokenizer(folder)) == tokenizer_digest(tokenizer)
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_no_pipe_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "data_report.json")
    for write in (lambda path: write_json(path, {}), lambda path: write_text(path, "")):
        with time_limit(), pytest.raises(OSError, match=r"is a pipe without a reader; remove it: .*data_report.json"):
            write(tmp_path / "data_report.json")


@pytest.mark.parametrize("name", ["report.json", "study.html", "results.csv", "export"])
def test_a_folder_that_no_run_has_made_keeps_its_files(name, tmp_path):
    """`judge.out` and other options name folders, which may hold somebody's files of the same names."""
    (tmp_path / name).write_text("mine")
    assert "move it away, or choose another folder" in str(outcome(lambda: RunDir(tmp_path), names=str(tmp_path / name)))
    assert [file.name for file in tmp_path.iterdir()] == [name]  # no lock either, which would make it ours
    RunDir(tmp_path, lock=False)
    (tmp_path / "env.json").write_text("{}")  # of a run that was copied without its lock
    RunDir(tmp_path).close()


def test_checkpoints_that_were_copied_without_the_rest_can_be_continued(tmp_path):
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
    assert "move it away" in str(outcome(lambda: RunDir(tmp_path), names="checkpoints"))
    (tmp_path / "checkpoints" / "12").mkdir()
    RunDir(tmp_path).close()


def test_what_people_keep_in_a_run_directory_is_no_reason(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunDir(tmp_path).close()
    (tmp_path / "report.json").write_text("{}")
    RunDir(tmp_path).close()
    assert {name: (tmp_path / name).read_text() for name in ("notes.txt", "report.json")} == {
        "notes.txt": "mine",
        "report.json": "{}",
    }


def test_a_file_that_holds_no_plans_is_not_replaced_by_some(tmp_path):
    for content, kept in (("mine", True), ('{"a": 1}', True), ('{"plans": []}', False)):
        (tmp_path / "plan.json").write_text(content)
        found = outcome(lambda: plan_file(tmp_path / "plan.json"))
        assert ("plan.json: " in str(found) and "name another file" in str(found)) == kept
