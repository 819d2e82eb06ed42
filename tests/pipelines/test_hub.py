"""Pipelines from a folder, as from the Hub: safetensors, no code, and errors that say what to do."""

import json

import pytest
import torch
from tiny_pipelines import build

import steer


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "sd15"
    pipe, call = build("sd15")
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder, pipe, call


def test_a_folder_is_the_pipeline_saved_in_it(saved):
    folder, pipe, call = saved
    process = steer.from_hub(folder, steps=3, **call)
    expected = steer.from_pipeline(pipe, steps=3, **call)
    x = expected.prior(steer.Key(0), 1, 2)
    assert torch.equal(process.denoise(x, 1), expected.denoise(x, 1))
    assert torch.equal(process.decode(x), expected.decode(x))
    assert process.prompts == ("a cat",)
    half = steer.from_hub(str(folder), dtype=torch.bfloat16, device="cpu", steps=3, **call)
    assert half.denoiser.call.user_pipe.unet.dtype == torch.bfloat16
    assert half.denoise(x, 1).dtype == torch.float32


def test_pickled_weights_are_refused(saved, tmp_path):
    _, pipe, call = saved
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert list((tmp_path / "unet").glob("*.bin"))
    # transformers 5 writes safetensors all the same; 4 obeys, and the text encoder is the first that is refused
    with pytest.raises(steer.ModelError, match=r"(unet|text_encoder) has .*\.bin only.*safe_serialization=True"):
        steer.from_hub(tmp_path, steps=3, **call)


def test_a_folder_of_one_pickled_part_is_refused(saved, tmp_path):
    folder, _, call = saved
    for path in folder.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    part = tmp_path / "text_encoder"
    for path in part.glob("*.safetensors"):
        path.rename(part / "pytorch_model.bin")
    with pytest.raises(steer.ModelError, match=r"text_encoder has its weights as pytorch_model\.bin only"):
        steer.from_hub(tmp_path, steps=3, **call)


def test_code_of_a_repository_does_not_run(saved, tmp_path):
    folder, _, call = saved
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "Stolen"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "pipeline.py").write_text("raise SystemExit('this ran')\n")
    with pytest.raises(steer.ModelError, match="runs no code"):
        steer.from_hub(tmp_path, steps=3, **call)


def test_what_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(steer.ModelError, match=r"no model_index\.json"):
        steer.from_hub(tmp_path)
    with pytest.raises(steer.ModelError, match="no pipeline could be loaded from 'nobody/nothing'"):
        steer.from_hub("nobody/nothing", local_files_only=True)
