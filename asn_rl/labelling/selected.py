"""Reading what the select stage left."""

from __future__ import annotations

from pathlib import Path

from asn_rl.errors import UnknownName
from asn_rl.labelling.records import as_candidate, read_file
from asn_rl.labelling.select import SELECTED, TARGET
from asn_rl.types import Candidate


def read_selected(folder: Path) -> list[Candidate]:
    """The candidates that were kept, prompt by prompt, best first."""
    return [as_candidate(record, where) for where, record in read_file(folder / "selected.jsonl", SELECTED)]


def read_normalised(folder: Path, labeller: str) -> list[float | None]:
    """What a labeller says of each candidate that was kept, normalised; None: masked. In the order of `read_selected`.

    Raises:
        UnknownName: the candidates were not selected by such a labeller.
    """
    records = [record for _, record in read_file(folder / "selected.jsonl", SELECTED)]
    for record in records:
        if labeller not in record["normalised"]:
            raise UnknownName("labeller", labeller, record["normalised"])
    return [record["normalised"][labeller] for record in records]


def read_targets(folder: Path) -> dict[str, dict[str, float]]:
    """For each prompt id, the shares of the heuristics to imitate; they sum to 1."""
    return {record["prompt_id"]: record["weights"] for _, record in read_file(folder / "targets.jsonl", TARGET)}
