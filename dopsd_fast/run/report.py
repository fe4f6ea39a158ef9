"""What a run says of itself: the first screen, environment.json, the last lines."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from dopsd_fast.data.records import NAMED
from dopsd_fast.method.objective import shows_images
from dopsd_fast.run.parts import RunParts
from dopsd_fast.storage.atomic import write_text


def describe(parts: RunParts) -> dict[str, Any]:
    """What was resolved and chosen, for the run's files and the first screen."""
    s, record = parts.settings, parts.data.records[0]
    shape = parts.family.latent_shape(record.height, record.width)
    grid = parts.family.train_grid(s.method.num_states, s.method.shift, shape)
    states = parts.objective.states(s.method.num_states)
    return {
        "model": str(s.model.folder),
        "family": parts.family.name,
        "parameters": parts.parameters,
        "trainable": parts.engine.trained_parameters,
        "records": len(parts.data.records),
        "skipped": len(parts.data.skipped),
        "notes": [f"{subject}: {text}" for subject, text in parts.data.notes],
        "variants": parts.variants,
        "lora_coverage": parts.coverage,
        "buckets": sorted({(r.height, r.width) for r in parts.data.records}),
        "batches_per_epoch": parts.batches_per_epoch,
        "global_batch": parts.global_batch,
        "grid": [round(t, 6) for t in grid],
        "forwards_per_sample": states * (2 if parts.objective.needs_teacher else 1),
        "sample_forwards": s.sample.steps or parts.family.deployment_steps,
        "precision": s.train.precision,
        "threads": torch.get_num_threads(),
        "planned_peak_bytes": parts.plan.device_peak,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **parts.pair.describe(),
        **parts.engine.describe(),
    }


def first_screen(parts: RunParts) -> str:
    """What will be trained, on what, how and where, one line each. Rank 0 writes the same to environment.json."""
    d, s = describe(parts), parts.settings
    if parts.rank == 0:
        write_text(parts.folder / "environment.json", json.dumps(d, indent=1, default=str) + "\n")
    trains = f"{s.adapter.kind}, {d['trainable'] / 1e6:.2f} M parameters"
    if s.adapter.kind == "lora":
        trains += f", rank {s.adapter.rank}, alpha {s.adapter.alpha:g}; on "
        trains += ", ".join(f"{kind} {adapted} of {there}" for kind, (adapted, there) in parts.coverage.items())
    method: str = s.method.name
    if parts.objective.needs_teacher:
        teacher = f"{s.teacher.kind} {s.teacher.ema_decay}" if s.teacher.kind == "ema" else s.teacher.kind
        method += f", teacher {teacher}" + (" in bf16" if s.teacher.ema_dtype == "bf16" else "")
    method += f", {parts.objective.describe()}"
    lines = [
        ("run", f"{parts.folder}" + (f", continues after step {parts.first}" if parts.first else "")),
        ("model", f"{d['model']} ({d['family']}, {d['parameters'] / 1e6:.1f} M parameters)"),
        *(("allowed", why) for why in parts.variants),
        ("trains", trains),
        ("data", f"{d['records']} records in {len(d['buckets'])} bucket(s), {d['skipped']} skipped; "
                 f"batch {d['global_batch']} = {s.train.batch_size} x {s.train.accumulation} x {parts.world} rank(s)"),
        *parts.data.notes,
        ("prompts", f"cut where they are longer than {s.conditioning.max_text_tokens} tokens"
                    + (f" (the teacher's, with the picture: {s.conditioning.max_vlm_tokens})"
                       if shows_images(parts.objective) and parts.family.context == "vlm" else "")),
        *(("left out", f"{source}: {reason}") for source, reason in parts.data.skipped[:NAMED]),
        *([("left out", f"and {len(parts.data.skipped) - NAMED} more, listed at the end")]
          if len(parts.data.skipped) > NAMED else []),
        ("method", method),
        ("grid", "t = " + ", ".join(f"{t:g}" for t in d["grid"])
                 + f"; {d['forwards_per_sample']} forwards a sample; pictures by {d['sample_forwards']} steps"),
        ("steps", f"{s.train.steps}, rate {s.train.learning_rate:g} ({s.train.schedule}, warm-up {s.train.warmup})"),
        ("runs on", f"{d['device']} ({d['backend']}), ZeRO {d['zero_stage']}, {d['precision']}, {d['threads']} threads, "
                    f"torch {d['torch']}, EMA {d['ema_backend']}"),
        *([("left out", "deepspeed.config: ZeRO stage 0 runs without DeepSpeed, which would read it")]
          if s.deepspeed.config and not s.deepspeed.stage else []),
        ("forward", f"{d['backbone']}, attention {d['attention']}"
                    + (f", activations {d['activations']}, ops {d['ops']}, fp8 {d['fp8']}" if "ops" in d else "")),
    ]
    return "\n".join(f"{name:>8}  {text}" for name, text in lines)


def closing(parts: RunParts, last_grid: Path | None, exported: list[str]) -> str:
    """The last lines of a run that has finished. last_grid: the newest picture. exported: lines of what was exported."""
    s = parts.settings
    lines = [f"finished {s.train.steps} steps in {parts.folder}",
             f"  samples/       {last_grid.name if last_grid else 'none'}",
             "  metrics.jsonl, tensorboard/, checkpoints/"]
    if parts.engine.keeps_ema:
        gone = 1 - s.teacher.ema_decay**s.train.steps
        lines.append(f"  the EMA (the teacher, export_teacher/) has gone {100 * gone:.3g} % of the way from the start to "
                     f"the student: 1 - {s.teacher.ema_decay}^{s.train.steps}")
    lines += [f"  {line}" for line in exported]
    return "\n".join(lines + left_out(parts))


def left_out(parts: RunParts) -> list[str]:
    """The bad records that were left out, one line each."""
    skipped = parts.data.skipped
    title = [f"{len(skipped)} bad record(s) were left out:"] if skipped else []
    return title + [f"  {source}: {reason}" for source, reason in skipped]
