"""Plots of a run's rows: one PNG each, 1200 pixels wide and made to be read at 800; a plot without rows is not made.

    ratios.png         how much faster ours is than each peer: step, rollout, forward
    ratios_other.png   the same away from the standard configuration
    breakdown.png      where a step's time goes: from the suite profile, or from what the suite step measured
    memory.png         peak memory by arrangement; memory_full_size.png: counted for the full-size model
    kernels.png        each op against eager and compiled PyTorch
    roofline.png       each op under the machine's ceilings
    zero.png           whole-model gathers a step
    cost.png           the counts of a full-size step against their targets
    reproduce_curves.png, reproduce_teachers.png, reproduce_states.png   see bench/reproduce/curves.py

An error bar is p20 .. p80. A label that ends in "*" is of a row that fell back; "failed" stands where a number is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.drawing import (
    BAD,
    COLOURS,
    DPI,
    FAINT,
    INK,
    MARKERS,
    OTHERS,
    STYLE,
    canvas,
    colours,
    dot,
    errors,
    key,
    label,
    lines_of,
    on,
    split,
    spread_out,
    times_axis,
)  # fmt: skip
from bench.report.tables import digits, heading
from bench.reproduce.curves import curves, states, teachers
from bench.results import Row

PART_COLOURS = {
    "gemm": "#0072B2", "attention": "#56B4E9", "elementwise": "#E69F00", "optimizer": "#009E73", "communication": "#CC79A7",
    "encoders": "#D55E00", "other": "#8C564B", "idle": "#D9D9D9", "rest": "#D9D9D9",
}  # fmt: skip
NAMES = {"gemm": "matrix products", "rest": "the rest"}
PEER_OVER_OURS = "peer's seconds / ours; right of 1 ours is faster"
RATIO_SUITES = ("step", "rollout", "forward")
SOLID = {
    ("nano", ""): {"lora/R1": 1.3, "full/R1": 1.5, "lora/R4": 0.95, "full/R4": 0.95},
    ("zimage-turbo", "H100"): {"lora/R1": 2.25, "lora/R1@512px@batch4": 2.3},
}
"""Model and, in its name, the GPU -> case of the suite step -> the speedup to reach."""
SOLID_GATHERS = 2.0
FULL_SIZE = "@full_size"
"""In the cases of the suite memory that are counted."""
DATA = 0.68
"""Of a roofline's height; above are the names of the ops."""
SUPER: Mapping[str, Any] = {"x": 0.01, "ha": "left", "fontsize": 12, "fontweight": "bold"}


def draw(rows: Sequence[Row], environment: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the plots that `rows` have something for into `folder`; the same rows give the same pictures."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
        for name, plot in PLOTS.items():
            figure = plot(rows, environment)
            if figure is not None:
                made.append(folder / f"{name}.png")
                figure.savefig(made[-1], dpi=DPI, metadata={"Software": None})
    return made


# ---- ratios ----------------------------------------------------------------------------------------------------------


def _ratio_rows(rows: Sequence[Row]) -> dict[tuple[str, str, tuple[str, ...]], list[Row]]:
    """(suite, what, "@" options) -> the ratios to its peers."""
    found: dict[tuple[str, str, tuple[str, ...]], list[Row]] = {}
    for row in rows:
        name, peer, options = split(row.case)
        if row.suite in RATIO_SUITES and row.metric.startswith("speedup") and peer:
            phase = row.metric.removeprefix("speedup").removeprefix("_") or row.suite
            found.setdefault((row.suite, f"{phase}, {name}", options), []).append(row)
    return dict(sorted(found.items(), key=lambda one: RATIO_SUITES.index(one[0][0])))


def ratios(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    found = {place: members for place, members in _ratio_rows(rows).items() if not other(members[0], environment)}
    every = [row for members in found.values() for row in members]
    if not every:
        return None
    figure, (axes,) = canvas(1.4 + 0.29 * len(every))
    labels: list[str] = []
    goals = goals_of(environment)
    colour = colours(split(row.case)[1] for row in every)
    values, aimed = [1.0], False
    for (_, what, _), members in found.items():
        if labels:
            axes.axhline(len(labels) - 0.5, color="#C8C8C8", linewidth=0.8)
        for index, row in enumerate(members):
            y, peer = len(labels), split(row.case)[1]
            labels.append(f"{'' if index else what}   vs {peer}")
            dot(axes, row, y, colour[peer])
            values += [value for value in (row.value, row.p20, row.p80) if value]
            goal = goals.get(row.case) if row.suite == "step" else None
            if goal:
                axes.plot([goal, goal], [y - 0.38, y + 0.38], color=INK, linewidth=2.5, zorder=2)
                values.append(goal)
                aimed = True
    lines_of(axes, labels)
    times_axis(axes, values, PEER_OVER_OURS + (".  Thick bar: target" if aimed else "") + hollow(every))
    axes.set_title("How much faster ours is than each peer")
    return figure


def goals_of(environment: Mapping[str, Any]) -> Mapping[str, float]:
    """Case of the suite step -> the speedup to reach on this machine."""
    gpu = str(environment.get("gpu") or "")
    found = (goals for (model, name), goals in SOLID.items() if model == environment.get("model") and
             (name in gpu if name else not gpu))  # fmt: skip
    return next(found, {})


def hollow(rows: Sequence[Row]) -> str:
    return ".  Hollow: fell back" if any(row.status == "fallback" for row in rows) else ""


def other(row: Row, environment: Mapping[str, Any]) -> bool:
    """Not the standard configuration of the run's model."""
    model = Path(str(environment.get("model"))).name
    return bool(set(split(row.case)[2]) - {model})


def ratios_other(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    """One line per case, the peers as dots on it."""
    found = {place: members for place, members in _ratio_rows(rows).items() if other(members[0], environment)}
    every = [row for members in found.values() for row in members]
    if not every:
        return None
    colour = colours(sorted({split(row.case)[1] for row in every}))
    figure, (axes,) = canvas(1.9 + 0.42 * len(found))
    for y, members in enumerate(found.values()):
        for index, row in enumerate(members):
            dot(axes, row, y + 0.16 * (index - (len(members) - 1) / 2), colour[split(row.case)[1]], text=len(members) == 1)
    lines_of(axes, [", ".join((what, *options)) for _, what, options in found])
    values = [value for row in every for value in (row.value, row.p20, row.p80) if value]
    times_axis(axes, values, PEER_OVER_OURS + hollow(every))
    axes.set_title("The same away from the standard configuration", pad=26)
    key(axes, {f"vs {name}": value for name, value in colour.items()})
    return figure


def kernels(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    found = [row for row in rows if row.suite == "kernels" and row.metric.startswith("speedup_")]
    if not found:
        return None
    phases = sorted({row.metric.removeprefix("speedup_") for row in found}, reverse=True)
    peers = list(dict.fromkeys(split(row.case)[1] for row in found))
    ops = list(dict.fromkeys("@".join((split(row.case)[0], *split(row.case)[2])) for row in found))
    colour = colours(peers)
    figure, panels = canvas(1.6 + 0.5 * len(ops), 1 + (len(phases) > 1), sharey=True, sharex=True)
    for axes, phase in zip(panels, phases):
        for row in found:
            if row.metric == f"speedup_{phase}":
                name, peer, options = split(row.case)
                shift = 0.32 * (peers.index(peer) - (len(peers) - 1) / 2)
                dot(axes, row, ops.index("@".join((name, *options))) + shift, colour[peer])
        lines_of(axes, ops)
        times_axis(axes, [value for row in found for value in (row.value, row.p20, row.p80) if value], "peer's seconds / ours")
        axes.set_title(phase, pad=24)
    key(panels[0], {f"vs {name}": value for name, value in colour.items()})
    figure.suptitle("Each op of ours against the same in PyTorch", **SUPER)
    return figure


# ---- stacked bars ----------------------------------------------------------------------------------------------------


def breakdown(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    bars, source = profiled(rows), "torch.profiler"
    if not bars:
        bars, source = assembled(rows), "the rest: step - encoders - matrix products alone"
    if not bars:
        return None
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    longest = max(sum(parts.values()) for parts in bars.values())
    unit, factor = ("ms", 1e3) if longest < 1 else ("s", 1.0)
    free = iter(OTHERS * 9)
    colour = {name: PART_COLOURS.get(name) or next(free) for name in names}
    figure, (axes,) = canvas(1.7 + 0.5 * len(bars))
    for y, parts in enumerate(bars.values()):
        left = 0.0
        for name, seconds in parts.items():
            size = seconds * factor
            axes.barh(y, size, left=left, height=0.72, color=colour[name], edgecolor="white", linewidth=0.8)
            if seconds > 0.06 * longest:
                axes.text(left + size / 2, y, digits(size), ha="center", va="center", fontsize=9, color=on(colour[name]))
            left += size
        axes.text(left, y, f"  {digits(left)} {unit}", va="center", fontweight="bold", fontsize=9)
    lines_of(axes, [f"{case}, {variant}" for case, variant in bars])
    axes.set_xlim(0, longest * factor * 1.16)
    axes.set_xlabel(f"{unit} a step ({source})")
    axes.set_title("Where a training step's time goes", pad=44 if len(names) > 4 else 28)
    key(axes, {NAMES.get(name, name): value for name, value in colour.items()}, "s", ncols=4)
    return figure


def profiled(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """(case, variant) -> part -> seconds, from the suite profile."""
    from bench.breakdown import PARTS

    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        part = row.metric.removeprefix("seconds_")
        if row.suite == "profile" and row.value and row.metric.startswith("seconds_") and part in PARTS:
            found.setdefault((row.case, row.variant), {})[part] = row.value
    return {bar: {part: found[bar][part] for part in PARTS if part in found[bar]} for bar in found}


def assembled(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """The same from the suite step: what the encoders and the matrix products alone take, and the rest."""
    seconds = {(row.case, row.variant): row.value for row in rows
               if row.suite == "step" and row.metric == "seconds_per_step" and row.value}  # fmt: skip
    bars = {}
    for (case, variant), whole in seconds.items():
        floor = seconds.get((case, "floor"))
        if floor is None or variant in ("floor", "encoders") or len(split(case)[2]) > 1:
            continue
        encoders = seconds.get((case, "encoders"), 0.0) if variant == "R1" else 0.0
        parts = {"gemm": floor} | ({"encoders": encoders} if encoders else {})
        bars[case, variant] = parts | {"rest": max(0.0, whole - sum(parts.values()))}
    return bars


# ---- bars ------------------------------------------------------------------------------------------------------------


def bars(
    title: str, rows: Sequence[Row], xlabel: str, factor: float, marks: Mapping[str, float] | None = None, mark: str = "",
    goal: float | None = None,
) -> Any:  # fmt: skip
    """One bar per row, grouped by case; `marks`: case of ours -> a value to mark on its bar."""
    import matplotlib.ticker

    marks = marks or {}
    colour = colours(row.variant for row in rows)
    figure, (axes,) = canvas(1.9 + 0.3 * len(rows))
    values = [factor * row.value for row in rows if row.value is not None] + [factor * value for value in marks.values()]
    end = max([*values, goal or 0.0]) or 1.0
    before = None
    for y, row in enumerate(rows):
        if before not in (None, row.case):
            axes.axhline(y - 0.5, color="#DDDDDD", linewidth=0.8)
        before = row.case
        if row.value is None:
            axes.text(0.01 * end, y, f"{row.variant} failed", color=BAD, va="center", fontsize=9)
            continue
        value, spread = factor * row.value, [[factor * part[0]] for part in errors(row)]
        axes.barh(y, value, height=0.76, color=colour[row.variant], xerr=spread if row.p20 != row.p80 else None,
                  error_kw={"ecolor": INK, "capsize": 2, "elinewidth": 1})  # fmt: skip
        right = value + spread[1][0]
        if row.variant == "ours" and row.case in marks:
            axes.plot(factor * marks[row.case], y, marker="D", color="white", markeredgecolor=INK, markersize=7, zorder=4)
            if factor * marks[row.case] > value:
                right = max(right, factor * marks[row.case] + 0.012 * end)
        axes.text(right + 0.012 * end, y, label(row), va="center", fontsize=9)
    firsts = [row.case if row.case not in {one.case for one in rows[:y]} else "" for y, row in enumerate(rows)]
    lines_of(axes, firsts, 0.7)
    axes.set_xlim(0, 1.17 * end)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
    if goal is not None:
        axes.axvline(goal, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
        xlabel += ".  Dashed: target"
    axes.set_xlabel(xlabel + (f".  Diamond: {mark}" if marks else ""))
    axes.set_title(title, pad=26)
    key(axes, colour, "s")
    return figure


def memory(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    """Peak memory; the suite step's, which has it on a GPU, where the suite memory was not run."""
    planned = {row.case: row.value for row in rows if row.metric == "planned_bytes" and row.value}
    peaks = [row for row in rows if row.metric == "peak_bytes" and FULL_SIZE not in row.case]
    peaks = [row for row in peaks if row.suite in ("memory", "step")]
    found = [row for row in peaks if row.suite == "memory"] or peaks
    return amounts("Peak memory of a training step", found, planned)


def memory_full_size(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    found = [row for row in rows if row.suite == "memory" and row.metric == "peak_bytes" and FULL_SIZE in row.case]
    return amounts("Peak memory of a full-size step, counted", found)


def amounts(title: str, rows: Sequence[Row], planned: Mapping[str, float] | None = None) -> Any:
    if not any(row.value for row in rows):
        return None
    largest = max(row.value or 0.0 for row in rows)
    unit, factor = next((pair for pair in (("GB", 1e-9), ("MB", 1e-6)) if largest * pair[1] >= 1), ("kB", 1e-3))
    return bars(title, together(rows), unit, factor, planned, "what the planner said")


def zero(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    found = [row for row in rows if row.suite == "zero" and row.metric == "gathers_per_step"]
    if not found:
        return None
    return bars("Whole-model weight gathers a training step", together(found), "gathers a step", 1.0, goal=SOLID_GATHERS)


def together(rows: Sequence[Row]) -> list[Row]:
    order = {case: index for index, case in enumerate(dict.fromkeys(row.case for row in rows))}
    return sorted(rows, key=lambda row: (order[row.case], row.variant != "ours"))


# ---- against limits --------------------------------------------------------------------------------------------------


def roofline(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    mine = {row.key[1:]: row for row in rows if row.suite == "kernels" and row.value}
    suffixes = [split(case)[2] for case, variant, _ in mine if variant == "copy"]
    if not suffixes:
        return None
    tail = "".join(f"@{option}" for option in suffixes[0])
    copy, gemm = mine.get((f"copy{tail}", "copy", "bytes_per_second")), mine.get((f"gemm{tail}", "gemm", "flops_per_second"))
    points = {"forward": list(_points(mine, tail, "forward")), "backward": list(_points(mine, tail, "backward"))}
    every = [point for found in points.values() for point in found]
    if copy is None or gemm is None or not every:
        return None
    figure, panels = canvas(9.6, 2, down=True, sharex=True, sharey=True)
    low, high = min(p[2] for p in every) / 2.2, max(p[2] for p in every) * 3
    moved, peak = copy.value or 1.0, gemm.value or 1.0
    ridge = peak / moved
    high = max(high, 3 * ridge)
    rates = [rate for p in every for rate in (p[3].value, p[3].p20, p[3].p80) if rate]
    bottom = min(*rates, peak / 30) / 1.8
    for axes, (phase, found) in zip(panels, points.items()):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(bottom, 10 ** (math.log10(bottom) + math.log10(1.8 * max(*rates, peak) / bottom) / DATA))
        axes.plot([low, ridge, high], [low * moved, peak, peak], color=INK, linewidth=1.6)
        text = {"textcoords": "offset points", "fontsize": 9}
        axes.annotate(f"matrix product, {label(gemm)}", (high, peak), (-4, 4), ha="right", **text)
        axes.annotate(f"copy, {label(copy)}", (ridge / 1.6, peak / 1.6), (6, -4), va="top", **text)
        name_points(axes, found, math.log10(low), math.log10(high))
        for _, variant, x, row in found:
            colour = COLOURS.get(variant, FAINT)
            axes.errorbar(x, row.value, yerr=errors(row), fmt=MARKERS.get(variant, "D"), markersize=6.5, color=colour,
                          markerfacecolor="white" if row.status == "fallback" else colour, elinewidth=1.2,
                          zorder=4 if variant == "ours" else 3)  # fmt: skip
        axes.grid(which="major")
        axes.set_title(phase)
        axes.set_ylabel("FLOP/s reached")
    panels[1].set_xlabel("FLOP per byte that the op must move" + hollow([point[3] for point in every]))
    variants = {point[1]: COLOURS.get(point[1], FAINT) for point in every}
    key(panels[0], variants, MARKERS, loc="lower right", bbox_to_anchor=(1, 0), ncols=1)
    figure.suptitle("Each op under this machine's ceilings, measured in the same run", **SUPER)
    return figure


def _points(mine: Mapping[tuple[str, str, str], Row], tail: str, phase: str) -> Iterator[tuple[str, str, float, Row]]:
    """(op, variant, FLOP per byte, row of FLOP/s)."""
    for (case, variant, metric), row in mine.items():
        moved, done = mine.get((case, "ours", f"bytes_{phase}")), mine.get((case, "ours", f"flops_{phase}"))
        if metric == f"flops_per_second_{phase}" and moved and done and case.endswith(tail):
            yield split(case)[0], variant, (done.value or 0.0) / (moved.value or 1.0), row


def name_points(axes: Any, found: Sequence[tuple[str, str, float, Row]], low: float, high: float) -> None:
    """The ops' names along the upper edge, kept apart, each with a line down to its points. low, high: log10 of the limits."""
    highest: dict[tuple[str, float], float] = {}
    for name, _, x, row in found:
        highest[name, x] = max(highest.get((name, x), 0.0), row.value or 0.0)
    order = sorted(highest, key=lambda one: one[1])
    apart = (high - low) / 30
    places = spread_out([math.log10(x) for _, x in order], low + apart, high - 4 * apart, apart)
    bottom, top = axes.get_ylim()
    base = 10 ** (math.log10(bottom) + (DATA + 0.05) * math.log10(top / bottom))
    bend = 10 ** (math.log10(bottom) + (DATA + 0.02) * math.log10(top / bottom))
    for (name, x), place in zip(order, places):
        axes.plot([x, x, 10**place], [highest[name, x], bend, base], color="#BBBBBB", linewidth=0.8, zorder=1)
        axes.text(10**place, base, name, rotation=42, rotation_mode="anchor", ha="left", va="bottom", fontsize=8)


def cost(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    """Every count over its target: left of 1 it is met."""
    from bench.suites.cost import TARGETS

    found = {row.key[1:]: row for row in rows if row.suite == "cost" and row.value}
    cases = [case for case in dict.fromkeys(case for case, _, _ in found) if (case, "ours", TARGETS[0].metric) in found]
    targets = [target for target in TARGETS if any((case, "ours", target.metric) in found for case in cases)]
    if not cases or not targets:
        return None
    figure, (axes,) = canvas(1.7 + 0.32 * len(cases) * len(targets))
    labels: list[str] = []
    values, seen = [1.0], {}
    for case in cases:
        for target in targets:
            y = len(labels)
            labels.append(f"{case}: {heading(target.metric)}")
            moonshot = target.moonshot / target.solid
            axes.plot([moonshot] * 2, [y - 0.3, y + 0.3], color=INK, linewidth=2, zorder=2)
            values.append(moonshot)
            for variant in ("R1", "ours"):
                row = found.get((case, variant, target.metric))
                if row is None or row.value is None:
                    continue
                share = row.value / target.solid
                values.append(share)
                seen[variant] = COLOURS[variant]
                axes.plot(share, y, "o", markersize=7, color=COLOURS[variant], zorder=3)
                text = {"textcoords": "offset points", "va": "center", "fontsize": 9}
                if variant == "ours":
                    axes.annotate(label(row), (min(share, moonshot), y), (-8, 0), ha="right", **text)
                else:
                    axes.annotate(label(row), (share, y), (8, 0), **text)
    lines_of(axes, labels)
    times_axis(axes, values, "count / target; left of 1 the target is met.  Black bar: the moonshot target")
    axes.set_xlim(min(values) / 2.2, max(values) * 2.2)
    axes.set_title("The counts of a full-size step against their targets", pad=26)
    key(axes, {name: seen[name] for name in ("ours", "R1") if name in seen})
    return figure


PLOTS: Mapping[str, Callable[[Sequence[Row], Mapping[str, Any]], Any]] = {
    "ratios": ratios, "ratios_other": ratios_other, "breakdown": breakdown, "memory": memory,
    "memory_full_size": memory_full_size, "kernels": kernels, "roofline": roofline, "zero": zero, "cost": cost,
    "reproduce_curves": curves, "reproduce_teachers": teachers, "reproduce_states": states,
}  # fmt: skip
SHOWN_IN = {
    "breakdown": "step", "memory": "memory", "memory_full_size": "memory", "kernels": "kernels", "roofline": "kernels",
    "zero": "zero", "cost": "cost", "reproduce_curves": "reproduce", "reproduce_teachers": "reproduce",
    "reproduce_states": "reproduce",
    "reproduce_grid_target": "reproduce", "reproduce_grid_original": "reproduce",
    "reproduce_grid_ablations_target": "reproduce", "reproduce_grid_ablations_original": "reproduce",
}  # fmt: skip
"""Plot -> the suite that it illustrates; the others are of several."""
