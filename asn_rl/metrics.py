"""One logger: TensorBoard events and `metrics.jsonl` in the run folder. Metric names are a public interface.

Prefixes: `loss/ policy/ kl/ reward/ budget/ eval/ time/`; times in seconds, divergences and entropies in nats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from asn_rl.files import write_whole
from asn_rl.runs import read_jsonl


class MetricsLogger:
    """Scalars and texts by step.

    Args:
        run: the run folder.
        resume_after: keep earlier records up to this step and drop later ones, which the resumed run writes again.
    """

    def __init__(self, run: Path, *, resume_after: int = 0) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = [record for record in read_metrics(run) if record["step"] <= resume_after]
            write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = self.path.open("a")
        self.events = SummaryWriter(str(run / "events"), purge_step=resume_after + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars. NaN is written as null: JSON has none."""
        clean = {name: float(value) for name, value in values.items()}
        record = {"step": step, **{k: v if math.isfinite(v) else None for k, v in clean.items()}}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in clean.items():
            self.events.add_scalar(name, value, step)

    def log_texts(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record a table of texts, shown under TensorBoard's Text tab."""
        if not rows:
            return
        header = list(rows[0])
        lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        lines += ["| " + " | ".join(_cell(row[key]) for key in header) + " |" for row in rows]
        self.events.add_text(name, "\n".join(lines), step)

    def close(self) -> None:
        self.file.close()
        self.events.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`; a torn last line, left by a kill, is dropped."""
    path = Path(run) / "metrics.jsonl"
    return [record for _, record in read_jsonl(path)] if path.exists() else []


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
