"""The rules of the house, read off the source: who imports whom, what never appears, how long `import steer` takes."""

import ast
import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
FOLDERS = {"steer": ROOT / "steer", "steer.search": ROOT / "search", "steer.rewards": ROOT / "rewards"}
SOURCES = sorted(path for folder in FOLDERS.values() for path in folder.rglob("*.py"))
# A room may import those above it in this list, and never the other way round, also inside functions. `cli` and the
# package's own __init__ stand on all of them.
ROOMS = (
    "version", "errors", "finite", "torch_modes", "noise", "key", "types", "calls", "cost", "files", "execution",
    "rewards", "processes", "core", "particles", "pipelines", "report", "watching", "results", "weighted_sde",
    "samplers", "search", "saved", "evaluation", "guidance", "models", "minority_sampling", "grpo", "exporters",
    "generation", "playground", "testing", "cli",
)  # fmt: skip
# A target that the user asked for and that is biased, or may not exist, or an evidence without an error estimate, is no
# numerical failure: it runs, with a warning.
WARNINGS_MEANT = {("weighted_sde/loop.py", "warnings.warn"), ("results/result.py", "warnings.warn")}
# Whether an error's `.partial` can be sent to another process is tried by pickling it. Nothing is ever unpickled.
PICKLES = {"steer/errors.py"}
AT_MODULE_LEVEL = {
    "steer": {"torch"},
    "rewards": {"torch"},
    "search": {"torch", "numpy"},  # torch imports numpy anyway
    "cli": {"torch", "typer", "rich"},
    "noise": {"torch", "numba", "numpy", "triton"},  # its two kernels are imported when they first draw
}


def module_of(path: Path) -> str:
    """Dotted name that a source file is imported by."""
    name, folder = next((n, f) for n, f in FOLDERS.items() if path.is_relative_to(f))
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join([name, *(part for part in parts if part != "__init__")])


def room_of(module: str) -> str | None:
    """The folder (or file of the ground floor) that a module is in; None for the package itself."""
    return module.split(".")[1] if "." in module else None


MODULES = {module_of(path) for path in SOURCES}


def imports(tree: ast.AST, path: Path) -> set[str]:
    """Dotted names of the modules a tree imports, relative ones made absolute; names imported from packages too."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= names & MODULES or {source}
    return found


def module_level(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and TYPE_CHECKING blocks: what runs on import."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else node

    return Strip().visit(ast.parse(ast.unparse(tree)))


def upward(path: Path) -> set[str]:
    """Imports of a source file that go up: to a room below its own in the list, or to the package as a whole."""
    room = room_of(module_of(path))
    if room in (None, "__main__", "cli"):
        return set()
    reached = {name for name in imports(ast.parse(path.read_text()), path) if name.split(".")[0] == "steer"}
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    if room == "rewards":
        allowed = {"errors", "torch_modes", "types", "files", "rewards"}
    return {name for name in reached if room_of(name) not in allowed}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_import_goes_up(path):
    assert not upward(path)


def test_there_is_no_circle():
    """Of modules, also by imports inside functions."""
    graph = {module_of(path): imports(ast.parse(path.read_text()), path) & MODULES for path in SOURCES}
    graph = {name: {to for to in reached if to not in FOLDERS} for name, reached in graph.items() if name != "steer"}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for to in sorted(graph.get(name, ())):
                visit(to, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=module_of)
def test_no_module_is_hidden_by_a_name_of_its_package(path):
    """`import steer.x.y as m` is a module: no package binds a function to the name of one of its modules."""
    package = importlib.import_module(module_of(path))
    for name in (module.rpartition(".")[2] for module in MODULES if module.rpartition(".")[0] == module_of(path)):
        if module_of(path) == "steer" and name in ("__main__",):
            continue
        bound = getattr(package, name, None)
        assert bound is None or isinstance(bound, types.ModuleType), f"{module_of(path)}.{name} is {bound!r}"


def test_every_package_is_installed():
    """pyproject.toml names the packages one by one, since two of them lie outside the folder steer/."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(module_of(path) for path in SOURCES if path.name == "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_heavy_packages_are_imported_where_they_are_used(path):
    room = room_of(module_of(path))
    standard = {*sys.stdlib_module_names, "steer"}
    top = {name.split(".")[0] for name in imports(module_level(ast.parse(path.read_text())), path)} - standard
    allowed = AT_MODULE_LEVEL.get(room or "steer", AT_MODULE_LEVEL["steer"])
    assert top <= allowed, f"import {top - allowed} inside the function that needs it"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_unsafe_or_global(path):
    """No pickle, no evaluation of text, no remote code, no draws from a global generator, no silent repairs."""
    tree = ast.parse(path.read_text())
    banned_calls = {"eval", "exec", "torch.load", "torch.save", "torch.randn", "torch.rand", "torch.randn_like"}
    banned_calls |= {"torch.rand_like", "torch.manual_seed", "torch.nan_to_num", "warnings.warn"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if ("/".join(path.parts[-2:]), ast.unparse(node.func)) in WARNINGS_MEANT:
                continue
            assert ast.unparse(node.func) not in banned_calls, f"line {node.lineno}: {ast.unparse(node)}"
            assert not any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
    packers = {"pickle", "cloudpickle", "dill", "shelve"}
    if str(path.relative_to(ROOT)) in PICKLES:
        taken = [ast.unparse(node) for node in ast.walk(tree) if "pickle" in ast.dump(node) and hasattr(node, "names")]
        assert taken == ["from pickle import dumps"]
        packers.remove("pickle")
    assert not imports(tree, path) & packers


def test_this_test_can_fail(tmp_path):
    """The checks see what they look for."""
    bad = "import pickle\nimport numpy\ndef f():\n    import PIL\n    return torch.randn(3)\n"
    tree = ast.parse(bad)
    path = ROOT / "steer" / "bad.py"
    assert imports(tree, path) == {"pickle", "numpy", "PIL"}
    assert imports(module_level(tree), path) == {"pickle", "numpy"}
    there = ROOT / "steer/models/z.py"
    assert imports(ast.parse("from ..errors import X\nfrom . import mixture"), there) == {
        "steer.errors",
        "steer.models.mixture",
    }


def test_an_upward_import_is_seen(tmp_path, monkeypatch):
    path = ROOT / "steer" / "core" / "bad.py"
    monkeypatch.setattr(Path, "read_text", lambda self: "def f():\n    from ..samplers.smc import smc\n")
    assert upward(path) == {"steer.samplers.smc"}


@pytest.mark.slow
def test_a_users_own_search_and_rewards_do_not_collide(tmp_path):
    """GRPO repositories have a search.py and a rewards.py; Python puts their folder first on the path."""
    for name in ("search.py", "rewards.py"):
        (tmp_path / name).write_text("raise ImportError('the wrong module')\n")
    script = (
        "import steer\nfrom steer import rewards\n"
        "process = steer.load('digits', steps=2)\n"
        "print(steer.sample(process, rewards.Ink(), method='best_of_n', budget=8).x.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=ENV)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([1, 4,")


def test_import_is_quick_and_light():
    """Beyond torch, `import steer` takes under a second and brings no heavy package with it."""
    script = (
        "import time, sys, torch\n"
        "began = time.process_time()\n"
        "import steer, steer.search, steer.rewards\n"
        "heavy = {'diffusers', 'transformers', 'matplotlib', 'PIL', 'ray', 'scipy', 'typer', 'rich'}\n"
        "heavy |= {'numba', 'triton'}\n"
        "print(time.process_time() - began, *(heavy & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    seconds, *heavy = out.split()
    assert float(seconds) < 1.0
    assert heavy == []
