"""The loop. Nothing here knows a model family or a loss: records -> contexts -> objective -> engine -> files."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dopsd_fast import agreement, checkpoints
from dopsd_fast.buckets import Item, item_noise, item_seed, micro_batch, plan_epoch
from dopsd_fast.conditioning.cache import ContextCache
from dopsd_fast.deepspeed_config import check_world
from dopsd_fast.errors import AgreedError, UserError
from dopsd_fast.families import open_family
from dopsd_fast.memory_moments import Machine
from dopsd_fast.objective import NonFiniteLoss, StepInputs, StepReport, make_objective
from dopsd_fast.peers import Peers
from dopsd_fast.plan import Plan, make_plan
from dopsd_fast.publish import publish
from dopsd_fast.records import NAMED, Record, read_records
from dopsd_fast.run_folder import FolderLock, open_run
from dopsd_fast.settings import Settings
from dopsd_fast.sharding import Engine, init_distributed
from dopsd_fast.showcase import Showcase
from dopsd_fast.stopping import StopRequest
from dopsd_fast.teacher import add_adapters, build_pair, coverage_by_kind
from dopsd_fast.telemetry import MetricsLog, Phases, outlive_console, peak_memory, quiet_libraries
from dopsd_fast.trajectory import draw_times, grid_shift

T = TypeVar("T")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LOST_CONTACT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "gloo/transport")
"""What gloo says in a plain RuntimeError when another process has gone; the last is the source folder of all such messages."""


def train(settings: Settings, stop: StopRequest) -> int:
    """Runs or continues the run that `settings` describes; the process's exit code. Every rank calls it.

    0: finished. 128 + N: stopped by signal N, state saved. Raises UserError for whatever the user can put right, the same
    on every rank where it can, and LostPeer when another rank is gone.
    """
    outlive_console()
    with Peers() as peers:
        try:
            quiet_libraries()
            return Trainer(settings, stop, peers).run()
        except OSError as error:
            where = error.filename or f"in {settings.output.dir or 'the run folder'}"
            raise UserError(f"cannot read or write {where}: {error.strerror or error}; the last checkpoint is intact, "
                            "resume=auto continues from it") from error
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and not any(sign in str(error) for sign in LOST_CONTACT):
                raise
            raise peers.missing(error) from error
        finally:
            stop.ignore()


class Trainer:
    """One run on one rank: what is built before the loop, the loop, and what is left behind."""

    def __init__(self, settings: Settings, stop: StopRequest, peers: Peers) -> None:
        self.settings, self.stop, self.peers = settings, stop, peers
        ranks = init_distributed()
        peers.meet()
        stop.before_armed(peers.told)
        self.rank, self.world, self.device = ranks.rank, ranks.world, ranks.device
        self.local_world = int(os.environ.get("LOCAL_SIZE", self.world))  # as DeepSpeed's launcher sets it
        self._set_threads()
        torch.manual_seed(settings.train.seed)
        self.dtype = DTYPES[settings.train.precision]

        self.global_batch = settings.train.batch_size * settings.train.accumulation * self.world
        self.objective = make_objective(settings)
        self.compare(agreement.of_program(settings))
        with self.together():
            check_world(settings, self.world, self.device.type)
        with self.together():
            self.family = open_family(settings.model.folder, self._conditioning(), settings.model.family)
            self.variants = self.family.check_variant(settings.model.allow)
            self.data = read_records(settings.data, self.family.pixel_multiple)
            self.batches_per_epoch = len(self._plan(0))
            self._check_model()
            self.compare(agreement.of_input(self.family, self.data))
        self.plan = self._rank0(self._planned)
        self.lock = FolderLock()
        self.folder, found = self._rank0(lambda: open_run(
            settings, self.global_batch, agreement.of_records(self.data), self.lock, self.say))
        peers.register(self.folder)
        self.first = int(checkpoints.read_extra(found)["step"]) if found is not None else 0
        if self.first > settings.train.steps:
            raise AgreedError(f"{self.folder} has done {self.first} steps, more than train.steps={settings.train.steps}")
        with self.together():
            self.cache, self.keys = self._fill_cache()
        with self.together():
            self.pair = build_pair(self.family, settings, self.dtype, self.device).to(self.device)
            self.parameters = sum(p.numel() for name, p in self.pair.student.named_parameters() if ".lora_" not in name)
        gather = {"gather": self.plan.gather} if self.plan.gather else {}
        planned = settings.model_copy(update={"deepspeed": settings.deepspeed.model_copy(update=gather)})
        self.engine = Engine(self.pair, planned)
        if found is not None:
            with self.together():
                checkpoints.load(found, self.engine)
        with self.together():
            self.showcase = Showcase(self)
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

    def _conditioning(self) -> Any:
        vlm = self.settings.conditioning.vlm_path and str(self.settings.vlm_folder)
        return self.settings.conditioning.model_copy(update={"vlm_path": vlm})

    def _check_model(self) -> None:
        """What cannot work is found before anything is loaded: a needed part that is missing, a size that the model does not
        take, a LoRA target that matches nothing."""
        if self.shows_images:
            self.family.fingerprint("teacher", self.dtype)  # reads every file that the teacher's encoder needs
        for size in {(r.height, r.width) for r in self.data.records}:
            self.family.latent_shape(*size)
        adapter = self.settings.adapter
        self.coverage: dict[str, tuple[int, int]] = {}
        if adapter.kind == "lora":
            targets, model = adapter.targets or self.family.lora_targets, self.family.meta_transformer()
            self.coverage = coverage_by_kind(model, targets, self.family.lora_kinds)
            add_adapters(model, targets, adapter.rank, adapter.alpha, 0, ["student"])

    @property
    def shows_images(self) -> bool:
        """The teacher is shown the target images."""
        return self.objective.needs_teacher and self.objective.teacher_sees == "image"

    def _rank0(self, call: Callable[[], T]) -> T:
        """The result of `call` on rank 0, on every rank; its UserError too."""
        box: list[Any] = [None]
        with self.together():
            if self.rank == 0:
                box[0] = call()
        torch.distributed.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A UserError in the block on one rank is one on all, with the same text. Collective calls in the block must not be
        missed by a rank that fails, but for `agree` and `compare`."""
        problem = ""
        try:
            yield
        except AgreedError:
            raise
        except UserError as error:
            problem = f"{self.peers.name(self.rank)}: {error}" if self.rank else str(error)
        self.agree(problem)

    def agree(self, problem: str = "") -> None:
        """Raises on every rank when one has a problem. Every rank calls it."""
        if found := self._shared(problem):
            raise AgreedError(found)

    def compare(self, account: agreement.Account) -> None:
        """Raises on every rank when one has another account than rank 0, naming it and what differs. Every rank calls it."""
        self.agree()  # a rank that has failed is not there for what follows
        self.agree(agreement.difference(account, self.peers.name, self.settings))

    def _shared(self, text: str) -> str:
        """The same text on every rank: of those that are not empty, the first that does not point to another rank."""
        texts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(texts, text)
        return min(filter(None, texts), key=lambda one: "another rank" in one, default="")

    def _plan(self, epoch: int) -> list[list[Item]]:
        s = self.settings
        return plan_epoch(self.data, epoch, s.train.seed, self.global_batch, s.data.prompt_keys)

    def _fill_cache(self) -> tuple[ContextCache, dict[tuple, str]]:
        """Requests every context that the run can need, and computes the missing ones."""
        c = self.settings.conditioning
        folder = Path(c.folder).expanduser() if c.folder else self.folder.parent / "context_cache"
        cache = ContextCache(c.cache, folder, self.family, self.rank, self.world, self.say,
                             barrier=self.agree, device=self.device, dtype=self.dtype,
                             progress=lambda keys: self.bar(keys, "conditioning", "context"))
        keys: dict[tuple, str] = {}
        for record in self.data.records:
            target = (record.images[0], record.height, record.width)
            for name, prompt in record.prompts.items():
                if self.settings.data.prompt_keys and name not in self.settings.data.prompt_keys:
                    continue
                keys["student", prompt] = cache.request("student", prompt)
                if self.shows_images:
                    keys["teacher", record.index, prompt] = cache.request("teacher", prompt, target)
            if self.objective.needs_latents:
                keys["latents", record.index] = cache.request("latents", image=target)
        for prompt in self.settings.sample.prompts:
            keys["student", prompt] = cache.request("student", prompt)
        kinds = sorted({key[0] for key in keys})
        hashes = {kind: self.family.fingerprint(kind, self.dtype) for kind in kinds}  # known since the first request
        self.compare(agreement.of_contexts(self.data, keys, hashes))
        done = cache.complete(keys.values())
        if done:
            self.say(f"conditioning: {done} of {len(set(keys.values()))} contexts computed, the rest was cached")
        return cache, keys

    def context(self, *key: Any) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in self.cache.get(self.keys[key]).items()}

    # ---- the loop --------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        s = self.settings
        self.say("\n".join([self.summary(), *self.plan.table()]))
        self.stop.arm()
        log = self.log = MetricsLog(self.folder, self.first) if self.rank == 0 else None
        self.showcase.start(self.first)
        bar = self.bar(total=s.train.steps, initial=self.first, unit="step")
        plan: tuple[int, list[list[Item]]] = (-1, [])
        done = self.first
        try:
            while done < s.train.steps and not self.engine.any(self.stop.asked()):
                epoch, index = divmod(done, self.batches_per_epoch)
                if plan[0] != epoch:
                    plan = epoch, self._plan(epoch)
                row = self.step(done, plan[1][index])
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
                                f"Continue with resume=auto output.dir={self.folder}", *self.left_out()]))
            return codes[0]
        with self.phases("sample"):
            self.showcase.draw(done)
        exported = publish(self)
        self.say(self.closing(exported))
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
            self.give_up(done, batch, self._shared(str(failed or "")))
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
            latents = torch.stack([self.context("latents", item.record)["latent"] for item in items]).float()
        if objective.needs_times:
            seeds = [item_seed(seed, item.epoch, item.record, item.repeat, "time") for item in items]
            times = draw_times(seeds, grid_shift(grid)).to(self.device)
        if objective.draws:
            second = torch.stack([item_noise(seed, item, shape, "second noise") for item in items]).to(self.device)
        student = [self.context("student", item.prompt) for item in items]
        teacher = student if objective.needs_teacher else []
        if self.shows_images:
            teacher = [self.context("teacher", item.record, item.prompt) for item in items]
        return StepInputs(
            noise=noise,
            grid=grid,
            forward=self.pair.open(family, student, teacher, noise.shape),
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
        with self.phases("checkpoint"), self.together():
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

    def record(self, index: int) -> Record:
        return self.data.records[index]

    def describe(self) -> dict[str, Any]:
        """What was resolved and chosen, for the run's files and the first screen."""
        s, record = self.settings, self.data.records[0]
        shape = self.family.latent_shape(record.height, record.width)
        grid = self.family.train_grid(s.method.num_states, s.method.shift, shape)
        states = self.objective.states(s.method.num_states)
        return {
            "model": str(s.model.folder),
            "family": self.family.name,
            "parameters": self.parameters,
            "trainable": self.engine.trained_parameters,
            "records": len(self.data.records),
            "skipped": len(self.data.skipped),
            "notes": [f"{subject}: {text}" for subject, text in self.data.notes],
            "variants": self.variants,
            "lora_coverage": self.coverage,
            "buckets": sorted({(r.height, r.width) for r in self.data.records}),
            "batches_per_epoch": self.batches_per_epoch,
            "global_batch": self.global_batch,
            "grid": [round(t, 6) for t in grid],
            "forwards_per_sample": states * (2 if self.objective.needs_teacher else 1),
            "sample_forwards": s.sample.steps or self.family.deployment_steps,
            "precision": s.train.precision,
            "threads": torch.get_num_threads(),
            "planned_peak_bytes": self.plan.device_peak,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **self.pair.describe(),
            **self.engine.describe(),
        }

    def summary(self) -> str:
        d, s = self.describe(), self.settings
        if self.rank == 0:
            (self.folder / "environment.json").write_text(json.dumps(d, indent=1, default=str) + "\n")
        trains = f"{s.adapter.kind}, {d['trainable'] / 1e6:.2f} M parameters"
        if s.adapter.kind == "lora":
            trains += f", rank {s.adapter.rank}, alpha {s.adapter.alpha:g}; on "
            trains += ", ".join(f"{kind} {adapted} of {there}" for kind, (adapted, there) in self.coverage.items())
        method: str = s.method.name
        if self.objective.needs_teacher:
            teacher = f"{s.teacher.kind} {s.teacher.ema_decay}" if s.teacher.kind == "ema" else s.teacher.kind
            method += f", teacher {teacher}" + (" in bf16" if s.teacher.ema_dtype == "bf16" else "")
        if s.method.name == "dopsd":
            method += f", {s.method.states}, {s.method.backward}, weight {s.method.weight}"
        elif s.method.name == "pso":
            method += f", {s.method.pairs} pairs, beta {s.method.beta:g}"
        lines = [
            ("run", f"{self.folder}" + (f", continues after step {self.first}" if self.first else "")),
            ("model", f"{d['model']} ({d['family']}, {d['parameters'] / 1e6:.1f} M parameters)"),
            *(("allowed", why) for why in self.variants),
            ("trains", trains),
            ("data", f"{d['records']} records in {len(d['buckets'])} bucket(s), {d['skipped']} skipped; "
                     f"batch {d['global_batch']} = {s.train.batch_size} x {s.train.accumulation} x {self.world} rank(s)"),
            *self.data.notes,
            ("prompts", f"cut where they are longer than {s.conditioning.max_text_tokens} tokens"
                        + (f" (the teacher's, with the picture: {s.conditioning.max_vlm_tokens})"
                           if self.shows_images and self.family.context == "vlm" else "")),
            *(("left out", f"{source}: {reason}") for source, reason in self.data.skipped[:NAMED]),
            *([("left out", f"and {len(self.data.skipped) - NAMED} more, listed at the end")]
              if len(self.data.skipped) > NAMED else []),
            ("method", method),
            ("grid", "t = " + ", ".join(f"{t:g}" for t in d["grid"])
                     + f"; {d['forwards_per_sample']} forwards a sample; pictures by {d['sample_forwards']} steps"),
            ("steps", f"{s.train.steps}, rate {s.train.learning_rate:g} ({s.train.schedule}, warm-up {s.train.warmup})"),
            ("runs on", f"{d['device']} ({d['backend']}), ZeRO {d['zero_stage']}, {d['precision']}, {d['threads']} threads, "
                        f"torch {d['torch']}, EMA {d['ema_backend']}"),
            ("forward", f"{d['backbone']}, attention {d['attention']}"
                        + (f", activations {d['activations']}, ops {d['ops']}, fp8 {d['fp8']}" if "ops" in d else "")),
        ]
        return "\n".join(f"{name:>8}  {text}" for name, text in lines)

    def closing(self, exported: list[str]) -> str:
        s = self.settings
        lines = [f"finished {s.train.steps} steps in {self.folder}",
                 f"  samples/       {self.showcase.last.name if self.showcase.last else 'none'}",
                 "  metrics.jsonl, tensorboard/, checkpoints/"]
        if self.engine.keeps_ema:
            gone = 1 - s.teacher.ema_decay**s.train.steps
            lines.append(f"  the EMA (the teacher, export_teacher/) has gone {100 * gone:.3g} % of the way from the start to "
                         f"the student: 1 - {s.teacher.ema_decay}^{s.train.steps}")
        lines += [f"  {line}" for line in exported]
        return "\n".join(lines + self.left_out())

    def left_out(self) -> list[str]:
        skipped = self.data.skipped
        title = [f"{len(skipped)} bad record(s) were left out:"] if skipped else []
        return title + [f"  {source}: {reason}" for source, reason in skipped]
