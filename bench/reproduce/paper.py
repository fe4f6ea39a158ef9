"""The paper's tables (arXiv 2605.05204, read second hand: check before quoting them elsewhere), beside ours, and as Markdown.

What stands for what on the embedded pipeline: patch_fd for FID, style_distance for the DINO distance, the judge's accuracy on
the original domain for GenEval and DPG. Nothing stands for the scores of quality and aesthetics by language models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.report.tables import digits
from bench.reproduce.arms import NAMES, OURS, START
from bench.results import Row

COLUMNS = ("fid", "dino_distance", "quality", "aesthetic", "geneval", "dpg")
HEADS = dict(zip(COLUMNS, ("FID", "DINO dist.", "Quality", "Aesthetic", "GenEval", "DPG")))
FULL = {
    START: (48.69, 0.1274, 3.76, 3.52, 0.754, 84.8), "sft": (82.20, 0.1896, 2.61, 2.49, 0.159, 70.0),
    "pso": (88.43, 0.1716, 2.87, 2.64, 0.248, 72.4), OURS: (40.49, 0.1088, 3.84, 3.62, 0.717, 84.1),
}
"""Every weight of Z-Image-Turbo, on an anime set."""
OF_CUSTOM = ("dino_distance", "quality")
CUSTOM: dict[str, tuple[float | None, ...]] = {
    START: (0.2373, 3.51), "custom_sft": (0.2212, 2.42), "custom_pso": (0.0570, None), "custom_dopsd": (0.0823, 3.80),
}
"""LoRA, about four images a concept."""
OURS_BESIDE = (
    ("target@4_steps", "style_distance", "target: style distance"), ("target@4_steps", "patch_fd", "patch FD"),
    ("target@32_steps", "patch_fd", "patch FD, 32 steps"), ("original@4_steps", "patch_fd", "original: patch FD"),
    ("original@4_steps", "accuracy", "accuracy"),
)
VERDICTS = {1: "supported", 0: "undecided", -1: "contradicted"}


def markdown(
    found: Mapping[tuple[str, str, str, str], Row], arms: Sequence[str], paper: Mapping[str, Sequence[float | None]] = {},
    columns: Sequence[str] = (),
) -> list[str]:
    """A line for each arm that was measured: our columns, then `columns` of the `paper`'s table."""
    heads = [says for _, _, says in OURS_BESIDE] + ["paper: " * (i == 0) + HEADS[name] for i, name in enumerate(columns)]
    lines = []
    for arm in arms:
        rows = [found.get(("reproduce", case, arm, metric)) for case, metric, _ in OURS_BESIDE]
        if any(row is not None and row.value is not None for row in rows):
            beside = ["" if value is None else f"{value:g}" for value in paper.get(arm, [None] * len(columns))]
            lines.append(f"| {' | '.join([NAMES.get(arm, arm), *map(cell, rows), *beside])} |")
    return [f"| 4 steps a picture unless said | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|", *lines]


def cell(row: Row | None) -> str:
    if row is None or row.value is None or row.low is None or row.high is None:
        return ""
    return f"{digits(row.value)} ({digits(row.low)}..{digits(row.high)})"


def verdicts(found: Sequence[Row]) -> list[str]:
    """A line a verdict: the claims that have it."""
    claims = [row for row in found if row.metric == "claim" and row.n]
    named = {says: [f"`{row.case}`" for row in claims if row.value == value] for value, says in VERDICTS.items()}
    return [f"{says}: {', '.join(names)}" for says, names in named.items() if names]
