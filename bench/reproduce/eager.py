"""`python -m bench.reproduce.eager RUN SETTING=VALUE ...`: the published step in plain PyTorch, on the trainer's records.

Order, prompts, noise and learning rates are those that the trainer would use with these settings; everything else is
`bench.references.reference_eager`. Full fine-tuning on one process. Not resumable: what is there without its last checkpoint
is begun anew.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.references.reference_eager import ReferenceEncoders, ReferenceStep
from bench.reproduce.embedded import exit_code
from dopsd_fast.data.epochs import epoch_batches, item_noise
from dopsd_fast.data.images import load_image
from dopsd_fast.data.records import read_records
from dopsd_fast.families.registry import open_family
from dopsd_fast.settings.load import load_settings


def train(run: Path, words: Sequence[str]) -> None:
    """Leaves settings.toml, metrics.jsonl ({"step", "loss", "seconds"}) and checkpoints/step-*/student.safetensors (fp32)."""
    s = load_settings([*words, f"output.dir={run}"])
    shutil.rmtree(run, ignore_errors=True)
    (run / "checkpoints").mkdir(parents=True)
    (run / "settings.toml").write_text(s.to_toml())
    torch.set_num_threads(s.train.threads or 1)
    family = open_family(s.model.folder, s.conditioning)
    data = read_records(s.data, family.pixel_multiple)
    images = {record.index: load_image(record.images[0], record.height, record.width) for record in data.records}
    encoders = ReferenceEncoders(s.model.folder, s.vlm_folder)
    first = data.records[0]
    shape = family.latent_shape(first.height, first.width)
    step = ReferenceStep(
        family.load_transformer(torch.float32), [1 - t for t in family.train_grid(s.method.num_states, s.method.shift, shape)],
        weight=s.method.weight, betas=s.train.betas, eps=s.train.eps, weight_decay=s.train.weight_decay,
        grad_clip=s.train.grad_clip, ema_decay=s.teacher.ema_decay, encoders=encoders,
    )
    epochs = (epoch_batches(data, n, s.train.seed, s.train.batch_size, s.data.prompt_keys) for n in itertools.count())
    with (run / "metrics.jsonl").open("w") as log:
        for done, items in zip(range(s.train.steps), itertools.chain.from_iterable(epochs)):
            for group in step.optimizer.param_groups:
                group["lr"] = s.train.learning_rate * (1 + math.cos(math.pi * done / s.train.steps)) / 2
            started = time.perf_counter()
            noise = torch.stack([item_noise(s.train.seed, item, shape) for item in items])
            result = step.step_from_inputs(noise, [item.prompt for item in items], [images[item.record] for item in items])
            row = {"step": done + 1, "loss": result.loss, "seconds": time.perf_counter() - started}
            log.write(json.dumps(row) + "\n")
            log.flush()
            if (done + 1) % s.checkpoint.every == 0 or done + 1 == s.train.steps:
                folder = run / "checkpoints" / f"step-{done + 1:06}"
                folder.mkdir()
                weights = {name: p.detach().contiguous().clone() for name, p in step.model.named_parameters()}
                save_file(weights, folder / "student.safetensors")
    (run / "export").mkdir()


if __name__ == "__main__":
    sys.exit(exit_code(train, Path(sys.argv[1]), sys.argv[2:]))
