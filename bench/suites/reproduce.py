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
    learning_rate, score_at_RATE    what the search chose, and what each rate scored on validation prompts
    seconds_per_step  of the training process, with as many others beside it as there were workers

low, high: 95 % bootstrap over seeds and prompts. The paper's claims are rows of metric "claim": see `bench.reproduce.claims`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.clock import summary
from bench.reproduce import claims
from bench.reproduce.arms import ABLATIONS, BEFORE, BRIEF, DOMAINS, FULL, MAIN, QUICK, START, Arm
from bench.reproduce.claims import Measures
from bench.reproduce.curves import grids
from bench.reproduce.embedded import CURVE, Embedded
from bench.reproduce.given import Given
from bench.reproduce.resampling import Draws, Key, Sample, interval
from bench.reproduce.runs import Plan
from bench.results import Options, Row, failed
from dopsd_fast.errors import UserError


def run(options: Options, out: Path) -> list[Row]:
    """`out`: where the runs, pictures and figures go; what is finished there is not done again."""
    arms = (QUICK if options.quick else MAIN) + (ABLATIONS if options.ablations else ())
    budget = options.budget or (BRIEF if options.quick else FULL)
    if bool(options.evaluation) != bool(options.data):
        raise UserError("reproduce: --data (records to train on) and --eval (what is held out, and what measures) go together")
    if not options.evaluation and options.model != "nano":
        raise UserError(f"reproduce: --model {options.model} needs --data PATH and --eval PATH; without them it is nano")
    missing: list[Row] = []
    if not options.evaluation:
        plan, measures = Plan(out / "work", Embedded(out / "work"), budget, workers=options.threads), Measures()
    else:
        subject = Given(options.model, options.data, options.evaluation, str(options.device), options.recipe, options.more)
        quality = next((name for name in ("fid", "lpips") if name in subject.metrics.available()), "fid")
        measures = Measures(quality, "dino_distance", "probes", subject.few)
        missing += [
            failed("reproduce", "metrics", name, "available", "", why) for name, why in subject.metrics.missing().items()
        ]
        several = options.device.type == "cuda" and torch.cuda.device_count() > 1
        arms = tuple(arm for arm in arms if arm.trained_by == "trainer" and arm.data == "all")
        budget = replace(budget, seeds=1, steps=subject.settings.train.steps)
        plan = Plan(out / "work", subject, budget, workers=1, launcher=("-m", "deepspeed.launcher.runner") if several else ())
    plan.budget = replace(budget, steps=options.steps or budget.steps, seeds=options.seeds or budget.seeds)
    rows = reproduce(plan, arms, measures)
    grids(plan, arms, out)
    return rows + missing


def reproduce(plan: Plan, arms: Sequence[Arm], measures: Measures) -> list[Row]:
    commits = plan.check_folder()
    plan.train_all(arms)
    samples: dict[Key, list[Sample]] = {}
    for arm in (BEFORE, *arms):
        for rate, seed in plan.seeds(arm):
            for (domain, steps), one in plan.subject.read(plan.drawn(arm, rate, seed)).items():
                samples.setdefault((arm.name, domain, steps), []).append(one)
    draws = Draws(samples)
    rows = [*claims.rows(draws, measures, plan.budget.seeds), *measured(draws), *trained(plan, arms)]
    return [*rows, Row("reproduce", "training", "ours", "commits", len(commits), "", note=", ".join(commits)[:200])]


def measured(draws: Draws) -> Iterator[Row]:
    for (arm, domain, steps), found in draws.samples.items():
        case, start = f"{domain}@{steps}_steps", (START, domain, steps)
        for metric in found[0].metrics:
            tables = {metric: draws.values((arm, domain, steps), metric)}
            if arm != START and start in draws.samples:
                tables[f"{metric}_minus_start"] = tables[metric] - draws.values(start, metric)
            for name, values in tables.items():
                value, low, high = interval(values)
                if np.isfinite([value, low, high]).all():
                    yield Row("reproduce", case, arm, name, value, "", n=len(found), low=low, high=high)
                else:
                    yield failed("reproduce", case, arm, name, "", "not a finite number")


def trained(plan: Plan, arms: Sequence[Arm]) -> Iterator[Row]:
    for (name, seed), why in plan.lost.items():
        yield failed("reproduce", f"seed_{seed}", name, "trained", "", why)
    for name, scores in plan.scores.items():
        if name in plan.rates:
            yield Row("reproduce", "search", name, "learning_rate", plan.rates[name], "")
        for case, scored in (("search", scores), ("search@second_seed", plan.second.get(name, {}))):
            for rate, score in sorted(scored.items()):
                if np.isfinite(score):
                    yield Row("reproduce", case, name, f"score_at_{rate:g}", score, "")
                else:
                    yield failed("reproduce", case, name, f"score_at_{rate:g}", "", "the run did not come to its end")
    for arm in (BEFORE, *arms):
        yield from curve_rows(arm.name, curves_of(plan, arm))
    for arm in arms:
        if values := seconds(plan, arm):
            yield Row("reproduce", "training", arm.name, "seconds_per_step", unit="s", **summary(values))


def curves_of(plan: Plan, arm: Arm) -> list[list[dict]]:
    """One a seed: [{"step", "target": {metric: value}, "original": {...}}], the start's point first."""
    files = [plan.drawn(one, *place) / CURVE for one in (BEFORE, arm) for place in plan.seeds(one)]
    start, *found = [json.loads(file.read_text()) if file.exists() else [] for file in files]
    return [start] if arm.name == START else [[*start, *points] for points in found if points]


def curve_rows(name: str, found: Sequence[list[dict]]) -> Iterator[Row]:
    """At the steps that all curves have: a run that was stopped has a checkpoint of its own there."""
    steps = [{point["step"] for point in curve} for curve in found]
    for step in sorted(set.intersection(*steps)) if steps else ():
        points = [point for curve in found for point in curve if point["step"] == step]
        for domain in DOMAINS:
            for metric in points[0][domain]:
                values = [point[domain][metric] for point in points]
                spread = {"n": len(values), "low": min(values), "high": max(values)}
                yield Row("reproduce", f"{domain}@step_{step}", name, f"curve_{metric}", statistics.mean(values), "", **spread)


def seconds(plan: Plan, arm: Arm) -> list[float]:
    """Of every step after the first ten, over all seeds."""
    found = []
    for rate, seed in plan.seeds(arm):
        file = plan.run(arm, rate, seed) / "metrics.jsonl"
        for line in file.read_text().splitlines()[10:] if file.exists() else ():
            took = json.loads(line)["seconds"]
            found.append(sum(took[part] for part in ("data", "rollout", "optimizer")) if isinstance(took, dict) else took)
    return found
