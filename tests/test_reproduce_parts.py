"""The comparison's arithmetic and its plan, without training: intervals, claims, the search of learning rates, resumption."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import live
from bench.reproduce import claims, runs
from bench.reproduce.arms import ABLATIONS, DOMAINS, MAIN, NAMES, OURS, QUICK, START, Arm, Budget, next_rate, ranked
from bench.reproduce.claims import Measures
from bench.reproduce.curves import states
from bench.reproduce.embedded import Embedded, sample, scenes_of
from bench.reproduce.resampling import Draws, Moments, Sample, interval
from bench.reproduce.runs import Lost, Plan
from bench.suites import reproduce
from dopsd_fast.errors import UserError
from dopsd_fast.nano import measure, world
from dopsd_fast.nano.build import load_judge
from dopsd_fast.settings.load import load_settings

# ---- measures and intervals ------------------------------------------------------------------------------------------------


def pictures(domain: str, count: int, noise: float, seed: int = 0) -> np.ndarray:
    """Exact renders with noise, as they are kept."""
    exact = world.render(scenes_of(domain, count, 31_000))
    dirty = exact + noise * np.random.default_rng(seed).standard_normal(exact.shape)
    return (dirty.clip(0, 1) * 255).round().astype(np.uint8)


def test_a_sample_measures_what_the_functions_of_the_world_do():
    from dopsd_fast.nano import judge as judging

    scenes, kept = scenes_of("target", 24, 31_000), pictures("target", 24, 0.2)
    one, whole = sample(kept, "target", load_judge()), torch.ones(1, 24, dtype=torch.float64)
    made = torch.from_numpy(kept).permute(0, 3, 1, 2).float() / 127.5 - 1
    real = measure.to_pictures(world.render([world.reseed(s, s.seed ^ 0x77) for s in scenes]))
    assert one.under("patch_fd", whole)[0] == pytest.approx(measure.patch_distance(made, real), rel=1e-9)
    assert one.under("style_distance", whole)[0] == pytest.approx(measure.palette_distance(made, scenes), rel=1e-9)
    accuracy = judging.accuracy(load_judge(), made, scenes)
    assert one.under("accuracy", whole)[0] == pytest.approx(sum(accuracy.values()) / 4, rel=1e-6)


def test_a_weighted_frechet_distance_is_that_of_repeated_pictures():
    generator = torch.Generator().manual_seed(3)
    patches, real = torch.randn(5, 7, 6, generator=generator), torch.randn(40, 6, generator=generator)
    found = Moments.of(patches, real).distances(torch.tensor([[2.0, 0.0, 1.0, 3.0, 1.0]], dtype=torch.float64))
    repeated = patches[[0, 0, 2, 3, 3, 3, 4]].flatten(0, 1).double()
    assert found.item() == pytest.approx(measure.frechet(repeated, real.double()), rel=1e-9)


def test_an_interval_covers_what_it_should():
    """Means of 60 standard normals over 200 repetitions: the share of 95 % intervals that cover 0. Four binomial deviations
    of it (.015 each), and .03 for what the percentile method lacks at this size."""
    covered = 0
    for repeat in range(200):
        values = np.random.default_rng([repeat, 5]).standard_normal(60)
        draws = Draws({("a", "target", 4): [Sample(values={"m": values})]}, count=400, seed=repeat)
        value, low, high = interval(draws.values(("a", "target", 4), "m"))
        assert value == pytest.approx(values.mean()) and low < value < high
        covered += low <= 0 <= high
    assert abs(covered / 200 - 0.95) < 4 * 0.015 + 0.03


def test_differences_are_paired_by_prompt_and_seeds_widen():
    rng = np.random.default_rng(1)
    hard = rng.standard_normal(50)
    samples = {
        ("a", "target", 4): [Sample(values={"m": hard})], ("b", "target", 4): [Sample(values={"m": hard + 0.1})],
        ("c", "target", 4): [Sample(values={"m": hard + shift}) for shift in (-1.0, 0.0, 1.0)],
    }
    draws = Draws(samples)
    a, b, c = (draws.values((name, "target", 4), "m") for name in "abc")
    assert np.allclose(b - a, 0.1) and np.ptp(interval(a)) > 0.3
    wide = interval(c - a)
    assert wide[0] == pytest.approx(0, abs=1e-12) and wide[1] < -0.5 and wide[2] > 0.5


def test_a_frechet_interval_holds_its_measured_value():
    judge = load_judge()
    seeds = [sample(pictures("original", 16, noise), "original", judge) for noise in (0.1, 0.2)]
    value, low, high = interval(Draws({("a", "original", 4): seeds}).values(("a", "original", 4), "patch_fd"))
    assert low < value < high
    whole = torch.ones(1, 16, dtype=torch.float64)
    assert value == pytest.approx(np.mean([one.under("patch_fd", whole) for one in seeds]))


# ---- claims ----------------------------------------------------------------------------------------------------------------

GOOD = {  # (patch_fd, style_distance, accuracy) of the target, of the original domain
    START: ((9.0, 0.49, 0.98), (0.18, 0.07, 0.98)),
    "sft": ((0.7, 0.15, 0.98), (0.47, 0.13, 0.98)),
    "pso": ((2.0, 0.30, 0.98), (0.20, 0.12, 0.98)),
    OURS: ((0.4, 0.10, 0.98), (0.20, 0.07, 0.98)),
    "live_teacher": ((24.0, 0.5, 0.5), (17.0, 0.5, 0.5)),
    "frozen_teacher": ((0.42, 0.10, 0.98), (0.20, 0.07, 0.98)),
    "off_policy": ((0.5, 0.12, 0.98), (0.20, 0.07, 0.98)),
}


def made_up(numbers: dict, spread: float = 0.02) -> Draws:
    """Two seeds and 40 prompts whose mean is the number; a Frechet distance is a mean here."""
    samples = {}
    for arm, domains in numbers.items():
        for domain, values in zip(DOMAINS, domains):
            for steps in (4, 32):
                rng, found = np.random.default_rng(len(samples)), []
                for _ in range(2):
                    noise = rng.standard_normal(40) * spread
                    factor = 4 if steps == 32 and arm == "sft" else 1
                    scaled = (values[0] / factor, *values[1:])
                    names = ("patch_fd", "style_distance", "accuracy")
                    found.append(Sample(values={n: v * (1 + noise - noise.mean()) for n, v in zip(names, scaled)}))
                samples[arm, domain, steps] = found
    return Draws(samples)


def verdicts(numbers: dict, **options) -> dict[str, float]:
    return {row.case: row.value for row in claims.rows(made_up(numbers, **options), Measures(), 2)}


def test_claims_are_supported_where_they_hold():
    found = claims.rows(made_up(GOOD), Measures(), 2)
    assert {row.case: row.value for row in found} == dict.fromkeys(claims.claims(Measures()), 1)
    assert all(row.metric == "claim" and row.low < row.high and "claimed" in row.note for row in found)


@pytest.mark.parametrize(
    ("claim", "arm", "target", "original", "value"),
    [
        ("sft_loses_few_step", "sft", None, None, 1),
        ("dopsd_learns_target", OURS, (8.9, 0.48, 0.98), None, 0),  # the distance has fallen, the style has not
        ("dopsd_learns_target", OURS, (9.9, 0.50, 0.98), None, -1),
        ("dopsd_keeps_original", OURS, None, (0.2, 0.07, 0.90), -1),
        ("dopsd_beats_sft", OURS, (0.4, 0.20, 0.98), None, 0),  # better by one measure, worse by the other
        ("dopsd_beats_sft", OURS, (0.9, 0.20, 0.98), None, -1),
        ("live_teacher_collapses", "live_teacher", (0.41, 0.1, 0.98), None, -1),
        ("sft_forgets", "sft", None, (0.1, 0.07, 0.98), -1),
        ("dopsd_beats_pso", "pso", (0.2, 0.05, 0.98), None, -1),
        ("ema_at_least_frozen", "frozen_teacher", (0.4, 0.08, 0.98), None, -1),
        ("on_policy_beats_off_policy", "off_policy", (0.3, 0.09, 0.98), None, -1),
    ],
)
def test_claims_fail_where_they_do_not_hold(claim, arm, target, original, value):
    numbers = GOOD | {arm: (target or GOOD[arm][0], original or GOOD[arm][1])}
    assert verdicts(numbers)[claim] == value


def test_a_claim_within_the_noise_is_undecided():
    near = GOOD | {OURS: ((0.69, 0.149, 0.98), GOOD[OURS][1])}
    assert verdicts(near, spread=0.5)["dopsd_beats_sft"] == 0


def test_claims_of_arms_that_were_not_trained_say_so():
    found = claims.rows(made_up({name: GOOD[name] for name in (START, "sft", OURS)}), Measures(), 2)
    notes = {row.case: row.note for row in found if row.value == 0}
    assert set(notes) == {"live_teacher_collapses", "dopsd_beats_pso", "ema_at_least_frozen", "on_policy_beats_off_policy"}
    assert all("not measured" in note for note in notes.values()) and "frozen_teacher" in notes["ema_at_least_frozen"]
    other = claims.rows(made_up(GOOD), Measures("fid", "dino_distance", "probes", 8), 1)
    assert {row.value for row in other} == {0} and all("not measured" in row.note for row in other)


# ---- arms and the search of learning rates ---------------------------------------------------------------------------------


def test_the_arms_are_those_of_the_paper(tmp_path):
    assert [arm.name for arm in MAIN] == ["sft", "sft_lora", "pso", "dopsd", "dopsd_eager", "live_teacher"]
    assert [arm.name for arm in QUICK] == ["sft", "dopsd", "live_teacher"]
    named = "frozen_teacher off_policy sft_on_teacher_samples weight_x1 weight_mu states_2 states_8 ema_0.99 ema_0.999 ema_bf16"
    assert set(named.split()) <= {arm.name for arm in ABLATIONS}
    assert len(NAMES) == 1 + len(MAIN) + len(ABLATIONS)
    subject, budget = Embedded(tmp_path), Budget(6, 1, False, 4, 4, 4, 3)
    seen = set()
    for arm in (*MAIN, *ABLATIONS):
        s = load_settings([*subject.words(arm, budget), "train.learning_rate=1e-4", "train.seed=0"])
        assert (s.train.steps, s.train.batch_size, s.checkpoint.every) == (6, 8, 2)
        assert (s.adapter.kind == "lora") == arm.lora == ("lora" in arm.name or arm.name.startswith("custom"))
        seen.add((s.method, s.teacher, s.adapter.kind, s.data.path) .__repr__())
    assert len(seen) == len(MAIN) + len(ABLATIONS) - 1  # the eager reference has ours
    assert len((tmp_path / "all" / "data.jsonl").read_text().splitlines()) == 128
    assert len((tmp_path / "few" / "data.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("which", ["all", "few"])
def test_no_caption_is_trained_on_and_tested(which, tmp_path):
    records = [json.loads(line) for line in (Embedded(tmp_path).data(which) / "data.jsonl").read_text().splitlines()]
    trained = {record["medium_en"] for record in records}
    assert len(trained) == {"all": 117, "few": 4}[which]
    for domain in DOMAINS:
        tested, chosen = ([world.caption(s) for s in scenes_of(domain, n, seed)] for n, seed in ((128, 31_000), (64, 17_000)))
        assert (len(tested), len(chosen)) == (128, 64) and len(set(tested)) > 60
        assert not trained & {*tested, *chosen} and not set(tested) & set(chosen)
        assert scenes_of(domain, 8, 31_000) == scenes_of(domain, 128, 31_000)[:8]


def test_a_search_goes_on_until_the_best_lies_inside():
    assert next_rate({1e-4: 3.0, 3e-4: 1.0, 1e-3: 2.0}) is None
    assert next_rate({1e-4: 3.0, 3e-4: 2.0, 1e-3: 1.0}) == 3e-3
    assert next_rate({1e-4: 1.0, 3e-4: 2.0, 1e-3: 3.0}) == 3e-5
    assert next_rate({1e-4: 1.0, 3e-4: math.nan, 1e-3: math.inf}) == 3e-5
    assert next_rate({3e-2: 1.0, 1e-2: 2.0}) is None and next_rate({1e-4: math.inf}) is None
    assert ranked({1e-4: math.nan, 3e-4: 5.0, 1e-3: math.inf, 3e-3: 4.0}) == [3e-3, 3e-4] and ranked({1e-4: math.inf}) == []


class Fake:
    """Trains nothing: the score of a rate is its distance from `best` of the arm, in decades, plus `luck` of the run by name;
    `bad`: runs that are lost."""

    module, rates, curve = "none", (1e-4, 3e-4, 1e-3), False

    def __init__(self, best: dict[str, float], bad: tuple[str, ...] = ()) -> None:
        self.best, self.bad, self.calls, self.luck = best, bad, [], {}

    def describe(self):
        return {"fake": True}

    def words(self, arm, budget):
        return []

    def job(self, budget, curve, final):
        return {}

    def score(self, drawn):
        arm, _, rest = drawn.name.partition("-")
        return abs(math.log10(float(rest.rsplit("-", 1)[0]) / self.best[arm])) + self.luck.get(drawn.name, 0.0)

    def known_rate(self, arm):
        return 5e-4


def plan_of(folder: Path, subject: Fake, monkeypatch, seeds: int = 2, search: bool = True) -> Plan:
    plan = Plan(folder, subject, Budget(1, seeds, search, 1, 1, 1, 1), workers=2)

    async def process(arguments, name):
        subject.calls.append(name)
        if name in subject.bad:
            raise Lost(f"{name} was lost")
        if name.endswith(".train"):
            (plan.folder / "runs" / name.removesuffix(".train") / "export").mkdir(parents=True)
        else:
            Path(json.loads(Path(arguments[-1]).read_text())["out"], "validation.json").touch()

    monkeypatch.setattr(plan, "_process", process)
    return plan


ARMS = (Arm("sft", "SFT"), Arm(OURS, "ours"), Arm("live_teacher", "live", rate_of=OURS))


def test_a_plan_searches_each_method_alike_and_trains_every_seed_once(tmp_path, monkeypatch):
    subject = Fake({"sft": 2.9e-3, OURS: 3.1e-4})
    plan = plan_of(tmp_path, subject, monkeypatch)
    plan.train_all(ARMS)
    assert plan.rates == {"sft": 3e-3, OURS: 3e-4} and not plan.lost
    assert sorted(plan.scores["sft"]) == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2] and sorted(plan.scores[OURS]) == [1e-4, 3e-4, 1e-3]
    trained = [name for name in subject.calls if name.endswith(".train")]
    assert len(trained) == len(set(trained)) == 5 + 3 + 2 + 2 + 2  # searched, the two best again, the arm that takes ours
    assert {"live_teacher-0.0003-0.train", "live_teacher-0.0003-1.train"} <= set(trained)
    again = Fake(subject.best)
    plan_of(tmp_path, again, monkeypatch).train_all(ARMS)
    assert again.calls == []


def test_a_second_seed_decides_between_the_two_best_rates(tmp_path, monkeypatch):
    lucky = Fake({"sft": 3e-4, OURS: 3e-4}, bad=(f"{OURS}-0.0003-1.train",))
    lucky.luck = {"sft-0.0003-1": 1.2, "sft-0.0001-0": -0.1}
    plan = plan_of(tmp_path, lucky, monkeypatch)
    plan.train_all(ARMS[:2])
    assert plan.scores["sft"][3e-4] < plan.scores["sft"][1e-4] < plan.scores["sft"][1e-3]  # the first seed's choice
    assert set(plan.second["sft"]) == {1e-4, 3e-4} and plan.rates["sft"] == 1e-4
    assert plan.second[OURS][3e-4] == math.inf and plan.rates[OURS] != 3e-4  # a lost run cannot be chosen
    found = [row for row in reproduce.trained(plan, ARMS[:2]) if row.case == "search@second_seed"]
    assert {(row.variant, row.metric) for row in found} >= {("sft", "score_at_0.0003"), (OURS, "score_at_0.0003")}
    assert [row.variant for row in found if row.status == "failed"] == [OURS]
    one_seed = plan_of(tmp_path / "one", Fake({"sft": 3e-4}), monkeypatch, seeds=1)
    one_seed.train_all(ARMS[:1])
    assert one_seed.second == {"sft": {}} and one_seed.rates == {"sft": 3e-4}


def test_an_arm_may_have_fewer_seeds_than_the_budget(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, Fake({}), monkeypatch, seeds=4, search=False)
    plan.train_all([Arm("sft", "SFT", seeds=2), Arm(OURS, "ours"), Arm("pso", "PSO", seeds=9)])
    found = [name.partition("-")[0] for name in plan.subject.calls if name.endswith(".train")]
    assert [found.count(name) for name in ("sft", OURS, "pso")] == [2, 4, 4]


def test_a_lost_run_is_a_row_and_stops_nobody_else(tmp_path, monkeypatch):
    bad = ("sft-0.0003-2.train", *(f"{OURS}-{rate}-0.train" for rate in ("0.0001", "0.0003", "0.001")))
    plan = plan_of(tmp_path, Fake({"sft": 3e-4, OURS: 3e-4}, bad), monkeypatch, seeds=3)
    plan.train_all(ARMS)
    assert plan.rates == {"sft": 3e-4} and set(plan.lost) == {("sft", 2), (OURS, 0), ("live_teacher", 0)}
    assert (tmp_path / "drawn" / "sft-0.0003-0" / "finished").exists()
    found = [row for row in reproduce.trained(plan, ARMS) if row.metric == "trained"]
    assert {(row.variant, row.status) for row in found} == {(name, "failed") for name in ("sft", OURS, "live_teacher")}
    plan.subject.bad = ()
    once_more = plan_of(tmp_path, plan.subject, monkeypatch, seeds=3)
    once_more.train_all(ARMS)
    assert not once_more.lost and OURS in once_more.rates


def test_known_rates_are_used_without_a_search(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, Fake({}), monkeypatch, search=False)
    plan.train_all(ARMS)
    assert plan.rates == {"sft": 5e-4, OURS: 5e-4} and plan.scores == {}
    with pytest.raises(UserError, match="learning rate of dopsd"):
        plan_of(tmp_path, Fake({}), monkeypatch, search=False).train_all(ARMS[2:])


def test_a_folder_of_another_budget_is_refused(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, Fake({}), monkeypatch)
    assert plan.check_folder() == plan.check_folder()
    plan.budget = replace(plan.budget, steps=7)
    with pytest.raises(UserError, match="name another --out"):
        plan.check_folder()


def test_a_process_that_fails_says_how(tmp_path):
    plan = Plan(tmp_path, Fake({}), Budget(1, 1, True, 1, 1, 1, 1), workers=1)
    with pytest.raises(Lost, match=r"x.train ended with 3: ValueError: no such thing \(all of it: .*x.train.log\)"):
        fails = "import sys; print('ValueError: no such thing', file=sys.stderr); sys.exit(3)"
        asyncio.run(plan._process(["-c", fails], "x.train"))
    assert runs.VALIDATION == "validation.json"


def test_a_plan_that_is_stopped_ends_its_processes(tmp_path):
    plan = Plan(tmp_path, Fake({}), Budget(1, 1, True, 1, 1, 1, 1), workers=1)
    log = tmp_path / "logs" / "x.train.log"

    def stop():
        while not (log.exists() and log.read_text().endswith("\n")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before, thread = live.stop_at_sigterm(), threading.Thread(target=stop)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            sleeps = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
            asyncio.run(plan._process(["-c", sleeps], "x.train"))
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert not Path(f"/proc/{log.read_text().strip()}").exists()


def test_curves_have_the_steps_that_all_seeds_have(tmp_path):
    """A run that was stopped has a checkpoint more."""
    def curve(*points):
        return [{"step": step} | {domain: {"style_distance": value} for domain in DOMAINS} for step, value in points]

    found = [curve((0, 9.0), (13, 5.0), (16, 3.0)), curve((0, 9.0), (16, 1.0))]
    rows = list(reproduce.curve_rows("off_policy", found))
    assert {(row.case, row.value, row.low, row.high) for row in rows if row.case.startswith("target")} == {
        ("target@step_0", 9.0, 9.0, 9.0), ("target@step_16", 2.0, 1.0, 3.0)
    }
    assert states(rows, {}) is None
    assert states([*rows, *reproduce.curve_rows(OURS, found)], {}) is not None
