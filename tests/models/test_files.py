"""Files of models: those that ship with steer are checked bit by bit, and damaged folders are named."""

import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load, save

import steer
from steer.files import DIGESTS, check_digests, write_digests
from steer.models import embedded

ROOT = Path(__file__).parents[2]
FOLDERS = [path for package in ("steer", "rewards") for path in sorted((ROOT / package / "assets").iterdir())]
WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(ROOT / "steer" / "assets" / "digits", tmp_path / "digits")
    (tmp_path / "digits" / DIGESTS).chmod(0o644)
    return tmp_path / "digits"


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.name)
def test_every_embedded_model_has_digests_of_what_is_read(path, tmp_path):
    check_digests(path)
    before = (path / DIGESTS).read_text()
    assert any(line.endswith(".safetensors") for line in before.splitlines())
    shutil.copytree(path, tmp_path / "copy")
    assert write_digests(tmp_path / "copy").read_text() == before


@pytest.mark.parametrize("name", ["digits", "digits-flow", "letters"])
def test_loading_looks_at_the_digests(name, tmp_path, monkeypatch):
    copy = tmp_path / "assets" / name
    shutil.copytree(ROOT / "steer" / "assets" / name, copy)
    monkeypatch.setattr(embedded, "files", lambda package: tmp_path)
    steer.load(name, steps=2)
    weights = next(copy.rglob("*.safetensors"))
    blob = weights.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(blob)), 5):
        broken = bytearray(blob)
        broken[bit // 8] ^= 1 << bit % 8
        weights.write_bytes(broken)
        with pytest.raises(steer.ModelError, match=weights.name):
            steer.load(name, steps=2)
    weights.write_bytes(blob)
    (copy / DIGESTS).unlink()
    with pytest.raises(steer.ModelError, match=DIGESTS):
        steer.load(name, steps=2)


def test_classifiers_are_checked_too(tmp_path, monkeypatch):
    from steer.rewards import digits

    shutil.copytree(ROOT / "rewards" / "assets", tmp_path / "assets")
    monkeypatch.setattr(digits.resources, "files", lambda package: tmp_path)
    weights = tmp_path / "assets" / "digits-judge" / "model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    digits.load_digit_net("digits-classifier")
    with pytest.raises(steer.ModelError, match=r"model\.safetensors"):
        digits.load_digit_net("digits-judge")


def test_a_folder_with_digests_is_checked_by_from_hub(folder):
    steer.from_hub(folder, steps=2)
    blob = bytearray((folder / WEIGHTS).read_bytes())
    blob[-1] ^= 1
    (folder / WEIGHTS).write_bytes(blob)
    with pytest.raises(steer.ModelError, match=WEIGHTS.name):
        steer.from_hub(folder, steps=2)


@pytest.mark.parametrize(
    "index", [{"_class_name": "NoSuch"}, {"_class_name": "os.system"}, {"_class_name": "../../evil"}, [], None, "text"]
)
def test_class_names_that_are_none_are_named(folder, index):
    (folder / DIGESTS).unlink()
    path = folder / "model_index.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), **index} if isinstance(index, dict) and index else index)
    )
    with pytest.raises(steer.ModelError, match=r"model_index\.json"):
        steer.from_hub(folder, steps=2)


@pytest.mark.parametrize("missing", [1, 20])
def test_weights_that_are_not_all_there_are_named(folder, missing):
    (folder / DIGESTS).unlink()
    tensors = load((folder / WEIGHTS).read_bytes())
    for name in sorted(tensors)[:missing]:
        del tensors[name]
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    with pytest.raises(steer.ModelError, match=f"lack {missing} weight"):
        steer.from_hub(folder, steps=2)
