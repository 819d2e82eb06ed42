"""The models and classifiers that ship with the package, described by their own files."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def embedded() -> list[dict[str, Any]]:
    """List the embedded models and classifiers.

    Returns:
        One dict per model: name, kind, parameters, bytes, measured (a line of text), licence, and metrics (all of its
        metrics.json).
    """
    return [_card(folder) for package in ("steer", "steer.rewards") for folder in _folders(package)]


def _folders(package: str) -> list[Any]:
    """Folders of embedded models in an installed package, by name."""
    try:
        assets = resources.files(package) / "assets"
    except ModuleNotFoundError:
        return []
    return sorted((folder for folder in assets.iterdir() if folder.is_dir()), key=lambda folder: folder.name)


def _card(folder: Any) -> dict[str, Any]:
    """One model's entry, read from its own files."""
    weights = [path for path in (folder, folder / "unet") if path.is_dir()]
    weights = [file for path in weights for file in path.iterdir() if file.name.endswith(".safetensors")]
    metrics = json.loads(_text(folder / "metrics.json") or "{}")
    config = json.loads(_text(folder / "config.json") or "{}")
    scheduler = json.loads(_text(folder / "model_index.json") or "{}").get("scheduler", ["", ""])[1]
    kind = "flow" if scheduler.startswith("FlowMatch") else "diffusion" if scheduler else "classifier"
    kind = config.get("kind", kind)
    front = dict(line.split(": ", 1) for line in (_text(folder / "README.md") or "").splitlines()[:8] if ": " in line)
    measures = {
        "accuracy_held_out": "held-out accuracy {:.1%}",
        "judge_accuracy": "judge accuracy {:.1%}",
        "frechet_conditional": "Fréchet {:.2f}",
        "judge_guidance_3_top5": "right name among five {:.0%}",
        "words": "{:.1%} of samples are words",
        "nll_per_letter": "{:.2f} nats a letter",
    }
    return {
        "name": folder.name,
        "kind": f"{kind} ({config['architecture']})" if "architecture" in config else kind,
        "parameters": sum(_parameters(file) for file in weights),
        "bytes": sum(len(file.read_bytes()) for file in weights),
        "measured": ", ".join(text.format(metrics[name]) for name, text in measures.items() if name in metrics) or "–",
        "licence": front.get("license_name", front.get("license", "–")),
        "metrics": metrics,
    }


def _parameters(file: Any) -> int:
    """Number of parameters in a safetensors file."""
    from safetensors.torch import load

    return sum(tensor.numel() for tensor in load(file.read_bytes()).values())


def _text(file: Any) -> str | None:
    """A file's text, or None where there is no such file."""
    return file.read_text(encoding="utf-8") if file.is_file() else None
