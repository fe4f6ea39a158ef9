"""A checkpoint of every arrangement of ranks, continued in every other: world size, ZeRO stage, offload, adapter, dtype."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from dopsd_fast.errors import UserError
from dopsd_fast.run.folder import _check_same
from dopsd_fast.settings.load import load_settings
from dopsd_fast.storage import checkpoints
from tests import ranks, resuming

OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
ARRANGEMENTS = {
    "1x0": (1, dict(stage=0)),
    "1x0-low_bits": (1, dict(stage=0, masters="low_bits")),
    "1x3": (1, dict(stage=3)),
    "2x2": (2, dict(stage=2)),
    "2x3-offload": (2, dict(stage=3, config=OFFLOAD)),
    "4x3": (4, dict(stage=3)),
}
VARIANTS = {"full-bf16": dict(precision="bf16"), "lora-fp32": dict(adapter="lora"), "full-fp32": dict()}
FEWER = {"lora-fp32": ("1x0", "2x2", "4x3"), "full-fp32": ("2x2", "1x3")}
SAVED = [(variant, old) for variant in VARIANTS for old in FEWER.get(variant, ARRANGEMENTS)]
PAIRS = [(variant, old, new) for variant, old in SAVED for new in ARRANGEMENTS if "bf16" in variant or "low_bits" not in new]


@functools.cache
def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def folder(*names: str) -> Path:
    return Path(scratch().name, *names)


@functools.cache
def results() -> dict:
    saving, loading = {}, {}
    for variant, name in SAVED:
        world, settings = ARRANGEMENTS[name]
        case = dict(name=f"{variant} {name}", do="tests.resuming:train_and_save", folder=str(folder(variant, name)))
        saving.setdefault(world, []).append(case | VARIANTS[variant] | settings)
    for variant, old, new in PAIRS:
        world, settings = ARRANGEMENTS[new]
        case = dict(name=f"{variant} {old} {new}", do="tests.resuming:load_and_save", folder=str(folder(variant, old)),
                    again=str(folder(variant, f"{old}-{new}")))
        loading.setdefault(world, []).append(case | VARIANTS[variant] | settings)
    found: dict = {}
    for phase, by_world in ("save", saving), ("load", loading):
        for world, cases in by_world.items():
            done = ranks.run(world, cases, folder("run", f"{phase}-{world}"))
            found |= {case["name"]: done[case["name"]].numbers for case in cases}
    return found


@pytest.mark.parametrize("variant, old, new", PAIRS)
def test_state_moves_bit_for_bit(variant: str, old: str, new: str) -> None:
    """Masters, moments, EMA and step counts, as the new arrangement saves them again; and on every rank the weights in use are
    their casts. Then the next step agrees."""
    numbers = results()[f"{variant} {old} {new}"]
    saved = resuming.joined(checkpoints.latest(folder(variant, old)))
    again = resuming.joined(checkpoints.latest(folder(variant, f"{old}-{new}")))
    assert saved.keys() == again.keys() and {kind for _, kind in saved} == {"master", "exp_avg", "exp_avg_sq", "ema", "step"}
    for (name, kind), tensor in saved.items():
        if kind == "step":
            assert set(tensor.tolist()) == set(again[name, kind].tolist()) == {resuming.LAST}
        else:
            assert torch.equal(tensor.view(torch.int32), again[name, kind].view(torch.int32)), (name, kind)
    assert numbers["compared"] == 2 * len({name for name, _ in saved})
    assert numbers["wrong"] == [] and set(numbers["wrong_on"]) == {0}
    # Other sums from here on: a few units in the last place of the gradient's dtype, as in test_checkpoints.py.
    assert numbers["masters"] == ("low_bits" if "low_bits" in new else "fp32")
    relative = 2.0**-6 if "bf16" in variant else 2.0**-16
    assert numbers["norms"] == pytest.approx(results()[f"{variant} {old}"]["norms"], rel=relative)


def test_arrangements_are_what_they_are_called() -> None:
    results()
    for name, (world, settings) in ARRANGEMENTS.items():
        state = checkpoints.read_state(checkpoints.latest(folder("full-bf16", name)))
        assert (state["world"], state["stage"], len(state["files"])) == (world, settings["stage"], world)


# ---- what the trainer lets through -----------------------------------------------------------------------------------


def check(tmp_path: Path, before: list[str], now: list[str]) -> None:
    (tmp_path / "settings.toml").write_text(load_settings(before).to_toml())
    _check_same(load_settings(now), tmp_path, None, 8)


@pytest.mark.parametrize("change", [
    "deepspeed.stage=3 deepspeed.gather=unit", "train.activations=recompute", "train.attention=math", "backbone=diffusers",
    "deepspeed.config.zero_optimization.offload_optimizer.device=cpu", "method.backward=k_graphs",
    "deepspeed.config.zero_optimization.reduce_bucket_size=5",
    "deepspeed.config.zero_optimization.zero_quantized_gradients=false",
])
def test_a_run_continues_in_another_arrangement(tmp_path: Path, change: str) -> None:
    check(tmp_path, ["nano_full"], ["nano_full", *change.split()])
    check(tmp_path, ["nano_full", *change.split()], ["nano_full"])


def test_quantized_gradients_are_other_sums(tmp_path: Path) -> None:
    sharded, name = ["nano_full", "deepspeed.stage=3"], "deepspeed.config.zero_optimization.zero_quantized_gradients"
    for before, now in ((sharded, [*sharded, f"{name}=true"]), ([*sharded, f"{name}=true"], sharded)):
        with pytest.raises(UserError, match=f"holds a run with {name}"):
            check(tmp_path, before, now)


@pytest.mark.parametrize("change", [
    "train.precision=bf16", "teacher.kind=frozen",
    "deepspeed.config.gradient_predivide_factor=2.0", "train.grad_clip=0.5",
])
def test_a_run_does_not_continue_with_other_numbers(tmp_path: Path, change: str) -> None:
    name = change.partition("=")[0]
    with pytest.raises(UserError, match=name):
        check(tmp_path, ["nano_full"], ["nano_full", change])
    with pytest.raises(UserError, match=name):
        check(tmp_path, ["nano_full", change], ["nano_full"])
