"""DeepSpeed's configuration from the settings: `deepspeed.config` is passed through, and what contradicts a setting of ours
is an error that names both.

Three moments: `contradictions` when the settings are read, `check_world` when the ranks are known, `deepspeed_config` when
the engine is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dopsd_fast.errors import UserError

if TYPE_CHECKING:
    from dopsd_fast.settings.schema import Settings


# A gradient bucket as long as a large layer: DeepSpeed's 5e8 elements would be 2 GB in fp32.
_DEFAULTS: dict[str, Any] = {
    "steps_per_print": 1 << 62,
    "wall_clock_breakdown": False,
    "zero_optimization": {"reduce_bucket_size": 50_000_000},
}

# What the engine relies on: path -> (the one value that works, why). {train.grad_clip} stands for that setting and its value.
_FIXED: dict[str, tuple[Any, str]] = {
    "zero_allow_untested_optimizer": (True, "{teacher.kind} is kept by an optimizer of our own"),
    "zero_force_ds_cpu_optimizer": (False, "{teacher.kind} is kept by an optimizer of our own, on the CPU too"),
    "communication_data_type": ("fp32", "gradients are reduced in fp32 also at {train.precision}"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are summed in fp32 also at {train.precision}"),
    "gradient_allreduce_op": ("mean", "the loss is a mean over the ranks' {train.batch_size} too"),
    "managed_gradient_accumulation": (True, "all of {train.accumulation} ends in one reduction"),
    "zero_optimization.compute_grad_norm": (True, "{train.grad_clip} and the metrics need the norm"),
    "zero_optimization.elastic_checkpoint": (False, "{checkpoint.every} writes checkpoints for any number of ranks"),
    "bf16.bf16_master_weights_and_grads": (False, "{train.masters} decides"),
    "bf16.bf16_optimizer_states": (False, "{train.masters} decides, and moments are fp32"),
    "bf16.check_grad_overflow": (True, "at {train.precision} too a gradient that is not finite must stop the run"),
    "fp16.fp16_master_weights_and_grads": (False, "{train.masters} decides"),
    "torch_autocast.enabled": (False, "{train.precision} decides"),
    "hybrid_engine.enabled": (False, "samples come from the forward of {backbone}"),
    "compile.deepcompile": (False, "the forward of {backbone} is never given to it"),
}

# What DeepSpeed could do, but not with this engine: path, or path=value -> what stands against it, and what to use instead.
_ALONE = "ranks share out the batches ({train.batch_size} each) and nothing else: leave it out"
_OWN = "it brings an optimizer that keeps no average for {teacher.kind}: leave it out"
_IMPOSSIBLE = {
    "optimizer": "{train.learning_rate}, {train.betas} and {train.weight_decay} set it",
    "scheduler": "{train.schedule} and {train.warmup} set it",
    "activation_checkpointing": "{train.activations} decides what is computed again",
    "sequence_parallel_size": _ALONE,
    "data_parallel_size": _ALONE,
    "tensor_parallel": _ALONE,
    "expert_parallel": _ALONE,
    "pipeline": _ALONE,
    "autotuning": "{deepspeed.gather} and the planner (python -m dopsd_fast.plan) choose",
    "data_efficiency": "{data.path}, {data.resolution} and {data.repeats} decide what is trained on",
    "weight_quantization": "{train.precision} and {train.fp8} decide",
    "zero_optimization.zenflow": _OWN,
    "zero_optimization.offload_optimizer.super_offload=true": _OWN,
    "zero_optimization.offload_optimizer.device=nvme": "after a step the engine reads the average of {teacher.kind}, and the "
    "checkpoint of {checkpoint.every}, from the optimizer's state, which is on the disk by then: use device=cpu",
    "zero_optimization.offload_param.device=nvme": "the engine writes the teacher ({teacher.kind}) and resumed weights into "
    "their shards, which are on the disk by then: use device=cpu",
}

_NEED_STAGE_3 = ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients", "offload_param.device",
                 "zero_quantized_nontrainable_weights")


def deepspeed_config(settings: Settings) -> dict[str, Any]:
    """DeepSpeed's dict: our values over `settings.deepspeed.config` over `_DEFAULTS`. A value "auto" is left out.

    Raises UserError for what contradicts another setting.
    """
    for problem in contradictions(settings):
        raise UserError(f"impossible combination: {problem}")
    train, stage = settings.train, settings.deepspeed.stage
    sharded_bf16 = train.precision == "bf16" and stage > 0
    ours: dict[str, Any] = {
        **{key: value for key, (value, _) in _FIXED.items() if "." not in key},
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": 1,  # one reduction a step; the loss carries 1 / accumulation
        "zero_optimization.stage": stage,
        # At stage 0 our own engine runs, which clips and holds the masters itself; the dict is only checked then.
        "gradient_clipping": train.grad_clip if stage else 0.0,
        "bf16.enabled": sharded_bf16,
        "fp16.enabled": False,
    }
    if sharded_bf16:
        ours["bf16.check_grad_overflow"] = True
    if quantizes_gradients(settings):
        ours["communication_data_type"] = "fp16"
    if sharded_bf16 and stage == 3:
        ours["data_types.grad_accum_dtype"] = "fp32"
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in _DEFAULTS.items()}
    for path, value in leaves(settings.deepspeed.config):
        if path not in _FIXED and path not in ("train_batch_size", "data_types.param_dtype"):
            _put(config, path.replace("bfloat16.", "bf16."), value)
    for path, value in ours.items():
        _put(config, path, value)
    return config


def contradictions(s: Settings) -> list[str]:
    """One line for each value in `deepspeed.config` that cannot go with another setting, and for each of our own settings that
    cannot go with the chosen stage."""
    given = dict(leaves(s.deepspeed.config))
    found = []
    for path, (name, value, ours) in _ours(s).items():
        if path in given and given[path] != value:
            found.append(f"{shown(path, given[path])} contradicts {name}={ours}: set {name} alone")
    for path, (value, why) in _FIXED.items():
        if path == "communication_data_type" and quantizes_gradients(s):
            value, why = "fp16", "the kernels of zero_quantized_gradients read nothing else"
        if path in given and given[path] != value:
            found.append(f"{shown(path, given[path])} must be {_plain(value)}: {_filled(why, s)}")
    for path, value in given.items():
        for key, why in _IMPOSSIBLE.items():
            if value not in (False, None) and f"{path}={_plain(value)}.".startswith((f"{key}.", f"{key}=")):
                found.append(f"{shown(path, value)} cannot be used: {_filled(why, s)}")
    return found + _of_stage(s, given) + _of_values(s, given)


def _ours(s: Settings) -> dict[str, tuple[str, Any, Any]]:
    """path -> (our setting, the value that the path must have, our setting's value)."""
    bf16 = ("train.precision", s.train.precision == "bf16", s.train.precision)
    return {
        "train_micro_batch_size_per_gpu": ("train.batch_size", s.train.batch_size, s.train.batch_size),
        "gradient_accumulation_steps": ("train.accumulation", s.train.accumulation, s.train.accumulation),
        "gradient_clipping": ("train.grad_clip", s.train.grad_clip, s.train.grad_clip),
        "zero_optimization.stage": ("deepspeed.stage", s.deepspeed.stage, s.deepspeed.stage),
        "bf16.enabled": bf16,
        "bfloat16.enabled": bf16,
        "fp16.enabled": ("train.precision", False, s.train.precision),
        "data_types.param_dtype": ("train.precision", s.train.precision, s.train.precision),
    }


def quantizes_gradients(s: Settings) -> bool:
    """DeepSpeed's 4-bit kernels take every gradient for fp16, whatever it is: so it has to be."""
    return dict(leaves(s.deepspeed.config)).get("zero_optimization.zero_quantized_gradients") is True


def _of_stage(s: Settings, given: dict[str, Any]) -> list[str]:
    """DeepSpeed would take these without a word, and do nothing."""
    stage, found = s.deepspeed.stage, []
    for key in _NEED_STAGE_3:
        path = f"zero_optimization.{key}"
        off = (1, 0) if key == "zero_hpz_partition_size" else (False, None, "none")
        if stage < 3 and given.get(path, off[0]) not in off:
            found.append(f"{shown(path, given[path])} needs deepspeed.stage=3, it is {stage}")
    path = "zero_optimization.offload_optimizer.device"
    if stage == 0 and given.get(path) == "cpu":
        found.append(f"{shown(path, given[path])} needs deepspeed.stage=1, 2 or 3, it is 0")
    return found


def _of_values(s: Settings, given: dict[str, Any]) -> list[str]:
    """Values that depend on values."""
    found = []
    path = "zero_optimization.offload_optimizer.ratio"
    if given.get(path, 1.0) != 1.0:
        found.append(f"{shown(path, given[path])} steps a part with an AdamW that keeps no EMA for teacher.kind="
                     f"{s.teacher.kind}: leave it out")
    path = "zero_optimization.zero_quantized_nontrainable_weights"
    if given.get(path):
        found.append(f"{shown(path, True)} keeps frozen weights in 8 bits, teacher.kind={s.teacher.kind} writes or loads them "
                     "whole: use zero_quantized_weights, which only gathers in 8 bits")
    path = "zero_optimization.zero_quantized_gradients"
    if given.get(path) and given.get("zero_optimization.reduce_scatter") is False:
        found.append(f"{shown(path, True)} needs {shown('zero_optimization.reduce_scatter', True)}, it is false")
    for path, usual in (("gradient_predivide_factor", 1.0), ("prescale_gradients", False)):
        scatter = "zero_optimization.reduce_scatter"
        if s.deepspeed.stage >= 2 and given.get(path, usual) != usual and given.get(scatter, True):
            found.append(f"{shown(path, given[path])} with deepspeed.stage={s.deepspeed.stage} needs {shown(scatter, False)}")
    path = "zero_optimization.stage3_module_granularity_threshold"
    if given.get(path) and s.deepspeed.gather == "unit":
        found.append(f"{shown(path, given[path])} gathers when a model is called, deepspeed.gather=unit calls its parts: "
                     "leave it out, or use deepspeed.gather=step")
    batch, path = s.train.batch_size * s.train.accumulation, "train_batch_size"
    if path in given and (not isinstance(given[path], int) or given[path] % batch):
        found.append(f"{shown(path, given[path])} is no multiple of train.batch_size={s.train.batch_size} x "
                     f"train.accumulation={s.train.accumulation}: leave it out")
    return found


# ---- paths -----------------------------------------------------------------------------------------------------------------


def shown(path: str, value: Any) -> str:
    return f"deepspeed.config.{path}={_plain(value)}"


def _plain(value: Any) -> str:
    """As on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _filled(text: str, settings: Settings) -> str:
    """`text` with {section.field} replaced by "section.field=value"."""

    def named(match: re.Match[str]) -> str:
        value: Any = settings
        for part in match[1].split("."):
            value = getattr(value, part)
        return f"{match[1]}={_plain(value)}"

    return re.sub(r"\{([a-z0-9_.]+)\}", named, text)


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything that is not left to us with "auto"."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        elif value != "auto":
            yield prefix + key, value


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"deepspeed.config: {key} is {tree!r}, must be a table that may hold {path}")
    tree[last] = value
