"""The notebook runs from its first cell to its last, as Colab would run it, with fewer pairs."""

import json
import sys
import types
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "launch" / "notebook.ipynb"


@pytest.fixture
def shown(monkeypatch):
    """What the cells display. IPython itself is no dependency; matplotlib would ask it for its version."""
    shown = []
    module = types.ModuleType("IPython.display")
    module.display, module.Image, module.HTML = shown.append, lambda path: ("image", path), lambda text: ("html", text)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_the_notebook_trains_compares_and_exports_a_policy(tmp_path, monkeypatch, shown, capsys):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 10
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    scope = {"__name__": "__main__"}
    for number, cell in enumerate(cells, start=1):
        source = "".join(cell["source"])
        assert source.startswith(f"# {number}. ")
        for usual, less in (
            ("PAIRS = 4000", "PAIRS = 128"),
            ("width: 128, layers: 4", "width: 32, layers: 1"),
            ("samples: 64", "samples: 8"),
        ):
            source = source.replace(usual, less)
        exec(compile(source, f"cell {number}", "exec", dont_inherit=True), scope)
    assert "log pi(chosen) -" in capsys.readouterr().out
    assert (tmp_path / "runs/notebook/dpo/export/model.safetensors").is_file()
    images, (table,) = [one for kind, one in shown if kind == "image"], [one for kind, one in shown if kind == "html"]
    assert len(images) >= 4
    assert table.count("<tr>") == 9
