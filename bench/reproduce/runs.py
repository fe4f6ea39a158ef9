"""Trains the arms, several at a time, each in processes of its own: the trainer as a user starts it, then the pictures.

Everything is in one folder, and what is finished there is not done again; a run that was interrupted goes on from its
checkpoint:

    runs/ARM-RATE-SEED/       run folders               drawn/...    what `pictures` wrote of each
    logs/                     what the processes said
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.forks import last_error, rank_environment
from bench.live import say
from bench.machine import commit
from bench.reproduce.arms import START, Arm, Budget, best_rate, finalists, next_rate
from bench.reproduce.subjects import Subject
from bench.results import ROOT
from dopsd_fast.errors import UserError

VALIDATION, FINISHED = "validation.json", "finished"
"""In the folder of what was drawn: measures that learning rates are chosen by; that everything of a seed is there."""


class Lost(RuntimeError):
    """A run or its pictures failed; one line."""


@dataclass
class Plan:
    """`workers` processes at a time, `launcher` before the trainer's file. Of each arm: what its search of learning rates
    scored (infinite: the run was lost), what the two best of them scored with the second seed, and what it chose; `lost`: seeds
    that failed, and why."""

    folder: Path
    subject: Subject
    budget: Budget
    workers: int
    launcher: Sequence[str] = ()
    scores: dict[str, dict[float, float]] = field(default_factory=dict)
    second: dict[str, dict[float, float]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    lost: dict[tuple[str, int], str] = field(default_factory=dict)
    _live: set[Any] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # ---- what is where ---------------------------------------------------------------------------------------------------

    def name(self, arm: str, rate: float, seed: int) -> str:
        return arm if arm == START else f"{arm}-{rate:g}-{seed}"

    def run(self, arm: str, rate: float, seed: int) -> Path:
        return self.folder / "runs" / self.name(arm, rate, seed)

    def drawn(self, arm: str, rate: float, seed: int) -> Path:
        return self.folder / "drawn" / self.name(arm, rate, seed)

    # ---- what is done ----------------------------------------------------------------------------------------------------

    def check_folder(self) -> list[str]:
        """The commits that what lies in the folder was made at, this one included. UserError: it is of another model or
        budget."""
        file, mine = self.folder / "plan.json", {"subject": self.subject.describe(), "budget": asdict(self.budget)}
        kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {**mine, "commits": []}
        if {name: kept[name] for name in mine} != mine:
            raise UserError(f"{self.folder} holds runs of {kept['subject']} with {kept['budget']}: name another --out")
        now = commit() or "unknown"
        kept["commits"] += [now] if now not in kept["commits"] else []
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept) + "\n")
        return kept["commits"]

    def train_all(self, arms: Sequence[Arm]) -> None:
        """Searches the rates, trains every seed of every arm and draws; what fails is in `lost`."""
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                self._train_all(pool, arms)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                with self._lock:
                    for process in self._live:
                        process.terminate()
                raise

    def _train_all(self, pool: ThreadPoolExecutor, arms: Sequence[Arm]) -> None:
        tasks: dict[Future, Callable[[], Iterable[Callable[[], Any]]]] = {}

        def start(call: Callable[[], Any], then: Callable[[], Iterable[Any]] = tuple) -> None:
            tasks[pool.submit(call)] = then

        waiting: dict[str, list[Arm]] = {}
        for arm in arms:
            waiting.setdefault(arm.rate_from, []).append(arm)
        searched = {arm.name: arm for arm in arms if not arm.rate_of}

        def seeds_of(owner: str) -> None:
            for arm in waiting.pop(owner, []):
                for seed in self.budget.seeds_of(arm):
                    start(partial(self._finish, arm, self.rates[owner], seed))

        def search(arm: Arm) -> None:
            """Starts what the search of the arm wants next, or its seeds."""
            scores, second = self.scores.setdefault(arm.name, {}), self.second.setdefault(arm.name, {})
            open_rates = [rate for rate in self.subject.rates if rate not in scores]
            if not open_rates and (more := next_rate(scores)) is not None:
                open_rates = [more]
            seed = 0
            if not open_rates and self.budget.seeds > 1 and not second:
                open_rates, seed = finalists(scores), 1
            if not open_rates:
                chosen = best_rate({rate: (scores[rate] + second[rate]) / 2 for rate in second}) or best_rate(scores)
                if chosen is None:
                    for taker in waiting.pop(arm.name, []):
                        self.lost[taker.name, 0] = f"no run of {arm.name} came to its end, at any learning rate"
                    return
                self.rates[arm.name] = chosen
                for rate in scores:
                    if rate != chosen:
                        self._prune(arm.name, rate, 0)
                        self._prune(arm.name, rate, 1)
                seeds_of(arm.name)
                return
            left = set(open_rates)

            def done(rate: float) -> tuple:
                left.discard(rate)
                if not left:
                    search(arm)
                return ()

            for rate in open_rates:
                start(partial(self._score, arm, rate, seed), partial(done, rate))

        start(partial(self._start_arm))
        for name, arm in searched.items():
            if self.budget.search:
                search(arm)
            else:
                self.rates[name] = self.subject.known_rate(arm)
                seeds_of(name)
        for owner in list(waiting):
            if owner not in searched:
                takers = ", ".join(arm.name for arm in waiting[owner])
                raise UserError(f"reproduce: {takers} take the learning rate of {owner}, which is not among the arms")
        while tasks:
            finished, _ = wait(tasks, return_when=FIRST_COMPLETED)
            for task in finished:
                then = tasks.pop(task)
                task.result()
                then()

    def _start_arm(self) -> None:
        try:
            self._draw(START, 0.0, 0, run="", curve=self.subject.curve, final=True)
        except Lost as error:
            self.lost[START, 0] = str(error)

    def _score(self, arm: Arm, rate: float, seed: int) -> None:
        scores, drawn = (self.second if seed else self.scores)[arm.name], self.drawn(arm.name, rate, seed)
        try:
            self._train(arm, rate, seed)
            if not (drawn / VALIDATION).exists():
                self._draw(arm.name, rate, seed, str(self.run(arm.name, rate, seed)), curve=False, final=False)
            scores[rate] = self.subject.score(drawn)
        except Lost:
            scores[rate] = float("inf")

    def _finish(self, arm: Arm, rate: float, seed: int) -> None:
        drawn = self.drawn(arm.name, rate, seed)
        try:
            if (drawn / FINISHED).exists():
                return
            self._train(arm, rate, seed)
            self._draw(arm.name, rate, seed, str(self.run(arm.name, rate, seed)),
                       curve=self.subject.curve and arm.curve, final=True)
            self._prune(arm.name, rate, seed)
        except Lost as error:
            self.lost[arm.name, seed] = str(error)

    def _prune(self, arm: str, rate: float, seed: int) -> None:
        """Leaves the last checkpoint: the others were for the curve."""
        for folder in sorted((self.run(arm, rate, seed) / "checkpoints").glob("step-*"))[:-1]:
            shutil.rmtree(folder)

    def words(self, arm: Arm, rate: float, seed: int) -> list[str]:
        """The settings of a run, its recipe first."""
        return [*self.subject.words(arm, self.budget), f"train.learning_rate={rate!r}", f"train.seed={seed}"]

    def _train(self, arm: Arm, rate: float, seed: int) -> None:
        run = self.run(arm.name, rate, seed)
        if (run / "export").exists():
            return
        say(f"{arm.says}, learning rate {rate:g}, seed {seed}: {self.budget.steps} steps")
        words = self.words(arm, rate, seed)
        if arm.trained_by == "eager":
            command = ["-m", "bench.reproduce.eager", str(run), *words]
        else:
            command = [*self.launcher, "dopsd_fast/train.py", *words, f"output.dir={run}", "resume=auto"]
        self._process(command, f"{run.name}.train")

    def _draw(self, arm: str, rate: float, seed: int, run: str, curve: bool, final: bool) -> None:
        out = self.drawn(arm, rate, seed)
        if final and (out / FINISHED).exists():
            return
        say(f"{out.name}: pictures")
        out.mkdir(parents=True, exist_ok=True)
        job = out / "job.json"
        job.write_text(json.dumps(self.subject.job(run, out, self.budget, curve, final)))
        self._process(["-m", self.subject.module, str(job)], f"{out.name}.pictures")
        if final:
            (out / FINISHED).touch()

    def _process(self, arguments: Sequence[str], name: str) -> None:
        """Runs Python with `arguments` from the checkout; Lost says how it failed."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key not in rank_environment(0, 1, 0)}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("a") as said:
            process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=said, stderr=said,
                                       stdin=subprocess.DEVNULL)
        with self._lock:
            self._live.add(process)
        code = process.wait()
        with self._lock:
            self._live.discard(process)
        if code:
            raise Lost(f"{name} ended with {code}: {last_error(log)} (all of it: {log})")
