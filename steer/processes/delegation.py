"""What a wrapped process takes over from the one it wraps, said once."""

from __future__ import annotations

from typing import Any


def of_base(name: str) -> Any:
    """A read-only property that is `base`'s own."""
    return property(lambda self: getattr(self.base, name), doc=f"The base process's own `{name}`.")
