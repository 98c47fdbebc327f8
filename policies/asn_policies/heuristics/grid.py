"""The reference project's grids of sampling pipelines, and a small one of our own for quick comparisons."""

from __future__ import annotations

from typing import Any

from asn_rl.errors import UnknownName

Step = dict[str, Any]
TEMPERATURES = tuple(round(1.2**x * 10) / 10 for x in range(-6, 6))

OFFICIAL: dict[str, list[tuple[str, str, float]]] = {
    "llama": [("top_p", "top_p", 0.9)],
    "gemma": [("top_p", "top_p", 0.95), ("top_k", "top_k", 64)],
    "qwen": [("top_p", "top_p", 0.8), ("top_k", "top_k", 20)],
    "none": [],
}
FULL = {
    ("top_p", "top_p"): (0.5, 0.8, 0.9, 0.95, 0.98),
    ("top_k", "top_k"): (8, 16, 32, 64, 128),
    ("min_p", "min_p"): (0.01, 0.02, 0.05, 0.1),
    ("eta", "epsilon"): (1e-3, 8e-4, 5e-4, 2e-4, 1e-4),
    ("epsilon", "epsilon"): (4e-3, 2e-3, 1e-3, 8e-4, 5e-4, 2e-4),
    ("typical", "mass"): (0.2, 0.5, 0.8, 0.9, 0.92, 0.95),
}
FILTERED = {
    ("top_p", "top_p"): (0.8, 0.9, 0.95),
    ("top_k", "top_k"): (16, 64, 256),
    ("epsilon", "epsilon"): (4e-3, 2e-3, 1e-3),
}
GRIDS = ("full", "filtered")


def grid(kind: str = "full", family: str = "llama") -> list[dict[str, Any]]:
    """Entries of `sampling_pipelines`: "full" has 396 (384 for family "none"), "filtered" 143 (134).

    The filtered grid stops at T = 1.4, and min-p at T = 2.1, where the full grid is mostly noise.
    """
    if kind not in GRIDS:
        raise UnknownName("grid", kind, GRIDS)
    if family not in OFFICIAL:
        raise UnknownName("model family", family, OFFICIAL)
    official = [_step(name, parameter, value) for name, parameter, value in OFFICIAL[family]]
    rules, limit = (FULL, 2.5) if kind == "full" else (FILTERED, 1.4)
    entries = []
    for t in TEMPERATURES:
        heat = _step("temperature", "temperature", t)
        if t <= limit:
            entries.append(_entry(f"temp {t}", [heat]))
            if official:
                entries.append(_entry(f"official temp {t}", [heat, *official]))
            entries += _truncated(heat, t, rules)
        if kind == "filtered" and t <= 2.1:
            entries += _truncated(heat, t, {("min_p", "min_p"): FULL["min_p", "min_p"]})
    return entries


def _truncated(heat: Step, t: float, rules: dict[tuple[str, str], tuple[float, ...]]) -> list[dict[str, Any]]:
    return [
        _entry(f"{name} {value} temp {t}", [heat, _step(name, parameter, value)])
        for (name, parameter), values in rules.items()
        for value in values
    ]


def _step(name: str, parameter: str, value: float) -> Step:
    return {"name": name, "params": {parameter: value}}


def _entry(name: str, processors: list[Step]) -> dict[str, Any]:
    return {"name": name, "weight": 1, "processors": processors}
