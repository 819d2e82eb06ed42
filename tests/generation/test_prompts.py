"""Files of prompts: the four kinds say the same, and what would waste a run is refused."""

import json

import pytest

from steer.errors import PromptError, SteerError
from steer.generation.place import Place, place
from steer.generation.prompts import Row, call_arguments, read_prompts, rows_of

ACCEPTED = ["prompt", "guidance_scale", "height", "negative_prompt"]
ENTRIES = [
    {"prompt": "a red fox, in snow", "guidance_scale": 5.0, "tag": "fox"},
    {"prompt": "zwölf Bären", "guidance_scale": 2.5, "tag": "bear"},
]


def test_the_kinds_of_file_say_the_same(tmp_path):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in ENTRIES) + "\n\n", "utf-8")
    table = tmp_path / "prompts.csv"
    table.write_text('prompt,guidance_scale,tag\n"a red fox, in snow",5.0,fox\nzwölf Bären,2.5,bear\n', "utf-8")
    assert read_prompts(lines) == read_prompts(table) == ENTRIES
    text = tmp_path / "prompts.txt"
    text.write_text("a red fox, in snow\n\n  zwölf Bären  \n", "utf-8")
    assert read_prompts(text) == [{"prompt": entry["prompt"]} for entry in ENTRIES]


def test_parquet(tmp_path):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(table.Table.from_pylist(ENTRIES), tmp_path / "prompts.parquet")
    assert read_prompts(tmp_path / "prompts.parquet") == ENTRIES


def test_columns_are_arguments_or_notes():
    first, second = rows_of(ENTRIES, ACCEPTED)
    assert first == Row(0, "a red fox, in snow", {"guidance_scale": 5.0}, {"tag": "fox"})
    assert second.index == 1


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"prompt": "a", "guidance_scal": 5}, "did you mean guidance_scale"),
        ({"prompt": "a", "num_inference_steps": 5}, "set steps"),
        ({"guidance_scale": 5}, "row 0 has no prompt"),
        ({"prompt": 3}, "row 0 has no prompt"),
    ],
)
def test_what_would_waste_a_run_is_refused(entry, words):
    with pytest.raises(PromptError, match=words):
        rows_of([entry], ACCEPTED)


def test_a_prompt_for_a_model_without_is_refused():
    with pytest.raises(PromptError, match="takes none"):
        rows_of([{"prompt": "a"}], ["label"])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("prompts.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2 of"),
        ("prompts.jsonl", '"a"\n', "must be an object"),
        ("prompts.csv", "prompt,height\na\n", "line 2 of"),
        ("prompts.txt", "\n\n", "holds no prompts"),
        ("prompts.docx", "", "come from .txt"),
    ],
)
def test_unreadable_files_say_where(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=words):
        read_prompts(tmp_path / name)
    with pytest.raises(PromptError, match="cannot read"):
        read_prompts(tmp_path / "missing.txt")


def test_call_arguments():
    assert call_arguments(["height=768", "negative_prompt=blurry", "flag=true"]) == {
        "height": 768,
        "negative_prompt": "blurry",
        "flag": True,
    }
    with pytest.raises(PromptError, match="NAME=VALUE"):
        call_arguments(["height"])
    with pytest.raises(PromptError, match="set the seed"):
        call_arguments(["generator=3"])


def test_place_is_what_launchers_say():
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "6"}
    step = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0"}
    assert place(None, {}) == Place(0, 1, 0)
    assert place(None, torchrun) == Place(5, 8, 1)
    assert place(None, array) == Place(3, 6, 0)
    assert place(None, step) == Place(2, 3, 0)
    assert place("1/4", torchrun) == Place(1, 4, 0)
    for shard in ("4/4", "1", "a/b"):
        with pytest.raises(SteerError):
            place(shard, {})
