"""The examples, run as they stand, on a small random pipeline instead of a downloaded one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from tiny_pipelines import build

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PARAMETERS = """
model, prompt = "{folder}", "six red balloons"
N, steps, device = 4, 3, "cpu"
size = {{"height": 16, "width": 16}}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    build("sd15")[0].save_pretrained(folder, safe_serialization=True)
    return folder


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
def test_best_of_n_is_replaced_in_five_lines(tiny, monkeypatch):
    """Runs every cell with the cell tagged "parameters" exchanged, as papermill does."""
    notebook = nbformat.read(ROOT / "examples" / "best_of_n_replaced.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    needed = [name for name in ("model", "prompt", "N", "steps", "device", "size") if name in parameters.source]
    assert len(needed) == 6
    parameters.source = PARAMETERS.format(folder=tiny.as_posix())
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (five,) = [cell for cell in code if "steer.sample" in cell.source]
    assert len([line for line in five.source.splitlines() if line]) <= 5
    assert any("image/png" in output.get("data", {}) for output in five.outputs)
    spent = next(printed(cell) for cell in code if "the loop found" in cell.source)
    assert "24 network rows" in spent  # N * steps, two rows each under guidance
    assert "recommended" in printed(code[-2])
    assert {line.split()[0] for line in printed(code[-1]).splitlines()[1:]} >= {"rollout", "best_of_n", "smc", "beam"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
def test_prompts_from_a_file(tiny, tmp_path):
    out = tmp_path / "out"
    words = [
        "examples/generate.py",
        "examples/prompts.txt",
        "--model",
        tiny,
        "--steps",
        "3",
        "--budget",
        "12",
        "--look",
    ]
    words += ["--call", '{"height": 16, "width": 16}', "--out", out]
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((out / "scores.json").read_text())
    assert [name[:3] for name in scores] == ["000", "001", "002"]
    assert next(iter(scores)) == "000-six-red-balloons-over-a-harbour.png"
    for name, entry in scores.items():
        assert Image.open(out / name).size == (16, 16)
        assert entry["score"] >= entry["mean of its candidates"]
    assert {"result.safetensors", "result.json"} <= {path.name for path in out.iterdir()}
    assert "recommended" in done.stdout
    assert "36 network rows" in done.stdout
