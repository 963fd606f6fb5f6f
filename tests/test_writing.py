"""A full disk is told by the name of the file, whoever was writing it."""

import contextlib
import errno
import os
import tempfile
from pathlib import Path

import pytest

from dpo_jax.cli.exit_codes import exit_code, message
from dpo_jax.runtime.metrics import MetricsLog
from dpo_jax.untrusted import Unreadable, regular
from dpo_jax.writing import naming, naming_errors, write_text, write_whole, writing

FULL = Path("/dev/full")  # can be opened, and holds nothing
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def close_late():
    with writing(FULL) as file:
        file.write("stays in the buffer until the file is closed")


def log_a_step():
    log = MetricsLog(FULL)
    try:
        log.write({"step": 1})
    finally:
        with contextlib.suppress(OSError):
            log.close()


def raised_by(write):
    with pytest.raises(OSError) as raised:
        write()
    return raised.value


@needs_full
@pytest.mark.parametrize("write", [close_late, log_a_step, lambda: write_text(FULL, "words")])
def test_a_write_that_fails_names_its_file(write):
    error = raised_by(write)
    assert exit_code(error) == 74
    assert message(error).startswith("/dev/full: No space left on device; free some space")


@pytest.mark.parametrize(
    ("raised", "number"),
    [
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),  # safetensors
        (Exception("Permission denied (os error 13)"), errno.EACCES),  # tokenizers
        (RuntimeError("RESOURCE_EXHAUSTED: write failed: No space left on device"), errno.ENOSPC),  # array_record
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
    ],
)
def test_errors_of_libraries_get_number_and_name(raised, number):
    def write():
        with naming("runs/one/model.safetensors"):
            raise raised

    error = raised_by(write)
    assert error.errno == number
    assert exit_code(error) == 74
    assert message(error).startswith(f"runs/one/model.safetensors: {os.strerror(number)}")


@needs_full
@pytest.mark.parametrize("flush", [True, False])
def test_standard_output_on_a_full_disk_is_named(flush):
    with contextlib.suppress(OSError), open(FULL, "w", buffering=1) as output:
        naming_errors(output, "standard output")
        error = raised_by(lambda: print("words" * (1 if flush else 5000), file=output, flush=flush))
        assert message(error).startswith("standard output: No space left on device; free some space")


def test_what_is_no_error_of_writing_stays_as_it_is():
    with pytest.raises(ZeroDivisionError), naming("a"):
        _ = 1 / 0
    with pytest.raises(FileNotFoundError) as raised, naming("a"):
        open("no/such/file")  # noqa: SIM115
    assert raised.value.filename == "no/such/file"


def test_a_whole_file_is_replaced_or_stays_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "env.json"
    write_whole(file, b"old")
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        assert raised_by(lambda: write_whole(file, b"new")).filename == str(file)
    assert (file.read_bytes(), os.listdir(tmp_path)) == (b"old", ["env.json"])
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="Linux has it")
def test_a_disk_in_memory_is_a_disk():
    """Only names of open files and devices are written through; a file below /dev/shm is replaced as a whole."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = Path(folder) / "a"
        file.write_text("old")
        with contextlib.suppress(RuntimeError), writing(file) as out:
            out.write("new")
            raise RuntimeError  # the write is not completed
        assert file.read_text() == "old"
        os.mkfifo(Path(folder) / "pipe")
        with pytest.raises(Unreadable, match="expected a file, got a pipe"):
            regular(Path(folder) / "pipe")
