"""The long fuzz run: every reader of untrusted input, with many more mutations (`-m soak`)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutate import COUNTS, SOAK

TESTS = Path(__file__).parent
ALL = 20_000  # mutations over all readers together
EACH = 400


@pytest.mark.soak
def test_no_reader_of_untrusted_input_ends_in_a_traceback_a_hang_or_another_meaning(tmp_path):
    counts = tmp_path / "counts"
    files = [str(file) for file in sorted(TESTS.glob("test_fuzz_*.py")) if file != Path(__file__)]
    environment = {**os.environ, SOAK: str(EACH), COUNTS: str(counts)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", *files, str(TESTS / "test_untrusted.py")]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:]
    tried = sum(map(int, counts.read_text().split()))
    print(f"{tried:,} mutations")
    assert tried >= ALL
