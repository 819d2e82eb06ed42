"""A method's own options from the command line: NAME=VALUE, typed by the method's signature.

Typer converts by signature too, but knows no unions such as `int | Sequence[int]` and has no public function for it.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import SteerError

# Parameters of every method, which have command-line options of their own.
_COMMON = frozenset({"process", "reward", "batch", "particles", "budget", "temperature", "key", "on_step", "return"})


def options(sampler: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """The options of a method that can be given as text: name -> (type, default)."""
    hints = get_type_hints(sampler)
    own = inspect.signature(sampler).parameters
    return {
        name: (hints[name], parameter.default)
        for name, parameter in own.items()
        if name not in _COMMON and name in hints and _writable(hints[name])
    }


def parsed(method: str, sampler: Callable[..., Any], settings: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of a method from "NAME=VALUE" settings.

    Args:
        method: Its name, for messages.
        sampler: The method.
        settings: Values as Python writes them: 6, 0.5, true, none, (2.0, 0.8) or 2.0,0.8; anything else is a string.

    Raises:
        SteerError: A setting has no name, the method has no such option, or the value does not fit its type.
    """
    known, given = options(sampler), {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip()
        if not equals or not name:
            raise SteerError(f"an option must be NAME=VALUE, as in levels=6; got {setting!r}")
        if name not in known:
            own = ", ".join(f"{name}={_shown(default)}" for name, (_, default) in known.items()) or "none"
            taken = name in inspect.signature(sampler).parameters
            why = "takes a Python object, or has a flag of its own" if taken else "is no option"
            raise SteerError(f"{name} {why} of {method}; --set can set these, with their defaults: {own}")
        value, hint = _value(text.strip()), known[name][0]
        fits = _fitted(value, hint)
        if not fits:
            raise SteerError(f"{name} of {method} must be {_named(hint)}, got {text.strip()!r}")
        given[name] = fits[0]
    return given


def listed(name: str, sampler: Callable[..., Any]) -> dict[str, Any]:
    """A method as `steer methods` lists it: name, first line of its docstring, options with their defaults."""
    first = (inspect.getdoc(sampler) or "").partition("\n\n")[0]
    own = {option: _shown(default) for option, (_, default) in options(sampler).items()}
    return {"name": name, "returns": " ".join(first.split()), "options": own}


def _value(text: str) -> Any:
    """Text as a Python value; as a string where it is none."""
    constant = {"true": True, "false": False, "none": None}
    if text.lower() in constant:
        return constant[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union; a type alone is its own."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_sequence(hint: Any) -> bool:
    """Whether the type is a collection, such as Sequence[int] or tuple[float, float]."""
    origin = get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Collection)


def _writable(hint: Any) -> bool:
    """Whether a value of this type can be given as text."""
    return any(
        part in (bool, int, float, str) or get_origin(part) is Literal or (_is_sequence(part) and _writable_items(part))
        for part in _alternatives(hint)
    )


def _writable_items(hint: Any) -> bool:
    """Whether the items of a collection can be given as text."""
    return all(part is Ellipsis or _writable(part) for part in get_args(hint))


def _fitted(value: Any, hint: Any) -> tuple[Any, ...]:
    """(value,) converted to the type; () where it does not fit."""
    for part in _alternatives(hint):
        if part is type(None) and value is None:
            return (None,)
        if part in (bool, int, str) and type(value) is part:
            return (value,)
        if part is float and isinstance(value, int | float) and not isinstance(value, bool):
            return (float(value),)
        if get_origin(part) is Literal and value in get_args(part):
            return (value,)
        if _is_sequence(part) and isinstance(value, tuple | list):
            kinds = get_args(part)
            if get_origin(part) is tuple and Ellipsis not in kinds and len(kinds) != len(value):
                continue
            kinds = kinds if len(kinds) == len(value) and get_origin(part) is tuple else (kinds[0],) * len(value)
            items = [_fitted(item, kind) for item, kind in zip(value, kinds, strict=True)]
            if all(items):
                return (tuple(item[0] for item in items),)
    return ()


def _named(hint: Any) -> str:
    """A type in words, without the parts that cannot be given as text."""
    words = []
    for part in _alternatives(hint):
        if get_origin(part) is Literal:
            words += map(repr, get_args(part))
        elif part in (bool, int, float, str):
            words.append({bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[part])
        elif part is type(None):
            words.append("none")
        elif _is_sequence(part) and _writable(part):
            items = {_named(kind) for kind in get_args(part) if kind is not Ellipsis}
            words.append(f"several with commas, each {' or '.join(sorted(items))}")
    return " or ".join(words)


def _shown(default: Any) -> str:
    """A default as `--set` would take it."""
    if default is None or isinstance(default, bool):
        return str(default).lower()
    return str(default).replace(" ", "") if isinstance(default, tuple) else str(default)
