"""DeepSpeed's configuration from the settings, with `deepspeed.config` passed through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dopsd_fast.errors import UserError

if TYPE_CHECKING:
    from dopsd_fast.settings import Settings

# A gradient bucket as long as a large layer: DeepSpeed's 5e8 elements would be 2 GB in fp32.
_DEFAULTS: dict[str, Any] = {
    "steps_per_print": 1 << 62,
    "wall_clock_breakdown": False,
    "zero_optimization": {"reduce_bucket_size": 50_000_000},
}

# path, or path=value -> why it cannot be passed through
_UNSUPPORTED = {
    "torch_autocast": "train.precision decides",
    "zero_optimization.zero_quantized_weights": "the EMA is written into unquantized weights",
    "zero_optimization.zero_quantized_nontrainable_weights": "the EMA is written into unquantized weights",
    "zero_optimization.offload_optimizer.device=nvme": "cpu is",
    "zero_optimization.offload_param.device=nvme": "cpu is",
}

# The optimizer is AdamW + EMA, and gradients are summed in fp32.
_FIXED = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "communication_data_type": "fp32",
    "data_types.grad_accum_dtype": "fp32",
}


def deepspeed_config(settings: Settings) -> dict[str, Any]:
    """DeepSpeed's dict: our values over `settings.deepspeed.config` over `_DEFAULTS`. A value "auto" is left out.

    What contradicts another setting was refused by load_settings. UserError for what the engine cannot do.
    """
    train, stage = settings.train, settings.deepspeed.stage
    sharded_bf16 = train.precision == "bf16" and stage > 0
    ours: dict[str, Any] = {
        **{key: value for key, value in _FIXED.items() if key != "data_types.grad_accum_dtype"},
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": 1,  # one reduction a step; the loss carries 1 / accumulation
        "zero_optimization.stage": stage,
        # At stage 0 the engine clips, and the optimizer holds the fp32 masters of bf16 parameters: to DeepSpeed, plain
        # DDP.
        "gradient_clipping": train.grad_clip if stage else 0.0,
        "bf16.enabled": sharded_bf16,
        "fp16.enabled": False,
    }
    if sharded_bf16:
        ours["bf16.check_grad_overflow"] = True
    if sharded_bf16 and stage == 3:
        ours["data_types.grad_accum_dtype"] = "fp32"
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in _DEFAULTS.items()}
    for path, value in _leaves(settings.deepspeed.config):
        for key, reason in _UNSUPPORTED.items():
            if value not in (False, "auto") and f"{path}={value}.".startswith((f"{key}.", f"{key}=")):
                raise UserError(f"deepspeed.config: {path}={value} is not supported here: {reason}")
        if path in _FIXED:
            if value not in (_FIXED[path], "auto"):
                raise UserError(
                    f"deepspeed.config: {path}={value} contradicts the engine, which needs {_FIXED[path]}: leave it out"
                )
        elif value != "auto":
            _put(config, path, value)
    for path, value in ours.items():
        _put(config, path, value)
    return config


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"deepspeed.config: {key} is {tree!r}, must be a table that may hold {path}")
    tree[last] = value
