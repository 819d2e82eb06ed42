"""Docstrings of public functions: one line that ends with a period, and an `Args` section with every parameter."""

import inspect
import re

import pytest

import steer
from steer import grpo, guidance, rewards, search

MODULES = (steer, search, rewards, grpo, guidance)
ARGS = re.compile(r"^Args:\n((?: {4}.*\n|\n)+)", re.MULTILINE)
HEAD = re.compile(r"^ {4}([\w*]+(?:, [\w*]+)*): ", re.MULTILINE)
# "Args, Returns: as `x`." stands for the section, "Others: as `x` and `y`." in it for the parameters it leaves out.
AS_ANOTHER = re.compile(r"^Args(?:, Returns| and returns)?: as ((?:`[\w.]+`(?: and )?)+)", re.MULTILINE)
OTHERS = re.compile(r"^ {4}Others: as ((?:`[\w.]+`(?: and )?)+)", re.MULTILINE)


def parameters(function) -> set[str]:
    """Names of its parameters."""
    return set(inspect.signature(function).parameters)


FUNCTIONS = {
    f"{function.__module__}.{function.__name__}": function
    for module in MODULES
    for function in (getattr(module, name) for name in module.__all__)
    if inspect.isfunction(function) and parameters(function)
}


def named(name: str):
    """The public function that a docstring calls `name`, with or without its module."""
    name = name.rpartition(".")[2]
    return next(getattr(module, name) for module in MODULES if hasattr(module, name))


def documented(function) -> set[str]:
    """Parameters that its docstring says something about, and those of the functions that it refers to for them."""
    doc = (inspect.getdoc(function) or "") + "\n"
    section = ARGS.search(doc)
    text = section[1] if section else ""
    found = {name.lstrip("*") for head in HEAD.findall(text) for name in head.split(", ")}
    for other in (*AS_ANOTHER.findall(doc), *OTHERS.findall(text)):
        found |= set().union(*(documented(named(name)) for name in re.findall(r"`([\w.]+)`", other)))
    return found


def test_there_are_functions_to_check():
    assert len(FUNCTIONS) > 100


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_args_name_every_parameter(function):
    missing = parameters(function) - documented(function)
    assert not missing, f"say under `Args:` in its docstring what {sorted(missing)} of {function.__name__} is"


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_args_name_nothing_else(function):
    section = ARGS.search((inspect.getdoc(function) or "") + "\n")
    heads = {name.lstrip("*") for head in HEAD.findall(section[1]) for name in head.split(", ")} if section else set()
    extra = heads - {"Others"} - parameters(function)
    assert not extra, f"{function.__name__} has no parameter {sorted(extra)}"


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_first_line_ends_with_a_period(function):
    first = (inspect.getdoc(function) or "").partition("\n\n")[0]
    assert re.fullmatch(r".*\.", first), f"begin with one line that ends with a period, got {first!r}"
