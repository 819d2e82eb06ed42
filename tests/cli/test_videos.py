"""Videos from the command line: a Wan folder, from one prompt and from a file of them, to the end."""

import json

import pytest
import tiny_pipelines
import torch
from PIL import Image
from typer.testing import CliRunner

import steer
from steer import rewards
from steer.cli import app

CALL = {"guidance_scale": 5, "height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}


def run(*words, code=0):
    done = CliRunner().invoke(app.app, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


@pytest.mark.slow
def test_every_command_takes_a_model_of_videos(tmp_path):
    pipe, _ = tiny_pipelines.build("wan")
    folder = str(tmp_path / "wan")
    pipe.save_pretrained(folder)
    model = ["--model", folder, "--reward", "frames:jpeg", "--steps", 2]
    for name, value in CALL.items():
        model += ["--call", f"{name}={value}"]

    one = tmp_path / "one"
    words = [*model, "--prompt", "a fox runs"]
    run("generate", *words, "--particles", 3, "--n", 2, "--reference", 0, "--out", one)
    process = steer.from_hub(folder, prompt="a fox runs", steps=2, **CALL)
    expected = steer.smc(process, rewards.from_specs(["frames:jpeg"]), particles=3, key=0)
    assert torch.equal(steer.load_run(one).tensors["x"], expected.x)
    assert sorted(path.name for path in (one / "videos").iterdir()) == ["00.webp", "01.webp"]
    assert Image.open(one / "videos/00.webp").size == (16, 16)
    (one / "report.html").unlink()
    run("report", one, "--n", 2)
    assert (one / "report.html").read_text().count("data:image/webp") == 2
    run("preflight", *words, "--json")
    run("compare", *words, "--budget", 12, "--keys", 1, "--methods", "smc", "--n", 2, "--out", tmp_path / "compared")
    assert (tmp_path / "compared/smc/images.webp").exists()

    many, prompts = tmp_path / "many", tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"a {what} runs"}) for what in ("fox", "dog", "cat")))
    run("generate", *model, "--prompts", prompts, "--particles", 2, "--out", many)
    names = [json.loads(line)["file_name"] for line in (many / "metadata.jsonl").read_text().splitlines()]
    assert names == [f"images/000/00000{index}-00.webp" for index in range(3)]
    before = [(many / name).read_bytes() for name in names]
    (many / "rows/000/000001/result.json").unlink()
    run("resume", many)
    assert [(many / name).read_bytes() for name in names] == before
    run("report", many / "rows/000/000001", "--out", tmp_path / "row")
    page = (tmp_path / "row/report.html").read_text()
    assert "a dog runs" in page
    assert "data:image/webp" in page
