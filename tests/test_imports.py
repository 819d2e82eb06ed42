"""The rules of the house, read off the source: who imports whom, what never appears, how long `import steer` takes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for package in ("steer", "rewards", "search") for p in (ROOT / package).rglob("*.py"))
KNOWS_ALL = {ROOT / "steer" / "cli.py", ROOT / "steer" / "cli_input.py"}
# A law that the user asked for and that is biased, or may not exist, is no numerical failure: it runs, with a warning.
WARNINGS_MEANT = {("weighted_loop.py", "warnings.warn")}
AT_MODULE_LEVEL = {
    "steer": {"torch", "steer"},
    "rewards": {"torch", "steer", "rewards"},
    "search": {"torch", "numpy", "steer", "search"},  # torch imports numpy anyway
}


def imports(tree: ast.AST, path: Path) -> set[str]:
    """Dotted names of the modules a tree imports, relative ones made absolute."""
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            found.add(".".join([*base, *([node.module] if node.module else [])]))
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text())
    if path in KNOWS_ALL:
        return
    reached = {name.split(".")[0] for name in imports(tree, path)} & {"steer", "rewards", "search"}
    assert reached <= {"steer": {"steer"}, "rewards": {"steer", "rewards"}, "search": {"steer", "search"}}[package]
    if package == "rewards":
        from_steer = {name for name in imports(tree, path) if name.split(".")[0] == "steer"}
        assert from_steer <= {"steer.errors", "steer.types"}, from_steer
    standard = set(sys.stdlib_module_names)
    top = {name.split(".")[0] for name in imports(module_level(tree), path)} - standard
    assert top <= AT_MODULE_LEVEL[package], f"import {top - AT_MODULE_LEVEL[package]} inside the function that needs it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unsafe_or_global(path):
    """No pickle, no evaluation of text, no remote code, no draws from a global generator, no silent repairs."""
    tree = ast.parse(path.read_text())
    banned_calls = {"eval", "exec", "torch.load", "torch.save", "torch.randn", "torch.rand", "torch.randn_like"}
    banned_calls |= {"torch.rand_like", "torch.manual_seed", "torch.nan_to_num", "warnings.warn"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if (path.name, ast.unparse(node.func)) in WARNINGS_MEANT:
                continue
            assert ast.unparse(node.func) not in banned_calls, f"line {node.lineno}: {ast.unparse(node)}"
            assert not any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
    assert not imports(tree, path) & {"pickle", "cloudpickle", "dill", "shelve"}


def test_this_test_can_fail(tmp_path):
    """The checks see what they look for."""
    bad = "import pickle\nimport numpy\ndef f():\n    import PIL\n    return torch.randn(3)\n"
    tree = ast.parse(bad)
    path = ROOT / "steer" / "bad.py"
    assert imports(tree, path) == {"pickle", "numpy", "PIL"}
    assert imports(module_level(tree), path) == {"pickle", "numpy"}
    assert imports(ast.parse("from ..errors import X\nfrom . import y"), ROOT / "steer/models/z.py") == {
        "steer.errors",
        "steer.models",
    }


def test_import_is_quick_and_light():
    """Beyond torch, `import steer` takes under a second and brings no heavy package with it."""
    script = (
        "import time, sys, torch\n"
        "began = time.process_time()\n"
        "import steer, steer.search, steer.rewards\n"
        "heavy = {'diffusers', 'transformers', 'matplotlib', 'PIL', 'ray', 'scipy', 'typer', 'rich'}\n"
        "print(time.process_time() - began, *(heavy & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    seconds, *heavy = out.split()
    assert float(seconds) < 1.0
    assert heavy == []
