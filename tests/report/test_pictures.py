"""Samples that move: files, run directories and pages of videos."""

import io
import json
import re

import pytest
import torch
from PIL import Image

import steer
from steer.cli.outputs import write_comparison_files, write_run
from steer.errors import RunDirectoryError, ShapeError
from steer.generation import exports
from steer.generation.run_directory import RunDirectory
from steer.report.pictures import Video, is_videos, sheet, thumbnail, to_array, to_file, to_pictures

FRAMES = 5


def process():
    """Samples are videos [M, 5, 3, 16, 16]."""
    return steer.from_denoiser(
        lambda x, t: 0.5 * x, steer.VP(), 3, event=(FRAMES, 3, 16, 16), decoder=lambda x: (0.5 + 0.2 * x).clamp(0, 1)
    )


def brightness(videos):
    return videos.flatten(1).mean(1)


def maker(**options):
    return steer.Generator(process(), reward=brightness, particles=4, keep=2, **options)


def run(path, rows=2):
    directory = RunDirectory.open(path, {}, maker().rows([{"tag": i} for i in range(rows)]))
    assert not any(error for _, error in maker().run(directory, range(rows)))
    directory.gather()
    return directory


def smooth(channels=3):
    """Two videos of six frames that a lossy file keeps well."""
    ramp = torch.linspace(0, 1, 32)
    frames = torch.stack([(ramp[:, None] + ramp + shift / 6) / 3 for shift in range(6)])
    return frames[None, :, None].expand(2, 6, channels, 32, 32)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_video_is_a_file_that_shows_its_frames(channels):
    decoded = smooth(channels)
    assert is_videos(decoded)
    first, second = to_pictures(decoded)
    suffix, blob = to_file(first)
    assert (suffix, blob) == (".webp", to_file(second)[1])  # the same frames are the same bytes
    opened = Image.open(io.BytesIO(blob))
    assert (opened.n_frames, opened.size, opened.info["loop"]) == (6, (32, 32), 0)
    for place, frame in enumerate(first.frames):
        opened.seek(place)
        opened.load()
        assert opened.info["duration"] == round(1000 / 16)
        gap = to_array(opened.convert("RGB")).astype(int) - to_array(frame.convert("RGB"))
        assert abs(gap).mean() < 3.0  # of 255; another frame is 14 away
    assert to_array(first).shape == (6, 32, 32, channels)[: 3 if channels == 1 else 4]


def test_what_is_no_video():
    assert not is_videos(torch.rand(2, 3, 8, 8))
    assert not is_videos(torch.rand(2, 6, 2, 8, 8))
    with pytest.raises(ShapeError, match="pictures need floats"):
        to_pictures(torch.rand(2, 6, 2, 8, 8))


def test_videos_are_small_on_a_page_and_side_by_side_in_a_sheet():
    tall = Video(tuple(Image.new("RGB", (300, 600)) for _ in range(2)))
    small = thumbnail(tall)
    assert (small.width, small.height, len(small.frames)) == (128, 256, 2)
    beside = sheet(smooth())
    assert (beside.width, beside.height, len(beside.frames)) == (2 * 96 + 3 * 2, 96 + 2 * 2, 6)


def test_a_run_directory_of_videos_is_a_data_set_of_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    directory = run(tmp_path / "run")
    names = [f"images/000/00000{row}-0{number}.webp" for row in range(2) for number in range(2)]
    assert [entry["file_name"] for entry in directory.metadata()] == names
    loaded = datasets.load_dataset("imagefolder", data_dir=str(directory.path), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["tag"] == [0, 0, 1, 1]
    assert loaded["train"][0]["image"].n_frames == FRAMES
    before = [(directory.path / name).read_bytes() for name in names]
    assert len(set(before)) == 4
    directory.forget(0)
    assert not (directory.path / names[0]).exists()
    list(maker().run(directory, range(2)))
    assert [(directory.path / name).read_bytes() for name in names] == before


def test_videos_are_exported_as_what_they_are(tmp_path):
    prompted = steer.Generator(lambda prompt: process(), reward=brightness, particles=4, keep=2)
    directory = RunDirectory.open(tmp_path / "run", {}, prompted.rows([{"prompt": "a fox runs"}]))
    list(prompted.run(directory, [0]))
    (shard,) = exports.write_webdataset(directory, tmp_path / "web")
    import tarfile

    with tarfile.open(shard) as tar:
        assert tar.getnames() == ["000000-00.webp", "000000-00.json", "000000-01.webp", "000000-01.json"]
    with pytest.raises(RunDirectoryError, match="of images with prompts"):
        exports.write_geneval(directory, tmp_path / "geneval")


def test_columns_hold_all_frames():
    found = maker()({"index": [3]})
    assert [image.shape for image in found["image"]] == 2 * [(FRAMES, 16, 16, 3)]


def test_pages_and_single_runs_show_videos(tmp_path):
    result = steer.smc(process(), brightness, particles=4, key=0)
    (tmp_path / "videos").mkdir()
    for name in ("09.webp", "mine.webp"):
        (tmp_path / "videos" / name).write_bytes(b"")
    (tmp_path / "images.png").write_bytes(b"")
    write_run(result, result, tmp_path, 3, "videos", {}, {})
    assert {path.name for path in (tmp_path / "videos").iterdir()} == {"00.webp", "01.webp", "02.webp", "mine.webp"}
    assert not (tmp_path / "images.png").exists()
    shown = json.loads((tmp_path / "result.json").read_text())["run"]["shown"][0]
    best = to_pictures(result.take(torch.tensor([shown[:1]])).decoded)[0]
    assert (tmp_path / "videos/00.webp").read_bytes() == to_file(best)[1]
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall("src=.data:image/webp;base64,", page)) == 3 + 3  # and as many unsteered
    table = steer.compare(process(), brightness, methods=["smc"], budget=12, keys=1)
    write_comparison_files(table, tmp_path, 2, "videos", {})
    assert not (tmp_path / "videos/00.webp").exists()
    assert Image.open(tmp_path / "smc/images.webp").n_frames == FRAMES
    assert "data:image/webp" in (tmp_path / "report.html").read_text()
