"""Styles, scripts and templates of the reports: they parse, and what one names the others have."""

import base64
import hashlib
import re
import shutil
import subprocess

import jinja2
import pytest

import steer
from steer import search
from steer.report.page import ASSETS, _templates, asset, render
from steer.report.tree_figure import SHADES

NAMES = sorted(path.name for path in ASSETS.iterdir())


def named(ending):
    return [name for name in NAMES if name.endswith(ending)]


def rules(css):
    """(selector, declarations) of a style sheet, those inside @media too; AssertionError where it does not parse."""
    css, found, selector, text = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL), [], [], ""
    for character in css:
        if character == "{":
            assert text.strip(), "a block without a selector"
            selector.append(" ".join(text.split()))
            text = ""
        elif character == "}":
            assert selector, "a block that was not opened"
            name = selector.pop()
            if not name.startswith("@"):
                *lines, rest = text.split(";")
                assert not rest.strip(), f"{name}: {rest.strip()!r} does not end"
                pairs = [line.partition(":") for line in lines]
                assert all(key.strip() and colon and value.strip() for key, colon, value in pairs), name
                found.append((name, {key.strip(): value.strip() for key, _, value in pairs}))
            text = ""
        else:
            text += character
    assert not selector, f"{selector} is not closed"
    assert not text.strip(), f"{text.strip()!r} belongs to nothing"
    return found


def test_assets_are_what_is_tested_here():
    assert {name.partition(".")[2] for name in NAMES} == {"html.j2", "css", "js"}


@pytest.mark.parametrize("name", named(".css"))
def test_styles_parse(name):
    found = rules(asset(name))
    assert len(found) > 10
    for selector, declarations in found:
        assert all(re.fullmatch(r"(--)?[a-z][a-z-]*", key) for key in declarations), selector
        assert all(value.count("(") == value.count(")") for value in declarations.values()), selector
    assert "</" not in asset(name)  # nothing that closes the element around it
    assert not re.search(r"@import|url\(|expression", asset(name))


@pytest.mark.parametrize("bad", ["a {b: c", "a {b: c}", "a b: c;}", "a {b c;}", "a {b: c;} d", "{b: c;}"])
def test_styles_that_do_not_parse_are_seen(bad):
    with pytest.raises(AssertionError):
        rules(bad)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("name", named(".js"))
def test_scripts_parse(name, tmp_path):
    done = subprocess.run(["node", "--check", str(ASSETS / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "bad.js").write_text(asset(name).replace("{", "", 1))
    assert subprocess.run(["node", "--check", str(tmp_path / "bad.js")], capture_output=True).returncode != 0


@pytest.mark.parametrize("name", named(".js"))
def test_scripts_stay_inside_the_page(name):
    script = asset(name)
    assert "</" not in script
    assert not re.search(r"https?:|innerHTML|outerHTML|insertAdjacent|eval|Function\(|fetch|XMLHttp|import", script)


@pytest.mark.parametrize("name", named(".j2"))
def test_templates_compile_and_escape(name):
    _templates().get_template(name)
    assert not re.search(r"\|\s*safe\b|autoescape|Markup", (ASSETS / name).read_text())


def test_a_name_that_is_not_given_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        render("tree.html.j2", count=3)


def test_shades_of_the_figure_are_those_of_the_style():
    shades = [name for name, _ in rules(asset("tree.css")) if re.fullmatch(r"\.tree \.v\d", name)]
    assert shades == [f".tree .v{i}" for i in range(SHADES)]


@pytest.mark.slow
def test_the_page_allows_its_own_script_and_no_other(tmp_path):
    process = steer.models.gaussian_mixture([[0.0, 0.0]], [1.0], steps=4)

    def first(x):
        return x[:, 0]

    pages = {
        "tree": search.dts(process, first, particles=8, levels=2).report(tmp_path / "a").read_text(),
        "plain": steer.smc(process, first, particles=4).report(tmp_path / "b").read_text(),
    }
    for name, page in pages.items():
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
        scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
        assert len(scripts) == (1 if name == "tree" else 0)
        allowed = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
        assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'")
        assert policy.endswith("script-src " + (f"'sha256-{allowed[0]}'" if allowed else "'none'"))
