"""What a user installs: the wheel's files, its import from any directory, versions, and names of extras."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from steer import __version__

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = {"steer": "steer", "rewards": "steer/rewards", "search": "steer/search"}
"""Each folder of the repository, and where the wheel holds it."""
NO_SOURCE = ("__pycache__", "*.pyc", "*.egg-info")


def run(*words, cwd, path):
    """stdout of a command of this interpreter, run in `cwd` with `path` before everything that is installed."""
    env = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository's packages and what builds them, without traces of builds and installations."""
    root = tmp_path_factory.mktemp("copy")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(*NO_SOURCE))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    return root


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory):
    """The wheel, built in seconds from a copy of the copy: setuptools leaves a build/ behind."""
    out = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(copy, out / "source")
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out, path="")
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def target(wheel, tmp_path_factory):
    """A bare directory that the wheel is installed into."""
    folder = tmp_path_factory.mktemp("target")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel, cwd=folder, path="")
    return folder


def test_the_wheel_holds_every_file(copy, wheel):
    """Modules, embedded weights and their cards, what the report reads, and py.typed of all three."""
    files = (path for path in copy.rglob("*") if path.is_file())
    sources = (path.relative_to(copy) for path in files)
    expected = {
        "/".join((FOLDERS[path.parts[0]], *path.parts[1:])) for path in sources if path.parts[0] in FOLDERS
    }  # fmt: skip
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert sorted(expected ^ held) == []
    assert {f"{place}/py.typed" for place in FOLDERS.values()} <= held
    assert "steer/assets/digits/unet/diffusion_pytorch_model.safetensors" in held
    assert "steer/rewards/assets/digits-judge/model.safetensors" in held


@pytest.mark.slow
def test_it_runs_from_any_directory(target, tmp_path):
    script = (
        "import steer\n"
        "from steer import rewards, search\n"
        "process = steer.load('digits', steps=2)\n"
        "result = steer.sample(process, rewards.DigitLogProb(3), method='best_of_n', budget=8)\n"
        "print(steer.__file__, search.__file__, rewards.__file__, tuple(result.x.shape), sep='\\n')\n"
    )
    *files, shape = run("-c", script, cwd=tmp_path, path=target).splitlines()
    assert files == [str(target / place / "__init__.py") for place in ("steer", "steer/search", "steer/rewards")]
    assert shape == "(1, 4, 1, 8, 8)"


@pytest.mark.slow
def test_all_versions_agree(target, tmp_path):
    script = "from importlib.metadata import version; print(version('steer-diffusion'))"
    assert run("-c", script, cwd=tmp_path, path=target) == __version__
    assert run("-m", "steer", "--version", cwd=tmp_path, path=target).split()[-1] == __version__
    assert run(target / "bin" / "steer", "--version", cwd=tmp_path, path=target).split()[-1] == __version__
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert cited
    assert cited[1] == __version__
    assert f"\n## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_methods_resolve_without_installed_metadata(copy, tmp_path):
    script = (
        "import importlib.metadata as metadata\n"
        "metadata.Distribution.discover = classmethod(lambda *args, **options: iter(()))\n"
        "import steer\n"
        "from steer.evaluation.methods import resolve\n"
        "assert not list(metadata.distributions())\n"
        "print(steer.__file__, *(name for name in steer.methods() if callable(resolve(name))))\n"
    )
    file, *names = run("-c", script, cwd=tmp_path, path=copy).split()
    assert file == str(copy / "steer" / "__init__.py")
    assert {"smc", "best_of_n", "dts_star", "noise_search", "rbf"} <= set(names)


def test_extras_that_texts_name_exist_and_are_explained():
    """An error or a docstring that says pip install 'steer-diffusion[x]' is right, and the docs say what x is for."""
    folders = (*FOLDERS, "docs")
    texts = [
        path.read_text(encoding="utf-8")
        for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".md")
    ]  # fmt: skip
    named = {extra for text in texts for found in re.findall(r"steer-diffusion\[([\w,]+)\]", text)
             for extra in found.split(",")}  # fmt: skip
    named |= {extra for text in texts for extra in re.findall(r'optional\w*\("[\w.]+", "(\w+)"\)', text)}
    extras = set(PROJECT["optional-dependencies"])
    assert {"vlm", "molecules"} <= named <= extras
    for page in ("README.md", "docs/installation.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [extra for extra in sorted(extras) if f"`{extra}`" not in text] == [], page


def test_every_base_dependency_has_one_lower_bound():
    """From which .ci/lowest derives its pins."""
    for line in PROJECT["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=\d+(\.\d+)*", line), line
