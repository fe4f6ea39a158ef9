"""deepspeed.config: passed through, or refused in one line that names both sides."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from dopsd_fast.distributed.deepspeed_check import check_world
from dopsd_fast.errors import UserError
from dopsd_fast.settings.deepspeed_dict import deepspeed_config
from dopsd_fast.settings.load import load_settings
from dopsd_fast.settings.schema import Settings


def error(words: str, world: int = 0, device: str = "cpu") -> str:
    """What is said when the settings are read, or, with `world`, when the ranks are known."""
    with pytest.raises(UserError) as caught:
        settings = load_settings(words.split())
        if world:
            check_world(settings, world, device)
    text = str(caught.value)
    assert "\n" not in text and (not world or not text.startswith("impossible combination"))
    return text


def zero(words: str) -> str:
    return " ".join(f"deepspeed.config.zero_optimization.{word}" for word in words.split())


def test_config_is_passed_through() -> None:
    settings = Settings()
    settings.deepspeed.config = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "bf16": {"enabled": "auto"},
        "gradient_accumulation_steps": 1,
        "wall_clock_breakdown": True,
    }
    given = copy.deepcopy(settings.deepspeed.config)
    config = deepspeed_config(settings)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}
    assert config["bf16"]["enabled"] is False and config["wall_clock_breakdown"] is True
    assert settings.deepspeed.config == given
    assert deepspeed_config(Settings())["zero_optimization"]["reduce_bucket_size"] != 1000


@pytest.mark.parametrize(
    "words",
    [
        zero("zero_hpz_partition_size=2 sub_group_size=1000000"),
        zero("overlap_comm=true stage3_prefetch_bucket_size=0 stage3_max_live_parameters=5 contiguous_gradients=false"),
        zero("offload_param.device=cpu offload_param.pin_memory=false offload_optimizer={device='cpu'}"),
        "deepspeed.config.comms_logger={enabled=true,prof_all=true} deepspeed.config.flops_profiler={enabled=true}",
        "deepspeed.config.tensorboard={enabled=true,output_path='logs'} deepspeed.config.steps_per_print=10",
        "deepspeed.config.checkpoint.tag_validation=Warn deepspeed.config.aio.block_size=4096",
        "deepspeed.config.train_batch_size=32 deepspeed.config.gradient_accumulation_steps=1",
    ],
)
def test_fields_that_deepspeed_knows(words: str) -> None:
    settings = load_settings([*words.split(), "deepspeed.stage=3", "deepspeed.gather=step"])
    check_world(settings, 4, "cpu")
    config = deepspeed_config(settings)
    assert config["train_micro_batch_size_per_gpu"] == 8 and "train_batch_size" not in config
    for section, values in settings.deepspeed.config.items():
        if isinstance(values, dict):
            for name, value in values.items():
                assert value == "auto" or config[section][name] == value, name


def test_quantised_collectives_are_passed_through() -> None:
    settings = load_settings(["deepspeed.stage=3", *zero("zero_quantized_weights=true zero_quantized_gradients=true").split()])
    config = deepspeed_config(settings)
    assert config["zero_optimization"]["zero_quantized_weights"] and config["zero_optimization"]["zero_quantized_gradients"]
    assert config["communication_data_type"] == "fp16"  # the gradient kernels take any bits for fp16
    settings = load_settings(["deepspeed.stage=3", *zero("zero_quantized_weights=true").split()])
    assert deepspeed_config(settings)["communication_data_type"] == "fp32"
    check_world(settings, 8, "cuda")


@pytest.mark.parametrize(
    "words, names",
    [
        (zero("stage=3"), ("zero_optimization.stage=3", "deepspeed.stage=2")),
        ("deepspeed.config.train_micro_batch_size_per_gpu=3", ("train_micro_batch_size_per_gpu=3", "train.batch_size=8")),
        ("deepspeed.config.gradient_accumulation_steps=3", ("gradient_accumulation_steps=3", "train.accumulation=1")),
        ("deepspeed.config.gradient_clipping=0.5", ("gradient_clipping=0.5", "train.grad_clip=1.0")),
        ("deepspeed.config.bf16.enabled=true", ("bf16.enabled=true", "train.precision=fp32")),
        ("deepspeed.config.bfloat16.enabled=true", ("bfloat16.enabled=true", "train.precision=fp32")),
        ("deepspeed.config.fp16.enabled=true", ("fp16.enabled=true", "train.precision=fp32")),
        ("deepspeed.config.data_types.param_dtype=bf16", ("param_dtype=bf16", "train.precision=fp32")),
        ("deepspeed.config.torch_autocast.enabled=true", ("torch_autocast.enabled=true", "train.precision=fp32")),
        ("deepspeed.config.train_batch_size=12", ("train_batch_size=12", "train.batch_size=8", "train.accumulation=1")),
        ("deepspeed.config.optimizer.type=Adam", ("optimizer.type=Adam", "train.learning_rate=", "train.betas=")),
        ("deepspeed.config.scheduler.type=WarmupLR", ("scheduler.type=WarmupLR", "train.schedule=", "train.warmup=")),
        ("deepspeed.config.activation_checkpointing.profile=true", ("checkpointing.profile=true", "train.activations=keep")),
        ("deepspeed.config.communication_data_type=bf16", ("communication_data_type=bf16", "train.precision=fp32")),
        ("deepspeed.config.data_types.grad_accum_dtype=bf16", ("grad_accum_dtype=bf16", "train.precision=fp32")),
        ("deepspeed.config.zero_force_ds_cpu_optimizer=true", ("zero_force_ds_cpu_optimizer=true", "teacher.kind=ema")),
        ("deepspeed.config.gradient_allreduce_op=sum", ("gradient_allreduce_op=sum", "train.batch_size=8")),
        ("deepspeed.config.tensor_parallel.autotp_size=2", ("autotp_size=2", "train.batch_size=8")),
        (zero("offload_optimizer.device=nvme"), ("offload_optimizer.device=nvme", "teacher.kind=ema", "device=cpu")),
        ("deepspeed.stage=3 " + zero("offload_param.device=nvme"), ("offload_param.device=nvme", "teacher.kind=ema")),
        (zero("offload_optimizer.super_offload=true"), ("super_offload=true", "teacher.kind=ema")),
        ("deepspeed.stage=3 " + zero("offload_optimizer.ratio=0.5"), ("ratio=0.5", "teacher.kind=ema")),
        ("deepspeed.stage=3 " + zero("zero_quantized_nontrainable_weights=true"), ("weights=true", "teacher.kind=ema")),
        (zero("compute_grad_norm=false"), ("compute_grad_norm=false", "train.grad_clip=1.0")),
        (zero("zero_hpz_partition_size=2"), ("zero_hpz_partition_size=2", "deepspeed.stage=3")),
        (zero("zero_quantized_weights=true"), ("zero_quantized_weights=true", "deepspeed.stage=3")),
        (zero("offload_param.device=cpu"), ("offload_param.device=cpu", "deepspeed.stage=3")),
        ("deepspeed.stage=0 " + zero("offload_optimizer.device=cpu"), ("offload_optimizer.device=cpu", "deepspeed.stage=1")),
        ("deepspeed.stage=3 deepspeed.config.prescale_gradients=true", ("prescale_gradients=true", "reduce_scatter=false")),
        (
            "deepspeed.stage=3 deepspeed.gather=unit " + zero("stage3_module_granularity_threshold=9"),
            ("stage3_module_granularity_threshold=9", "deepspeed.gather=unit"),
        ),
    ],
)
def test_contradictions_name_both(words: str, names: tuple[str, ...]) -> None:
    text = error(words)
    assert text.startswith("impossible combination: deepspeed.config.") and all(name in text for name in names), text


@pytest.mark.parametrize(
    "words, said",
    [
        ("train.masters=low_bits deepspeed.stage=0", "train.precision is fp32: use train.precision=bf16"),
        ("train.masters=low_bits train.precision=bf16", "train.masters=low_bits needs deepspeed.stage=0, it is 2"),
        ("deepspeed.gather=sweep deepspeed.stage=2", "deepspeed.gather=sweep gathers sharded weights, with deepspeed.stage=2"),
    ],
)
def test_contradictions_among_our_own_settings(words: str, said: str) -> None:
    assert said in error(words)


def test_the_engine_refuses_them_too() -> None:
    settings = Settings()
    settings.deepspeed.config = {"optimizer": {"type": "Adam"}}
    with pytest.raises(UserError, match="impossible combination.*optimizer.type=Adam"):
        deepspeed_config(settings)


@pytest.mark.parametrize(
    "words, names",
    [
        ("deepspeed.config.steps_per_prnt=3", ("did you mean steps_per_print?",)),
        ("deepspeed.config.zero_optimisation.stage=2", ("did you mean zero_optimization?",)),
        (zero("overlap_com=true"), ("overlap_com", "did you mean zero_optimization.overlap_comm?")),
        (zero("offload_optimizer.devic=cpu"), ("offload_optimizer.devic",)),
        ("deepspeed.config.bf16.enabeld=false", ("enabeld",)),
        ("deepspeed.config.flops_profiler.enable=true", ("did you mean flops_profiler.enabled?",)),
        ("deepspeed.config.data_types.grad_acum_dtype=fp32", ("did you mean data_types.grad_accum_dtype?",)),
        ("deepspeed.config.elasticity.enabled=true", ("lastic",)),
        (zero("reduce_bucket_size=-1"), ("reduce_bucket_size", "greater than 0")),
        (zero("overlap_comm=maybe"), ("overlap_comm", "boolean")),
        ("deepspeed.config.comms_logger=3", ("CommsLoggerConfig",)),
        ("deepspeed.stage=1 deepspeed.config.prescale_gradients=yes", ("prescale_gradients=yes must be true or false",)),
        ("deepspeed.stage=1 deepspeed.config.gradient_predivide_factor=x", ("gradient_predivide_factor=x must be a number",)),
        ("deepspeed.config.zero_optimization=3", ("zero_optimization is 3",)),
        ("deepspeed.config.train_batch_size=24", ("train_batch_size=24", "train.batch_size=8", "4 ranks = 32")),
        ("deepspeed.stage=3 " + zero("zero_hpz_partition_size=3"), ("partition_size=3", "4 rank(s)", "stage=3", "2, 4")),
        ("deepspeed.stage=3 " + zero("zero_hpz_partition_size=8"), ("partition_size=8", "4 rank(s)")),
        ("deepspeed.stage=3 " + zero("zero_quantized_weights=true"), ("zero_quantized_weights=true", "CUDA", "CPU")),
        ("deepspeed.stage=3 " + zero("zero_quantized_gradients=true"), ("zero_quantized_gradients=true", "CUDA", "CPU")),
    ],
)
def test_what_deepspeed_would_not_read_or_four_ranks_cannot_have(words: str, names: tuple[str, ...]) -> None:
    text = error(words, world=4)
    assert text.startswith("deepspeed.config") and all(name in text for name in names), text


def test_quantised_gradients_need_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "device_count", lambda self: 8)
    words = "deepspeed.stage=3 " + zero("zero_quantized_gradients=true")
    assert "between nodes" in error(words, 8, "cuda") and "between nodes" in error(words, 12, "cuda")
    check_world(load_settings(words.split()), 16, "cuda")


def test_a_config_that_no_check_has_seen_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from dopsd_fast.distributed.zero_engine import _initialize

    monkeypatch.setattr(deepspeed, "initialize", lambda **given: DeepSpeedZeroConfig(**given["config"]["zero_optimization"]))
    with pytest.raises(UserError, match="deepspeed.config: DeepSpeedZeroConfig, no_such_field"):
        _initialize(SimpleNamespace(fused=None), None, {"zero_optimization": {"stage": 2, "no_such_field": 1}})
