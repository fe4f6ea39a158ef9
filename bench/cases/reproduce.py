"""The paper's comparison: who learns the new style, who keeps the few steps, who keeps the old domain.

Every arm starts from the same weights and gets the same number of optimizer steps, records, noise and prompts; learning rates
are searched for each method in the same way. Rows, `case` "DOMAIN@N_steps" (function evaluations of a picture), `variant` the
arm. On the embedded pipeline:

    patch_fd          Frechet distance of raw 4x4 patches to exact renders      (stands for the paper's FID)
    style_distance    mean RGB distance of the ground to the style's two tints   (for its DINO distance)
    accuracy          share of attributes that the judge reads as the caption says (for GenEval and DPG)
    curve_...         "DOMAIN@step_N": of the validation captions at 4 steps, with the lowest and highest seed

With --eval the metrics of `bench.reproduce.perceptual`; what has no model there is a failed row that says so. On both:

    ..._minus_start   the measure minus the start's, paired
    learning_rate, score_at_RATE    what the search chose, and what each rate scored on validation prompts; the two best rates
                                    are tried with a second seed, too, and the mean decides
    paper_...         what the paper reports, for reading beside it
    seconds_per_step  of the training process, with as many others beside it as there were workers

low, high: 95 % bootstrap over seeds and prompts. The paper's claims are rows of metric "claim": see `bench.reproduce.claims`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.clock import summary
from bench.reproduce import claims, figures, paper
from bench.reproduce.arms import ABLATIONS, BRIEF, FULL, MAIN, OURS, QUICK, START, Arm, Budget
from bench.reproduce.claims import Measures
from bench.reproduce.curves import EAGER
from bench.reproduce.full_pictures import MEASURES as MEASURED
from bench.reproduce.full_pictures import held_out, probes_of
from bench.reproduce.perceptual import Metrics
from bench.reproduce.pictures import CURVE, DOMAINS, FEW, KEPT, MANY, sample
from bench.reproduce.resampling import Draws, Key, Sample, interval
from bench.reproduce.runs import Plan
from bench.reproduce.subjects import Embedded, Given
from bench.results import Options, Row, failed
from dopsd_fast.data.records import read_records
from dopsd_fast.errors import UserError


def run(options: Options, out: Path) -> list[Row]:
    """`out`: where the runs, pictures and figures go; what is finished there is not done again."""
    arms = (QUICK if options.quick else MAIN) + (ABLATIONS if options.ablations else ())
    budget = options.budget or (BRIEF if options.quick else FULL)
    if bool(options.evaluation) != bool(options.data):
        raise UserError("reproduce: --data (records to train on) and --eval (what is held out, and what measures) go together")
    if not options.evaluation:
        if options.model != "nano":
            raise UserError(f"reproduce: --model {options.model} needs --data PATH and --eval PATH; without them it is nano")
        plan = Plan(out / "work", Embedded(out / "work"), given(budget, options), workers=options.threads)
        rows = reproduce(plan, arms, Measures(), read_embedded)
        figures.embedded(plan, arms, out)
        return rows
    subject = Given(options.model, options.data, options.evaluation, str(options.device), options.recipe, options.more)
    metrics = Metrics(Path(options.evaluation), options.device)
    metrics.check()
    settings = subject.settings()
    held_out(Path(options.evaluation), settings, subject.family.pixel_multiple)
    probes_of(Path(options.evaluation))
    read_records(settings.data, subject.family.pixel_multiple)
    budget = given(replace(budget, seeds=1, steps=settings.train.steps), options)
    gpus = torch.cuda.device_count() if options.device.type == "cuda" else 0
    launcher = ("-m", "deepspeed.launcher.runner") if gpus > 1 else ()
    arms = tuple(arm for arm in arms if arm.trained_by == "trainer" and arm.data == "all")
    plan = Plan(out / "work", subject, budget, workers=1, launcher=launcher)
    rows = reproduce(plan, arms, measures_of(metrics, subject), read_given)
    rows += [failed("reproduce", "metrics", one.name, "available", "", one.why) for one in metrics.missing()]
    figures.given(plan, arms, out, subject.family.deployment_steps)
    return rows


def given(budget: Budget, options: Options) -> Budget:
    """With what the command line says of it."""
    return replace(budget, steps=options.steps or budget.steps, seeds=options.seeds or budget.seeds)


def measures_of(metrics: Metrics, subject: Given) -> Measures:
    there = metrics.available()
    quality = next((name for name in ("fid", "lpips") if name in there), "fid")
    return Measures(quality, "dino_distance", "probes", subject.family.deployment_steps)


def reproduce(plan: Plan, arms: Sequence[Arm], measures: Measures, read) -> list[Row]:
    """`read`: the folder of what was drawn -> (domain, steps) -> Sample."""
    commits = plan.check_folder()
    plan.train_all(arms)
    samples: dict[Key, list[Sample]] = {}
    for name, rate, seed in places(plan, arms):
        for (domain, steps), one in read(plan.drawn(name, rate, seed)).items():
            samples.setdefault((name, domain, steps), []).append(one)
    rows = [*claims.rows(Draws(samples), measures, plan.budget.seeds), *tables(samples), *training(plan, arms), *paper.rows()]
    return [*rows, Row("reproduce", "training", "ours", "commits", len(commits), "", note=", ".join(commits)[:200])]


def read_embedded(drawn: Path) -> dict[tuple[str, int], Sample]:
    from dopsd_fast.nano.build import load_judge

    if not (drawn / KEPT).exists():
        return {}
    judge = load_judge()
    with np.load(drawn / KEPT) as kept:
        return {(d, steps): sample(kept[f"{d}@{steps}"], d, judge) for d in DOMAINS for steps in (FEW, MANY)}


def read_given(drawn: Path) -> dict[tuple[str, int], Sample]:
    if not (drawn / MEASURED).exists():
        return {}
    found = {}
    for place, metrics in json.loads((drawn / MEASURED).read_text()).items():
        domain, _, steps = place.partition("@")
        each = {name: np.asarray(one["values"], np.float64) for name, one in metrics.items() if one["values"] is not None}
        fixed = {name: float(one["value"]) for name, one in metrics.items() if one["values"] is None}
        found[domain, int(steps)] = Sample(values=each, fixed=fixed)
    return found


def places(plan: Plan, arms: Sequence[Arm]) -> Iterator[tuple[str, float, int]]:
    yield START, 0.0, 0
    for arm in arms:
        for seed in plan.budget.seeds_of(arm):
            if arm.rate_from in plan.rates:
                yield arm.name, plan.rates[arm.rate_from], seed


def tables(samples: Mapping[Key, list[Sample]]) -> Iterator[Row]:
    draws = Draws(samples)
    for (arm, domain, steps), found in samples.items():
        start = (START, domain, steps)
        for metric in found[0].metrics:
            values = draws.values((arm, domain, steps), metric)
            yield resampled(f"{domain}@{steps}_steps", arm, metric, values, len(found))
            if arm != START and start in draws:
                minus = values - draws.values(start, metric)
                yield resampled(f"{domain}@{steps}_steps", arm, f"{metric}_minus_start", minus, len(found))


def resampled(case: str, arm: str, metric: str, values: np.ndarray, seeds: int) -> Row:
    value, low, high = interval(values)
    if not np.isfinite([value, low, high]).all():
        return failed("reproduce", case, arm, metric, "", "not a finite number")
    return Row("reproduce", case, arm, metric, value, "", n=seeds, low=low, high=high)


# ---- how it was trained ----------------------------------------------------------------------------------------------------


def training(plan: Plan, arms: Sequence[Arm]) -> Iterator[Row]:
    for (arm, seed), why in plan.lost.items():
        yield failed("reproduce", f"seed_{seed}", arm, "trained", "", why)
    for case, scored in (("search", plan.scores), ("search@second_seed", plan.second)):
        for name, scores in scored.items():
            if name in plan.rates and case == "search":
                yield Row("reproduce", case, name, "learning_rate", plan.rates[name], "")
            for rate, score in sorted(scores.items()):
                if np.isfinite(score):
                    yield Row("reproduce", case, name, f"score_at_{rate:g}", score, "")
                else:
                    yield failed("reproduce", case, name, f"score_at_{rate:g}", "", "the run did not come to its end")
    curves = {arm.name: list(curves_of(plan, arm)) for arm in (Arm(START, START), *arms)}
    for name, found in curves.items():
        yield from curve_rows(name, found)
    times = {arm.name: seconds(plan, arm) for arm in arms}
    for name, values in times.items():
        if values:
            yield Row("reproduce", "training", name, "seconds_per_step", unit="s", **summary(values))
    if times.get(EAGER) and times.get(OURS):
        share = statistics.median(times[OURS]) / statistics.median(times[EAGER])
        yield Row("reproduce", "training", EAGER, "time_ours_over_eager", share, "x")
        yield from same_curves(curves[OURS], curves[EAGER])


def curves_of(plan: Plan, arm: Arm) -> Iterator[list[dict]]:
    """One a seed: [{"step", "target": {metric: value}, "original": {...}}], the start's point first."""
    start: list[dict] = []
    for name, rate, seed in places(plan, [] if arm.name == START else [arm]):
        file = plan.drawn(name, rate, seed) / CURVE
        points = json.loads(file.read_text()) if file.exists() else []
        start = points if name == START else start
        if name == arm.name and points:
            yield points if name == START else [*start, *points]


def curve_rows(name: str, found: Sequence[list[dict]]) -> Iterator[Row]:
    for step in common_steps(found):
        points = [point for curve in found for point in curve if point["step"] == step]
        for domain in DOMAINS:
            for metric in points[0][domain]:
                values = [point[domain][metric] for point in points]
                case, mean = f"{domain}@step_{step}", statistics.mean(values)
                spread = {"n": len(values), "low": min(values), "high": max(values)}
                yield Row("reproduce", case, name, f"curve_{metric}", mean, "", **spread)


def common_steps(curves: Sequence[list[dict]]) -> list[int]:
    """Those that all curves have: a run that was stopped has a checkpoint of its own there."""
    steps = [{point["step"] for point in curve} for curve in curves]
    return sorted(set.intersection(*steps)) if steps else []


def seconds(plan: Plan, arm: Arm) -> list[float]:
    """Of every step after the first ten, over all seeds."""
    found = []
    for name, rate, seed in places(plan, [arm]):
        file = plan.run(name, rate, seed) / "metrics.jsonl"
        for line in file.read_text().splitlines()[10:] if name != START and file.exists() else ():
            took = json.loads(line)["seconds"]
            found.append(sum(took[part] for part in ("data", "rollout", "optimizer")) if isinstance(took, dict) else took)
    return found


def same_curves(ours: Sequence[list[dict]], eager: Sequence[list[dict]]) -> Iterator[Row]:
    """For each curve: the largest distance of the two methods' means over the largest spread (highest minus lowest) of the
    seeds of one method. Below 1 the curves are the same within what a seed changes."""
    steps = common_steps([*ours, *eager])
    for domain in DOMAINS if ours and eager else ():
        for metric in ours[0][0][domain]:
            tables = [np.array([[point[domain][metric] for point in curve if point["step"] in steps] for curve in curves])
                      for curves in (ours, eager)]  # fmt: skip
            apart = np.abs(tables[0].mean(0) - tables[1].mean(0)).max()
            noise = max(np.ptp(table, axis=0).max() for table in tables)
            if noise > 0:
                case, share = f"{domain}@curves", float(apart / noise)
                yield Row("reproduce", case, EAGER, f"{metric}_apart_over_seed_spread", share, "x")
