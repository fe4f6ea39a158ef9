"""Trains the arms, several at a time, each in processes of its own: the trainer as a user starts it, then the pictures.

Everything is in one folder, and what is finished there is not done again; a run that was interrupted goes on from its
checkpoint:

    runs/ARM-RATE-SEED/       run folders               drawn/...    what was drawn with each, and measured
    logs/                     what the processes said
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.live import say
from bench.machine import commit
from bench.processes import last_error, rank_environment
from bench.reproduce.arms import BEFORE, START, Arm, Budget, next_rate, ranked
from bench.reproduce.embedded import VALIDATION, Embedded
from bench.reproduce.given import Given
from bench.results import ROOT
from dopsd_fast.errors import UserError

FINISHED = "finished"
"""In the folder of what was drawn: everything of a seed is there."""


class Lost(RuntimeError):
    """A run or its pictures failed; one line."""


@dataclass
class Plan:
    """`workers` processes at a time, `launcher` before the trainer's file. Of each arm: what its search of learning rates
    scored (infinite: the run was lost), what the two best of them scored with the second seed, and what it chose; `lost`: seeds
    that failed, and why."""

    folder: Path
    subject: Embedded | Given
    budget: Budget
    workers: int
    launcher: Sequence[str] = ()
    scores: dict[str, dict[float, float]] = field(default_factory=dict)
    second: dict[str, dict[float, float]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    lost: dict[tuple[str, int], str] = field(default_factory=dict)

    def run(self, arm: Arm, rate: float, seed: int) -> Path:
        return self.folder / "runs" / (START if arm.name == START else f"{arm.name}-{rate:g}-{seed}")

    def drawn(self, arm: Arm, rate: float, seed: int) -> Path:
        return self.folder / "drawn" / self.run(arm, rate, seed).name

    def seeds(self, arm: Arm) -> list[tuple[float, int]]:
        """(learning rate, seed) of each seed of an arm, of the start once; empty: no rate was found."""
        if arm.name == START:
            return [(0.0, 0)]
        return [(self.rates[arm.rate_from], seed) for seed in self.budget.seeds_of(arm) if arm.rate_from in self.rates]

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
        """Searches the rates, trains every seed of every arm and draws; what fails is in `lost`. Whatever else is raised ends
        the processes."""
        asyncio.run(self._train_all(arms))

    async def _train_all(self, arms: Sequence[Arm]) -> None:
        self._free = asyncio.Semaphore(self.workers)
        owners = {arm.name: arm for arm in arms if not arm.rate_of}
        for arm in arms:
            if arm.rate_from not in owners:
                raise UserError(f"reproduce: {arm.name} takes the learning rate of {arm.rate_of}, which is not among the arms")
        trained = [self._train_seeds(owner, [arm for arm in arms if arm.rate_from == name]) for name, owner in owners.items()]
        await asyncio.gather(self._finish(BEFORE, 0.0, 0), *trained)

    async def _train_seeds(self, owner: Arm, takers: Sequence[Arm]) -> None:
        """Those of all arms that take the learning rate of `owner`."""
        rate = await self._search(owner) if self.budget.search else self.subject.known_rate(owner)
        if rate is None:
            why = f"no run of {owner.name} came to its end, at any learning rate"
            self.lost |= {(taker.name, 0): why for taker in takers}
            return
        self.rates[owner.name] = rate
        await asyncio.gather(*(self._finish(arm, rate, seed) for arm in takers for seed in self.budget.seeds_of(arm)))

    async def _search(self, arm: Arm) -> float | None:
        """The learning rate of the best mean of two seeds; None: no run came to its end."""
        scores, second = self.scores.setdefault(arm.name, {}), self.second.setdefault(arm.name, {})
        rates: Sequence[float] = self.subject.rates
        while rates:
            await asyncio.gather(*(self._score(arm, rate, 0, scores) for rate in rates))
            more = next_rate(scores)
            rates = [] if more is None else [more]
        finalists = ranked(scores)[:2]
        if self.budget.seeds > 1 and len(finalists) > 1:
            await asyncio.gather(*(self._score(arm, rate, 1, second) for rate in finalists))
        means = {rate: (scores[rate] + second[rate]) / 2 for rate in second}
        chosen = next(iter(ranked(means) or ranked(scores)), None)
        for rate in scores.keys() - {chosen} if chosen is not None else ():
            self._prune(arm, rate, 0)
            self._prune(arm, rate, 1)
        return chosen

    async def _score(self, arm: Arm, rate: float, seed: int, scores: dict[float, float]) -> None:
        try:
            await self._train_and_draw(arm, rate, seed, VALIDATION)
            scores[rate] = self.subject.score(self.drawn(arm, rate, seed))
        except Lost:
            scores[rate] = float("inf")

    async def _finish(self, arm: Arm, rate: float, seed: int) -> None:
        try:
            await self._train_and_draw(arm, rate, seed, FINISHED)
            (self.drawn(arm, rate, seed) / FINISHED).touch()
            self._prune(arm, rate, seed)
        except Lost as error:
            self.lost[arm.name, seed] = str(error)

    def _prune(self, arm: Arm, rate: float, seed: int) -> None:
        """Leaves the last checkpoint: the others were for the curve."""
        for folder in sorted((self.run(arm, rate, seed) / "checkpoints").glob("step-*"))[:-1]:
            shutil.rmtree(folder)

    async def _train_and_draw(self, arm: Arm, rate: float, seed: int, wanted: str) -> None:
        """Until the folder of what was drawn has the file `wanted`."""
        run, drawn = self.run(arm, rate, seed), self.drawn(arm, rate, seed)
        async with self._free:
            if (drawn / wanted).exists():
                return
            if arm.name != START and not (run / "export").exists():
                say(f"{arm.says}, learning rate {rate:g}, seed {seed}: {self.budget.steps} steps")
                words = [*self.subject.words(arm, self.budget), f"train.learning_rate={rate!r}", f"train.seed={seed}"]
                if arm.trained_by == "eager":
                    command = ["-m", "bench.reproduce.eager", str(run), *words]
                else:
                    command = [*self.launcher, "dopsd_fast/train.py", *words, f"output.dir={run}", "resume=auto"]
                await self._process(command, f"{run.name}.train")
            say(f"{drawn.name}: pictures")
            drawn.mkdir(parents=True, exist_ok=True)
            job = self.subject.job(self.budget, self.subject.curve and arm.curve, wanted == FINISHED)
            job |= {"run": "" if arm.name == START else str(run), "out": str(drawn)}
            (drawn / "job.json").write_text(json.dumps(job))
            await self._process(["-m", self.subject.module, str(drawn / "job.json")], f"{drawn.name}.pictures")

    async def _process(self, arguments: Sequence[str], name: str) -> None:
        """Until it has ended; Lost says how it failed."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key not in rank_environment(0, 1, 0)}
        process = await start(arguments, log, environment | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        if code:
            raise Lost(f"{name} ended with {code}: {last_error(log)} (all of it: {log})")


async def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> asyncio.subprocess.Process:
    """Python with `arguments` in the checkout; what it says is added to `log`."""
    with log.open("a") as said:
        return await asyncio.create_subprocess_exec(
            sys.executable, *arguments, cwd=ROOT, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=said, stderr=said
        )
