"""Exports of a run directory: what is in them is what the directory says, and what other tools expect to find."""

import io
import json
import tarfile

import pytest
from PIL import Image

import steer
from steer.errors import PromptError, RunDirectoryError
from steer.generation import exports
from steer.generation.prompts import Row
from steer.generation.run_directory import RunDirectory

TAGS = ("fox", "car", "tree", "boat")
# A prompt as in GenEval's evaluation_metadata.jsonl.
ROWS = [
    Row(i, f"a photo of a {tag}", {}, {"tag": "single_object", "include": [{"class": tag, "count": 1}]})
    for i, tag in enumerate(TAGS)
]


def grey(prompt, **call):
    return steer.from_denoiser(lambda x, t: 0.5 * x, steer.VP(), 3, event=(1, 8, 8), decoder=lambda x: x.sigmoid())


def brightness(images):
    return images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of four rows, two samples kept of each; row 2 is not finished."""
    maker = steer.Generator(grey, reward=brightness, method="best_of_n", particles=3, keep=2, options={"keep": 3})
    directory = RunDirectory.open(tmp_path_factory.mktemp("runs") / "run", {}, ROWS)
    for index in (0, 1, 3):
        assert maker.make(directory, ROWS[index]) is None
    return directory


def pictures(run, index):
    return [(run.path / entry["file_name"]).read_bytes() for entry in run.entries(index)]


def test_parquet_holds_the_metadata_and_the_pictures(run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    (path,) = exports.write_parquet(run, tmp_path / "out")
    lines = parquet.read_table(path).to_pylist()
    images = [line.pop("image") for line in lines]
    assert lines == list(run.metadata())
    assert [image["bytes"] for image in images] == [png for index in (0, 1, 3) for png in pictures(run, index)]


def test_datasets_reads_the_pictures_of_parquet(run, tmp_path):
    datasets = pytest.importorskip("datasets")
    (path,) = exports.write_parquet(run, tmp_path / "out")
    rows = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows[3]["image"].tobytes() == Image.open(io.BytesIO(pictures(run, 1)[1])).tobytes()
    assert rows[3]["include"] == [{"class": "car", "count": 1}]


def test_a_column_of_two_types_is_named(run, tmp_path):
    pytest.importorskip("pyarrow")
    maker = steer.Generator(grey, reward=brightness, method="best_of_n", particles=1)
    rows = [Row(i, "a", {}, {"tag": tag}) for i, tag in enumerate((3, "three"))]
    mixed = RunDirectory.open(tmp_path / "run", {}, rows)
    for row in mixed.rows:
        maker.make(mixed, row)
    with pytest.raises(RunDirectoryError, match="tag has int, str"):
        exports.write_parquet(mixed, tmp_path / "out")


def members(path):
    """Of a shard, grouped by key as WebDataset does: what comes before the first dot of a name."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            assert key not in found or key == list(found)[-1]  # the files of a sample follow one another
            found.setdefault(key, {})[kind] = tar.extractfile(member).read()
    return found


def test_shards_are_as_webdataset_expects(run, tmp_path):
    shards = exports.write_webdataset(run, tmp_path / "out", rows_per_shard=2)
    assert [path.name for path in shards] == ["000000.tar", "000001.tar"]
    first, second = map(members, shards)
    assert list(first) == ["000000-00", "000000-01", "000001-00", "000001-01"]
    assert list(second) == ["000003-00", "000003-01"]
    assert [sample["png"] for sample in second.values()] == pictures(run, 3)
    assert [json.loads(sample["json"]) for sample in second.values()] == run.entries(3)
    again = exports.write_webdataset(run, tmp_path / "again", rows_per_shard=2)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in shards]


def test_folders_are_as_geneval_expects(run, tmp_path):
    """The names and keys that its evaluate_images.py reads."""
    folders = exports.write_geneval(run, tmp_path / "out")
    assert [folder.name for folder in folders] == ["00000", "00001", "00003"]
    said = json.loads((tmp_path / "out/00001/metadata.jsonl").read_text())
    assert said == {"tag": "single_object", "include": [{"class": "car", "count": 1}], "prompt": "a photo of a car"}
    assert [path.read_bytes() for path in sorted((folders[1] / "samples").iterdir())] == pictures(run, 1)
    assert sorted(path.name for path in (folders[1] / "samples").iterdir()) == ["0000.png", "0001.png"]


@pytest.mark.parametrize("form", exports.FORMS)
def test_what_cannot_be_exported_is_refused(run, form, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").touch()
    with pytest.raises(RunDirectoryError, match="new or an empty"):
        exports.FORMS[form](run, tmp_path / "full")
    empty = RunDirectory.open(tmp_path / "run", {}, ROWS)
    with pytest.raises(RunDirectoryError, match="no finished row"):
        exports.FORMS[form](empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_geneval_needs_prompts_and_pictures(tmp_path):
    maker = steer.Generator("letters", reward="letters:e", method="best_of_n", particles=2, steps=2)
    directory = RunDirectory.open(tmp_path / "run", {}, maker.rows([{}]))
    assert maker.make(directory, directory.rows[0]) is None
    with pytest.raises(RunDirectoryError, match="row 0 has none"):
        exports.write_geneval(directory, tmp_path / "out")
    (shard,) = exports.write_webdataset(directory, tmp_path / "out")
    assert [list(sample) for sample in members(shard).values()] == [["json"]]


@pytest.mark.parametrize("name", ["score", "index", "reward.clip"])
def test_a_column_that_the_metadata_would_write_over_is_refused(name, tmp_path):
    with pytest.raises(PromptError, match=f"{name} is what metadata.jsonl says"):
        RunDirectory.open(tmp_path, {}, [Row(0, "a", {}, {name: 1.0})])
    assert not list(tmp_path.iterdir())
