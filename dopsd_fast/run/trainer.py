"""The loop. Nothing here knows a model family or a loss: records -> contexts -> objective -> engine -> files."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from dopsd_fast.conditioning.cache import ContextCache
from dopsd_fast.conditioning.contexts import Contexts
from dopsd_fast.data.epochs import Item, epoch_batches, item_noise, item_seed, micro_batch
from dopsd_fast.data.records import read_records
from dopsd_fast.distributed.consensus import Consensus
from dopsd_fast.distributed.deepspeed_check import check_world
from dopsd_fast.distributed.lost_ranks import RankWatch
from dopsd_fast.distributed.process_group import init_distributed
from dopsd_fast.distributed.registry import make_engine
from dopsd_fast.distributed.stopping import StopRequest
from dopsd_fast.errors import AgreedError, UserError
from dopsd_fast.families.build import build_pair
from dopsd_fast.families.registry import open_family
from dopsd_fast.memory.ledger import Machine
from dopsd_fast.memory.planner import Plan, make_plan
from dopsd_fast.method.objective import NonFiniteLoss, StepInputs, StepReport, shows_images
from dopsd_fast.method.registry import make_objective
from dopsd_fast.method.trajectory import draw_times, grid_shift
from dopsd_fast.pair.lora import add_adapters, coverage_by_kind
from dopsd_fast.run import accounts, report
from dopsd_fast.run.console import outlive_console, quiet_libraries
from dopsd_fast.run.folder import FolderLock, open_run
from dopsd_fast.run.metrics import MetricsLog, Phases, peak_memory
from dopsd_fast.run.parts import RunParts
from dopsd_fast.run.pictures import Showcase
from dopsd_fast.run.verify_export import export_and_verify
from dopsd_fast.settings.deepspeed_dict import deepspeed_config
from dopsd_fast.settings.schema import ConditioningSettings, Settings
from dopsd_fast.storage import checkpoints

T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "gloo/transport")
"""What gloo says in a plain RuntimeError when another process has gone; the last is the source folder of all such messages."""


def train(settings: Settings, stop: StopRequest) -> int:
    """Runs or continues the run that `settings` describes; the process's exit code. Every rank calls it.

    0: finished. 128 + N: stopped by signal N, state saved. Raises UserError for whatever the user can put right, the same
    on every rank where it can, and LostRank when another rank is gone.
    """
    outlive_console()
    with RankWatch() as watch:
        try:
            quiet_libraries()
            return Trainer(settings, stop, watch).run()
        except OSError as error:
            where = error.filename or f"in {settings.output.dir or 'the run folder'}"
            raise UserError(f"cannot read or write {where}: {error.strerror or error}; the last checkpoint is intact, "
                            "resume=auto continues from it") from error
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and not any(sign in str(error) for sign in LOST_CONTACT):
                raise
            raise watch.missing(error) from error
        finally:
            stop.ignore()


class Trainer:
    """One run on one rank: what is built before the loop, the loop, and what is left behind.

    The constructor goes through its phases in one fixed order, cheap checks first, so that what cannot work is said before
    anything heavy is read. Nearly every phase ends in a collective call, and all ranks must make these in the same order:
    whatever only one rank can find out happens inside `together` or `rank0`, which turn its error into everybody's."""

    def __init__(self, settings: Settings, stop: StopRequest, watch: RankWatch) -> None:
        self.settings, self.stop = settings, stop
        ranks = init_distributed()
        watch.meet()
        stop.before_armed(watch.told)
        self.rank, self.world, self.device = ranks.rank, ranks.world, ranks.device
        self.local_world = int(os.environ.get("LOCAL_SIZE", self.world))  # as DeepSpeed's launcher sets it
        self._set_threads()
        torch.manual_seed(settings.train.seed)
        self.dtype = DTYPES[settings.train.precision]
        self.global_batch = settings.train.batch_size * settings.train.accumulation * self.world
        self.objective = make_objective(settings.method)
        self.consensus = Consensus(watch.name, {"model": settings.model.path, "data": settings.data.path})
        together, rank0 = self.consensus.together, self.consensus.rank0

        # What was asked for: the same on all ranks, and possible.
        self.consensus.compare(accounts.of_program(settings))
        with together():
            check_world(settings, self.world, self.device.type)
        with together():
            self.family = open_family(settings.model.folder, self._conditioning(), settings.model.family)
            variants = self.family.check_variant(settings.model.allow)
            self.data = read_records(settings.data, self.family.pixel_multiple)
            self.batches_per_epoch = len(self._batches(0))
            coverage = self._check_model()
            self.consensus.compare(accounts.of_input(self.family, self.data))
        plan = rank0(self._planned)

        # The run's folder, which rank 0 alone finds and locks, and the contexts that the encoders make.
        self.lock = FolderLock()
        records = accounts.of_records(self.data)
        self.folder, found = rank0(lambda: open_run(settings, self.global_batch, records, self.lock, self.say))
        watch.register(self.folder)
        self.first = int(checkpoints.read_extra(found)["step"]) if found is not None else 0
        if self.first > settings.train.steps:
            raise AgreedError(f"{self.folder} has done {self.first} steps, more than train.steps={settings.train.steps}")
        with together():
            self.contexts = self._fill_cache()

        # The model, and the engine, which takes the model over.
        with together():
            self.pair = build_pair(self.family, settings.backbone, settings.adapter, settings.teacher, settings.train,
                                   self.dtype, self.device).to(self.device)
            parameters = sum(p.numel() for name, p in self.pair.student.named_parameters() if ".lora_" not in name)
        gather = {"gather": plan.gather} if plan.gather else {}
        planned = settings.model_copy(update={"deepspeed": settings.deepspeed.model_copy(update=gather)})
        self.engine = make_engine(self.pair, settings.train, settings.teacher, planned.deepspeed, deepspeed_config(planned))
        if found is not None:
            with together():
                checkpoints.load(found, self.engine)

        self.parts = RunParts(
            settings=settings, folder=self.folder, rank=self.rank, world=self.world, device=self.device, dtype=self.dtype,
            consensus=self.consensus, family=self.family, variants=variants, coverage=coverage, data=self.data,
            batches_per_epoch=self.batches_per_epoch, global_batch=self.global_batch, objective=self.objective, plan=plan,
            contexts=self.contexts, pair=self.pair, parameters=parameters, engine=self.engine, first=self.first, say=self.say,
        )
        with together():
            self.showcase = Showcase(self.parts)
        self.phases = Phases(self.device)
        self.log: MetricsLog | None = None

    # ---- before the loop -----------------------------------------------------------------------------------------------

    def _planned(self) -> Plan:
        """UserError for a run that cannot fit."""
        plan = make_plan(self.settings, Machine.here(self.world, self.local_world, self.device), self.family)
        if not plan.fits:
            self.say("\n".join(plan.table()))
            raise UserError(f"this run does not fit the memory of this machine: {plan.advice}")
        return plan

    def _set_threads(self) -> None:
        threads = self.settings.train.threads
        if not threads and self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, len(os.sched_getaffinity(0)) // self.local_world)
        if threads:
            torch.set_num_threads(threads)

    def _conditioning(self) -> ConditioningSettings:
        vlm = self.settings.conditioning.vlm_path and str(self.settings.vlm_folder)
        return self.settings.conditioning.model_copy(update={"vlm_path": vlm})

    def _check_model(self) -> dict[str, tuple[int, int]]:
        """What cannot work is found before anything is loaded: a needed part that is missing, a size that the model does not
        take, a LoRA target that matches nothing. The adapter's coverage, see `coverage_by_kind`."""
        if shows_images(self.objective):
            self.family.fingerprint("teacher", self.dtype)  # reads every file that the teacher's encoder needs
        for size in {(r.height, r.width) for r in self.data.records}:
            self.family.latent_shape(*size)
        adapter = self.settings.adapter
        if adapter.kind != "lora":
            return {}
        targets, model = adapter.targets or self.family.lora_targets, self.family.meta_transformer()
        coverage = coverage_by_kind(model, targets, self.family.lora_kinds)
        add_adapters(model, targets, adapter.rank, adapter.alpha, 0, ["student"])
        return coverage

    def _batches(self, epoch: int) -> list[list[Item]]:
        s = self.settings
        return epoch_batches(self.data, epoch, s.train.seed, self.global_batch, s.data.prompt_keys)

    def _fill_cache(self) -> Contexts:
        """Requests every context that the run can need, and computes the missing ones."""
        s, c = self.settings, self.settings.conditioning
        folder = Path(c.folder).expanduser() if c.folder else self.folder.parent / "context_cache"
        cache = ContextCache(c.cache, folder, self.family, self.rank, self.world, self.say,
                             barrier=self.consensus.agree, device=self.device, dtype=self.dtype,
                             progress=lambda keys: self.bar(keys, "conditioning", "context"))
        contexts = Contexts(cache, self.device)
        contexts.require(self.data.records, s.data.prompt_keys, s.sample.prompts, shows_images(self.objective),
                         self.objective.needs_latents)
        self.consensus.compare(accounts.of_contexts(self.data, contexts.keys, contexts.fingerprints()))
        done = contexts.complete()
        if done:
            needed = len(set(contexts.keys.values()))
            self.say(f"conditioning: {done} of {needed} contexts computed, the rest was cached")
        return contexts

    # ---- the loop --------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        s = self.settings
        self.say("\n".join([report.first_screen(self.parts), *self.parts.plan.table()]))
        self.stop.arm()
        log = self.log = MetricsLog(self.folder, self.first) if self.rank == 0 else None
        self.showcase.start(self.first)
        bar = self.bar(total=s.train.steps, initial=self.first, unit="step")
        batches: tuple[int, list[list[Item]]] = (-1, [])
        done = self.first
        try:
            while done < s.train.steps and not self.engine.any(self.stop.asked()):
                epoch, index = divmod(done, self.batches_per_epoch)
                if batches[0] != epoch:
                    batches = epoch, self._batches(epoch)
                row = self.step(done, batches[1][index])
                done = row["step"]
                if log is not None:  # before the checkpoint: a run continued from it keeps this row
                    log.append({**row, "seconds": self.phases.take()})
                    bar.set_postfix(loss=f"{row['loss']:.4f}", samples_s=f"{row['samples_per_second']:.2f}", refresh=False)
                if s.sample.every and done % s.sample.every == 0 and done < s.train.steps:
                    with self.phases("sample"):
                        self.showcase.draw(done)
                if s.checkpoint.every and done % s.checkpoint.every == 0:
                    self.save(done)
                bar.update()
        finally:
            bar.close()
            if log is not None:
                log.close()
                self.log = None
        self.save(done)
        if done < s.train.steps:
            codes = [code for code in self.engine.gather_int(self.stop.code) if code]
            self.say("\n".join([f"stopped by {self.stop.reason or 'another rank'} after step {done}; state saved. "
                                f"Continue with resume=auto output.dir={self.folder}", *report.left_out(self.parts)]))
            return codes[0]
        with self.phases("sample"):
            self.showcase.draw(done)
        exported = export_and_verify(self.parts, self.showcase)
        self.say(report.closing(self.parts, self.showcase.last, exported))
        return 0

    def step(self, done: int, batch: list[Item]) -> dict[str, Any]:
        """One optimizer step on one global batch; its row of metrics."""
        s = self.settings
        started = time.perf_counter()
        reports: list[StepReport] = []
        failed: NonFiniteLoss | None = None
        with self.engine.accumulating():
            for a in range(s.train.accumulation):
                items = micro_batch(batch, a, self.rank, self.world, s.train.batch_size)
                with self.phases("data"):
                    inputs = self.inputs(items)
                with self.phases("rollout"):
                    try:
                        reports.append(self.objective.accumulate(inputs, self.engine.backward))
                    except NonFiniteLoss as error:
                        failed = failed or error
        if self.engine.any(failed is not None):
            self.give_up(done, batch, self.consensus.first_text(str(failed or "")))
        rate = self.learning_rate(done)
        with self.phases("optimizer"):
            norm = self.engine.step(rate)
        if not math.isfinite(norm):
            self.give_up(done, batch, f"the gradient norm is {norm}")
        count, states = len(reports), len(reports[0].state_losses)
        means = self.engine.mean([sum(r.loss for r in reports) / count, sum(r.gap**2 for r in reports) / count,
                                  *(sum(r.state_losses[k] for r in reports) / count for k in range(states))])
        return {
            "step": done + 1,
            "epoch": done // self.batches_per_epoch,
            "loss": means[0],
            "state_losses": means[2:],
            "grad_norm": norm,
            "gap": math.sqrt(means[1]),
            "learning_rate": rate,
            "samples_per_second": round(len(batch) / (time.perf_counter() - started), 4),
            "peak_memory_bytes": peak_memory(self.device),
        }

    def inputs(self, items: list[Item]) -> StepInputs:
        seed, family, objective = self.settings.train.seed, self.family, self.objective
        shape = family.latent_shape(items[0].height, items[0].width)
        grid = family.train_grid(self.settings.method.num_states, self.settings.method.shift, shape)
        noise = torch.stack([item_noise(seed, item, shape) for item in items]).to(self.device)
        latents = times = second = None
        if objective.needs_latents:
            latents = torch.stack([self.contexts.get("latents", item.record)["latent"] for item in items]).float()
        if objective.needs_times:
            seeds = [item_seed(seed, item.epoch, item.record, item.repeat, "time") for item in items]
            times = draw_times(seeds, grid_shift(grid)).to(self.device)
        if objective.draws:
            second = torch.stack([item_noise(seed, item, shape, "second noise") for item in items]).to(self.device)
        student = [self.contexts.get("student", item.prompt) for item in items]
        teacher = student if objective.needs_teacher else []
        if shows_images(self.objective):
            teacher = [self.contexts.get("teacher", item.record, item.prompt) for item in items]
        return StepInputs(
            noise=noise,
            grid=grid,
            forward=self.pair.open(student, teacher, noise.shape),
            latents=latents,
            times=times,
            second_noise=second,
            scale=1 / self.settings.train.accumulation,
        )

    def learning_rate(self, done: int) -> float:
        """Linear warm-up, then constant or half a cosine down to 0 at the last step; `done` steps lie behind."""
        t = self.settings.train
        if done < t.warmup:
            return t.learning_rate * (done + 1) / t.warmup
        if t.schedule == "constant":
            return t.learning_rate
        progress = (done - t.warmup) / max(1, t.steps - t.warmup)
        return t.learning_rate * (1 + math.cos(math.pi * progress)) / 2

    def save(self, done: int) -> None:
        if self.log is not None:
            self.log.sync()
        extra = {"step": done, "global_batch": self.global_batch}
        with self.phases("checkpoint"), self.consensus.together():
            checkpoints.save(self.folder / "checkpoints", self.engine, extra, done, self.settings.checkpoint.keep)

    def give_up(self, done: int, batch: list[Item], what: str) -> None:
        """Saves the last good state and says which batch broke it."""
        self.save(done)
        named = ", ".join(dict.fromkeys(self.data.records[item.record].source for item in batch))
        raise AgreedError(f"step {done + 1}: {what}; the state of step {done} is saved in {self.folder / 'checkpoints'}; "
                        f"batch: {named}; try a lower train.learning_rate or leave these records out")

    # ---- what it says ------------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text, file=sys.stdout)

    def bar(self, items: Sequence[T] | None = None, what: str | None = None, unit: str = "", **options: Any) -> tqdm[T]:
        """A progress bar, over `items` or moved by the caller; rank 0 shows it, seldom where nobody looks at a terminal."""
        return tqdm(items, what, unit=unit, disable=self.rank != 0, file=sys.stderr, dynamic_ncols=True,
                    mininterval=0.5 if sys.stderr.isatty() else 10, **options)
