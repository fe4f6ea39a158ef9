"""The planner: its estimate against the measured peaks of real runs, and what it says of the recipes.

Run as a script (`python tests/test_plan.py FOLDER`) this file makes the runs that are measured: the engine and the pair
forward on a random Z-Image, one process a rank, each rank's resident set read back from the kernel.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.path.insert(1, str(ROOT / "kernels"))

import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from dopsd_fast import plan  # noqa: E402
from dopsd_fast.conditioning.context import Shapes  # noqa: E402
from dopsd_fast.errors import UserError  # noqa: E402
from dopsd_fast.families.published import published_family  # noqa: E402
from dopsd_fast.families.zimage.family import ZImage  # noqa: E402
from dopsd_fast.memory import ledger, planner  # noqa: E402
from dopsd_fast.memory.activations import LiveBytes  # noqa: E402
from dopsd_fast.memory.ledger import PROCESS, Machine, shard  # noqa: E402
from dopsd_fast.settings.load import RECIPES, load_settings  # noqa: E402
from dopsd_fast.settings.schema import Settings  # noqa: E402

PARAMETERS = 6_154_908_736
"""Of Z-Image's transformer at its published size."""

LAYERS, WIDTH, TEXT = 4, 512, 256
SHAPES = {
    "fp32": Shapes((8, 24, 24), {"text": (64, TEXT)}, {"text": (96, TEXT)}),
    "bf16": Shapes((8, 8, 8), {"text": (16, TEXT)}, {"text": (24, TEXT)}),
}
"""By precision. Fewer tokens where products in bf16 are slow, as they are on a processor without instructions for them: these
cases are about weights, masters and moments, those in fp32 about activations too."""
BF16: dict[str, Any] = {"train.precision": "bf16"}
RECOMPUTE: dict[str, Any] = {"train.activations": "recompute"}
STEP, SWEEP = ({"deepspeed.stage": 3, "deepspeed.gather": gather} for gather in ("step", "sweep"))
OFFLOAD = {"deepspeed.config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "stage 0, LoRA": {"deepspeed.stage": 0, "adapter.kind": "lora"},
        "step, offloaded": {**STEP, **BF16, **OFFLOAD},
    },
    2: {
        "stage 2, accumulated": {"deepspeed.stage": 2, "train.accumulation": 2},
        "step": {**STEP, **BF16},
        "sweep": {**SWEEP, **RECOMPUTE},
    },
}
"""Ranks -> name -> settings of a measured run."""

WARM: tuple[dict[str, Any], ...] = ({"adapter.kind": "lora", **STEP, **BF16},)
"""Run first, with one layer: what DeepSpeed imports, and oneDNN's kernels, are no memory of a run. Once before the forks, since
the first time takes seconds, and in each of them."""


def settings_of(case: dict[str, Any]) -> Settings:
    settings = Settings()
    settings.train.batch_size, settings.method.num_states, settings.adapter.rank = 2, 2, 16
    for path, value in case.items():
        section, name = path.split(".", 1)
        setattr(getattr(settings, section), name, value)
    return settings


# ---- the run that is measured --------------------------------------------------------------------------------------------


class RandomZImage:
    """A Z-Image of about 20 M parameters, and what the program asks of a family."""

    name, lora_targets = "zimage", ZImage.lora_targets.fget(None)  # type: ignore[attr-defined]
    pair_forward = ZImage.pair_forward
    velocity = ZImage.velocity

    def __init__(self, layers: int = LAYERS) -> None:
        self.layers = layers

    def _check_tokens(self, tokens: int) -> None:
        pass

    def meta_transformer(self) -> Any:
        from diffusers import ZImageTransformer2DModel

        heads = WIDTH // 128
        with torch.device("meta"):
            return ZImageTransformer2DModel(
                in_channels=8, dim=WIDTH, n_layers=self.layers, n_refiner_layers=1, n_heads=heads, n_kv_heads=heads,
                cap_feat_dim=TEXT,
            ).eval()

    def load_transformer(self, dtype: torch.dtype) -> Any:
        model = torch.nn.Module.to(self.meta_transformer(), dtype).to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.02)
        return model.requires_grad_(True)


def resident(name: str) -> int:
    """VmRSS, or its highest value since the last `forget_peak`: VmHWM. Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measured_peak(case: dict[str, Any], layers: int) -> int:
    """Bytes by which the resident set grows during two steps, from before the model is built."""
    from dopsd_fast.method.objective import StepInputs
    from dopsd_fast.method.registry import make_objective
    from tests.tiny import engine_of, pair_of

    settings, family = settings_of(case), RandomZImage(layers)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    forget_peak()
    dtype = torch.bfloat16 if settings.train.precision == "bf16" else torch.float32
    pair = pair_of(family, settings, dtype)
    engine = engine_of(pair, settings)
    batch, shapes = settings.train.batch_size, SHAPES[settings.train.precision]
    for _ in range(2):
        with engine.accumulating():
            for _ in range(settings.train.accumulation):
                noise = torch.randn(batch, *shapes.latent)
                student, teacher = ([{"text": torch.randn(shape["text"])} for _ in range(batch)]
                                    for shape in (shapes.student, shapes.teacher))
                forward = pair.open(student, teacher, noise.shape)  # type: ignore[arg-type]
                inputs = StepInputs(noise, [0.0, 0.5, 1.0], forward, scale=1 / settings.train.accumulation)
                make_objective(settings.method).accumulate(inputs, engine.backward)
                del forward, inputs
        engine.step(1e-4)
    peak = resident("VmHWM") - before
    engine.close()
    return peak


def rank_of(environment: dict[str, str], ranks: int, folder: Path) -> None:
    """One rank: measures all cases for so many."""
    from dopsd_fast.distributed.process_group import init_distributed

    os.environ.update(environment)
    rank = init_distributed().rank
    for case in WARM:  # pages of the libraries are not in a fork's memory until it touches them
        measured_peak(case, 1)
    peaks = {name: measured_peak(case, LAYERS) for name, case in CASES[ranks].items()}
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps(peaks))
    torch.distributed.destroy_process_group()


def main(folder: Path) -> int:
    """Every rank is a fork of this process, which has the libraries loaded. The number of ranks that failed."""
    for library in ("deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2", "peft"):
        importlib.import_module(library)
    from bench.processes import free_port, rank_environment
    from dopsd_fast.distributed.process_group import init_distributed
    from tests.zygote import leave_group

    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    os.environ.update(rank_environment(0, 1, free_port()))
    init_distributed()
    for case in WARM:
        measured_peak(case, 1)
    leave_group()
    gc.collect()
    gc.freeze()  # ZeRO-3 collects garbage at every start
    failed, forked = 0, multiprocessing.get_context("fork")
    for ranks in CASES:
        port = free_port()
        given = [(rank_environment(rank, ranks, port), ranks, folder) for rank in range(ranks)]
        children = [forked.Process(target=rank_of, args=one, daemon=True) for one in given]
        for child in children:
            child.start()
        for child in children:
            child.join(600)
        failed += sum(child.exitcode != 0 for child in children)
    return failed


@pytest.fixture(scope="session")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], int]:
    """(ranks, case) -> the highest peak of a rank."""
    folder = tmp_path_factory.mktemp("plan")
    # Freed tensors leave the resident set only where malloc has mapped each of its own.
    environment = os.environ | {
        "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[tuple[int, str], int] = {}
    for ranks, cases in CASES.items():
        by_rank = [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
        found |= {(ranks, name): max(peaks[name] for peaks in by_rank) for name in cases}
    return found


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, cases in CASES.items() for name in cases])
def test_estimate_is_within_a_tenth_of_the_measured_peak(ranks: int, name: str, peaks: dict[tuple[int, str], int]) -> None:
    """A tenth is what is promised. What may differ: pages that malloc keeps, padding to pages, and scratch of the matrix
    library, some 10 MB against 250 MB or more."""
    machine = Machine(ranks, ranks, None, None, "cpu")
    settings = settings_of(CASES[ranks][name])
    found = planner.make_plan(settings, machine, RandomZImage(), SHAPES[settings.train.precision])
    estimate, measured_bytes = found.device_peak - PROCESS, peaks[ranks, name]
    assert abs(estimate / measured_bytes - 1) <= 0.1, f"{estimate / 1e6:.0f} MB planned, {measured_bytes / 1e6:.0f} MB measured"


# ---- the tracker -----------------------------------------------------------------------------------------------------------


def test_live_bytes_are_those_of_living_storages() -> None:
    before = torch.empty(1000, device="meta")
    live = LiveBytes()
    with live:
        a = before + 1
        view = a[10:]
        b = before * 2
        assert (live.live, live.peak) == (8000, 8000)
        del a
        assert live.live == 8000  # a view keeps its storage
        del view, b
        assert (live.live, live.peak) == (0, 8000)
        before.add_(1)
    assert (live.live, live.peak) == (0, 8000)


def test_activations_of_full_size_are_those_counted_by_hand() -> None:
    """recompute keeps x and h of each block: 30 + 2 blocks, bf16, 4096 image tokens, in `layers` with 512 text tokens."""
    from dopsd_fast.memory.activations import largest_shapes, measure

    settings = load_settings(["zimage_turbo_full", "train.accumulation=1"])
    family = published_family("zimage", settings.conditioning)
    shapes = largest_shapes(family, settings.data.resolution)
    assert shapes.latent == (16, 128, 128) and shapes.student == {"text": (512, 2560)}
    assert shapes.teacher == {"text": (992, 2560)}  # 1024 asked for, 992 are the most that the model takes
    found = measure(family, settings, shapes, None)
    by_hand = 2 * 2 * 3840 * (30 * 4608 + 2 * 4096 + 2 * 512)
    # Beside it: the joined tokens, what the exit reads, rotations and text; less than four tensors of all tokens.
    assert by_hand <= found.kept <= by_hand + 4 * 2 * 3840 * 4608
    assert found.gradients == 4 * PARAMETERS


# ---- full size -------------------------------------------------------------------------------------------------------------


@functools.cache
def planned(words: str, gpus: int, memory: float, host: float | None = None, nodes: int = 1) -> planner.Plan:
    machine = Machine(gpus * nodes, gpus, int(memory * 1e9), None if host is None else int(host * 1e9), "cuda")
    return planner.make_plan(load_settings(words.split()), machine)


def test_full_size_on_one_141_gb_gpu() -> None:
    low = planned("zimage_turbo_full_h200", 1, 141)
    assert low.parameters == low.trained_parameters == PARAMETERS
    assert low.fits and low.advice == "" and low.gathers_per_step == 0
    # weights twice, masters and average 16 bits each, two moments, gradients
    assert low.device_peak > (4 + 4 + 8 + 4) * PARAMETERS
    high = planned("zimage_turbo_full_h200 train.masters=fp32", 1, 141)
    assert not high.fits and high.device_peak - low.device_peak == 4 * PARAMETERS
    assert high.advice.startswith("it would with train.masters=low_bits")


def test_full_size_on_one_80_gb_gpu_with_the_optimizer_in_cpu_memory() -> None:
    offloaded = planned("zimage_turbo_full_h100", 1, 80, 137)
    assert offloaded.fits
    assert 20 * PARAMETERS < offloaded.host_peak < 137e9
    less = replace(offloaded, machine=replace(offloaded.machine, host_bytes=int(offloaded.host_peak) - 1))
    assert not less.fits


def test_full_size_on_8_gpus() -> None:
    found = planned("zimage_turbo_full", 8, 80)
    assert found.fits and found.gather == "step" and found.gathers_per_step == 1
    assert found.gathered_bytes == 2 * 2 * PARAMETERS * 7 // 8
    assert found.reduced_bytes == 4 * PARAMETERS * 7 // 8
    less = planned("zimage_turbo_full", 8, 60)
    assert less.fits and less.gather == "sweep" and 1.95 < less.gathers_per_step <= 2
    assert planned("zimage_turbo_full adapter.kind=lora", 8, 80).gathers_per_step == 0


@pytest.mark.parametrize("gather", ["auto", "step", "sweep", "unit"])
def test_more_gpus_never_need_more_memory(gather: str) -> None:
    sizes = [planned(f"zimage_turbo_full deepspeed.gather={gather}", gpus, 1000).device_peak for gpus in (2, 3, 4, 8, 64)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


@pytest.mark.parametrize(
    ("words", "gpus", "memory", "host"),
    [
        ("zimage_turbo_full deepspeed.stage=2", 8, 60, None),
        ("zimage_turbo_full", 1, 80, None),
        ("zimage_turbo_lora train.batch_size=4", 1, 40, None),
        ("zimage_turbo_full deepspeed.gather=step train.activations=keep", 8, 72, None),
    ],
)
def test_advice_is_true(words: str, gpus: int, memory: float, host: float | None) -> None:
    refused = planned(words, gpus, memory, host)
    assert not refused.fits and refused.advice.startswith("it would with ")
    changes = refused.advice.removeprefix("it would with ")
    assert planned(f"{words} {changes}", gpus, memory, host).fits, changes
    assert refused.table()[-1].endswith(refused.advice)


def test_advice_keeps_the_samples_of_a_step() -> None:
    settings = load_settings(["zimage_turbo_lora", "train.batch_size=4", "train.accumulation=3"])
    words = next(words for words in planner._changes(settings, Machine(1, 1, 1, None, "cuda")) if "train.batch_size=1" in words)
    smaller = planner.changed(settings, words)
    assert smaller.train.batch_size * smaller.train.accumulation == 12


def test_the_memory_of_a_node_is_shared_by_its_ranks() -> None:
    """Offloaded to CPU memory, 8 ranks of one node need 8 times what one of them needs."""
    words = "zimage_turbo_full deepspeed.config.zero_optimization.offload_optimizer.device=cpu"
    alone = planned(words, 8, 1000).host_peak / 1e9
    assert planned(words, 8, 1000, 8.01 * alone).fits and not planned(words, 8, 1000, 7.9 * alone).fits


def test_a_trace_belongs_to_its_method() -> None:
    """What is traced once is asked for again, but not for another number of graphs."""
    one = planned("zimage_turbo_lora", 1, 1000).device_peak
    assert planned("zimage_turbo_lora method.backward=k_graphs", 1, 1000).device_peak > one
    assert planned("zimage_turbo_lora", 1, 1000).device_peak == one


def test_advice_names_the_number_of_gpus_where_no_setting_helps() -> None:
    refused = planned("zimage_turbo_full adapter.kind=lora", 1, 10)
    assert not refused.fits and "no setting is enough on 1" in refused.advice


def test_settings_that_contradict_each_other_are_refused() -> None:
    settings = load_settings(["zimage_turbo_full"])
    settings.train.masters = "low_bits"
    with pytest.raises(UserError, match=r"train\.masters=low_bits needs deepspeed\.stage=0"):
        planner.make_plan(settings, Machine(8, 8, 80 * 10**9, None, "cuda"))


def test_shares_are_padded_tensor_by_tensor() -> None:
    assert shard([10, 3], 4) == 3 + 1


def test_the_machine_here() -> None:
    here = Machine.here(2, 2, torch.device("cpu"))
    assert here.kind == "cpu" and here.device_bytes is None and here.host_bytes is not None and here.host_bytes > 1 << 28


@pytest.mark.parametrize(("limit", "expected"), [("1000000", 1_000_000), ("max", None), (str(1 << 62), None)])
def test_a_containers_limit_counts_where_it_is_the_smaller(limit: str, expected: int | None, monkeypatch) -> None:
    total = psutil.virtual_memory().total
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "memory.max")
    monkeypatch.setattr(Path, "read_text", lambda path: limit + "\n")
    assert ledger._host_memory() == (expected or total)


# ---- the command -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.toml")))
@pytest.mark.parametrize(("memory", "code"), [("1000", 0), ("1.1", 1)])
def test_command_on_every_recipe(recipe: str, memory: str, code: int, capsys: pytest.CaptureFixture[str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner.Planner, "advice", lambda planner, settings: "ADVICE")  # its search is tested above
    assert plan.main([recipe, "--gpus", "8", "--memory", memory]) == code
    out, err = capsys.readouterr()
    assert err == "" and "GB = 1e9 bytes" in out
    assert ("\nfits (" in out) == (code == 0) and out.endswith("ADVICE\n") == (code == 1)
    for kind in ("weights", "moments", "EMA", "gradients", "peak"):
        assert f"\n  {kind} " in out
    assert ("published" in out) == (not load_settings([recipe]).model.folder.is_dir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("nano_full --gpus 0 --memory 80", "--gpus: invalid whole number of at least 1 value: '0'"),
        ("nano_full --gpus 8 --memory -1", "--memory"),
        ("nano_full --gpus 8 --memory nan", "--memory: invalid positive number value: 'nan'"),
        ("nano_full --gpus 8", "--memory"),
        ("nano_full --memory 8", "--gpus"),
        ("no_such_recipe --gpus 8 --memory 80", "unknown recipe no_such_recipe"),
        ("nano_full --gpus 8 --memory 80 train.batch=3", "unknown setting train.batch"),
        ("nano_full --gpus 8 --memory 80 --fast", "--fast"),
        ("nano_full --gpus 8 --memory 80 model.path=nowhere", "nowhere: no such folder"),
        ("zimage_turbo_full --gpus 8 --memory 80 data.resolution=16384", "the model's rotary tables end at"),
    ],
)
def test_command_with_bad_arguments(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
