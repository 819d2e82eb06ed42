"""docs/extending.md runs as it stands, and the public checks accept what it builds."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_snippet_of_the_page_runs():
    names: dict = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "docs/extending.md", "exec"), names)
    assert names["result"].law == "target"


def test_a_snippet_that_breaks_its_contract_stops_the_page():
    """The checks in the page are checks: a resampler that forgets its weights is refused there."""
    (snippet,) = [text for text in SNIPPETS if "def shuffled_systematic" in text]
    broken = snippet.replace("log_weight.gather(1, order), key", "log_weight * 0.5, key")
    assert broken != snippet
    names: dict = {}
    exec(compile(SNIPPETS[0], "docs/extending.md", "exec"), names)
    with pytest.raises(AssertionError, match="copies"):
        exec(compile(broken, "docs/extending.md", "exec"), names)
