"""The examples, run as they stand, on a small random pipeline instead of a downloaded one."""

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
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


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A file of prompts with call arguments and notes."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": f"a fox {i}", "height": 16, "width": 16, "set": i % 2} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_example(*words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_dataset_by_two_ranks_is_that_of_one_process(tiny, prompts, tmp_path):
    words = ["examples/dataset.py", prompts, "--model", tiny, "--reward", "jpeg", "--method", "best_of_n"]
    words += ["--steps", 3, "--budget", 12, "--keep", 2, "--out"]
    assert "6 pictures of 3 prompts" in run_example(*words, tmp_path / "one")
    run_example("-m", "torch.distributed.run", "--nproc-per-node", 2, *words, tmp_path / "two")
    one, two = (
        [*(tmp_path / name).glob("images/**/*.png"), tmp_path / name / "metadata.jsonl"] for name in ("one", "two")
    )
    assert len(one) == 7
    assert sorted(path.read_bytes() for path in one) == sorted(path.read_bytes() for path in two)
    assert [json.loads(line)["set"] for line in one[-1].read_text().splitlines()] == [0, 0, 1, 1, 0, 0]


@pytest.mark.slow
def test_a_dataset_by_ray(tiny, prompts, tmp_path):
    pytest.importorskip("ray.data")
    words = ["--model", tiny, "--reward", "jpeg", "--method", "best_of_n", "--budget", 200, "--workers", 1]
    assert "3 pictures" in run_example(
        "examples/dataset_ray.py", prompts, *words, "--keep", 1, "--out", tmp_path / "out"
    )


def names_asked_of_steer(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every `from steer... import ...` in a file."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return [(n.module, a.name) for n in nodes if (n.module or "").partition(".")[0] == "steer" for a in n.names]


def there_is(module: str, name: str) -> bool:
    return hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None


def test_examples_import_what_there_is():
    """Also those that are run by hand: a benchmark outlives the names that it was written with."""
    files = sorted((ROOT / "examples").rglob("*.py"))
    asked = {(path, *names) for path in files for names in names_asked_of_steer(path)}
    assert len(asked) > 30
    assert [(path.name, module, name) for path, module, name in sorted(asked) if not there_is(module, name)] == []
