"""What a run tells a person: labels of pictures, what was left out for want of memory, hints to sample by, how far the average
has gone, what an adapter covers, and where the program does not run at all."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw
from safetensors.torch import load_file

from dopsd_fast import convert
from dopsd_fast.conditioning.cache import ContextCache
from dopsd_fast.data import contact_sheet
from dopsd_fast.errors import UserError
from dopsd_fast.families.published import published_family
from dopsd_fast.families.registry import open_family
from dopsd_fast.pair.lora import coverage_by_kind
from dopsd_fast.run import verify_export
from dopsd_fast.run.pictures import Showcase, Shown
from dopsd_fast.settings.schema import ConditioningSettings
from dopsd_kernels.adamw_ema_triton import join, split, untie_
from tests import tiny
from tests.driving import ROOT, data, start, words

CONDITIONING = ConditioningSettings(max_text_tokens=32, max_vlm_tokens=64)


# ---- labels ----------------------------------------------------------------------------------------------------------


def fitted(text, width=400):
    draw = ImageDraw.Draw(Image.new("RGB", (width, 30)))
    label = contact_sheet._fit(draw, text, width)
    assert draw.textlength(label) <= width
    return draw, label


@pytest.mark.parametrize("gap", ["\n\n", "\t", "\r\n", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x00", " \n \t "])
def test_a_label_is_one_line(gap):
    assert fitted(f"a red ball{gap}on a table")[1] == "a red ball on a table"


def test_a_label_is_the_longest_beginning_that_fits():
    for text in ("a red ball, " * 1000, "W" * 3000, "i" * 3000):
        draw, label = fitted(text)
        kept = label.removesuffix("...")
        assert label.endswith("...") and text.startswith(kept) and kept
        longer = text[: len(kept) + 3].rstrip()
        assert draw.textlength(f"{longer}...") > 400
    assert fitted("short")[1] == "short" and fitted("")[1] == ""


def test_shortening_measures_few_pieces(monkeypatch):
    """The work grows with the logarithm of the caption's length, and no piece is much longer than the label."""
    draw = ImageDraw.Draw(Image.new("RGB", (400, 30)))
    measured = []
    length = draw.textlength
    monkeypatch.setattr(draw, "textlength", lambda text: measured.append(len(text)) or length(text))
    contact_sheet._fit(draw, "a red ball " * 100_000, 400)
    assert len(measured) <= 12 and max(measured) <= 403


def test_a_grid_of_captions_of_several_paragraphs():
    plain, broken = (contact_sheet.compose(["target"], [(text, [Image.new("RGB", (8, 8))])]) for text in ("a b", "a\n\n\tb"))
    assert ImageChops.difference(plain, broken).getbbox() is None


# ---- out of memory ---------------------------------------------------------------------------------------------------

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 B"),
    RuntimeError("cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


def showcase(tmp_path, decode, latent=lambda *given: torch.zeros(1), stage=2):
    said = []
    made = object.__new__(Showcase)
    made.parts = SimpleNamespace(
        family=SimpleNamespace(decode=decode), engine=SimpleNamespace(stage=stage), device=torch.device("cpu"), rank=0,
        say=said.append, record=lambda index: None,
    )
    made.folder, made.last, made.lost, made.vae, made.latent = tmp_path, None, [], object(), latent
    made.rows = [Shown(f"prompt {i}", None, 8, 8) for i in range(3)]
    return made, said


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_a_picture_that_does_not_fit_is_left_out_with_one_line(tmp_path, error):
    calls = []

    def decode(vae, latent):
        calls.append(latent)
        if len(calls) == 2:
            raise error
        return [Image.new("RGB", (8, 8), "red")]

    made, said = showcase(tmp_path, decode)
    made.start(0)
    assert sorted(file.name for file in (tmp_path / "before").iterdir()) == ["00.png", "02.png"]
    assert len(said) == 1 and said[0].startswith("samples of the start: 1 of 3 did not fit the memory") and "\n" not in said[0]
    calls.clear()
    made.draw(7)
    assert len(said) == 2 and said[1].startswith("samples of step 7: 1 of 6 did not fit")
    assert (tmp_path / "step-000007.png").is_file() and len(calls) == 6
    made.draw(8)
    assert len(said) == 2


def test_what_cannot_be_left_out_is_an_error(tmp_path):
    def fail(error):
        def call(*given):
            raise error

        return call

    for stage, error in ((2, ValueError("no shortage")), (2, RuntimeError("shapes differ"))):
        with pytest.raises(type(error), match=str(error)):
            showcase(tmp_path, fail(error), stage=stage)[0].draw(1)
    sharded, _ = showcase(tmp_path, lambda *given: [], fail(SHORTAGES[0]), stage=3)
    with pytest.raises(UserError, match="out of memory while drawing a sample.*sample.every=0"):
        sharded.draw(1)
    decoding, said = showcase(tmp_path, fail(SHORTAGES[0]), stage=3)
    decoding.draw(1)
    assert len(said) == 1


# ---- the end of a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, height, width", [("zimage", 16, 24), ("flux2_klein", 32, 48)])
def test_the_hint_samples_on_the_grid_of_the_run(tmp_path, kind, height, width):
    """klein's shift follows num_inference_steps even where sigmas are given: without it, another grid."""
    family = open_family(tiny.shared(kind), CONDITIONING)
    shutil.copytree(tiny.shared(kind), tmp_path / "export")
    trainer = SimpleNamespace(
        family=family, folder=tmp_path, pair=SimpleNamespace(lora_config=None), dtype=torch.float32,
        settings=SimpleNamespace(sample=SimpleNamespace(steps=0)),
        data=SimpleNamespace(records=[Shown("", None, height, width)]),
    )
    lines = verify_export._how_to_sample(trainer)
    steps = family.deployment_steps
    assert f"num_inference_steps={steps}, sigmas=" in lines[-1]
    found = {}
    exec("\n".join(line.strip() for line in lines[1:]), found)
    grid = [1.0 - float(sigma) for sigma in found["pipe"].scheduler.sigmas]
    assert grid == pytest.approx(family.sample_grid(0, family.latent_shape(height, width)), abs=1e-6)


def test_the_coverage_of_an_adapter_by_kind():
    for name, expected in (
        ("zimage", {"attention": (136, 136), "feed-forward": (102, 102)}),
        ("flux2_klein", {"single-stream (attention and feed-forward in one)": (40, 40), "attention": (40, 40),
                         "feed-forward": (20, 20)}),
    ):
        family = published_family(name, CONDITIONING)
        model = family.meta_transformer()
        assert coverage_by_kind(model, family.lora_targets, family.lora_kinds) == expected
    published_attention_only = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj",
                                                            "add_v_proj", "to_add_out")]
    found = coverage_by_kind(model, published_attention_only, family.lora_kinds)
    assert [adapted for adapted, _ in found.values()] == [0, 40, 0]
    with_others = coverage_by_kind(model, ["proj_out"], family.lora_kinds)
    assert with_others["other"][0] == 1 and with_others["attention"] == (0, 40)


def test_the_lines_of_a_run(tmp_path):
    """Coverage by kind on the first screen, a bar while contexts are computed, how far the EMA has gone; with masters as low
    bits, the export draws the live model's picture."""
    settings = dict(adapter__kind="lora", train__precision="bf16", train__masters="low_bits", deepspeed__stage=0,
                    deepspeed__config__steps_per_print=5,
                    data__path=str(data()), train__steps=2, teacher__ema_decay=0.75, checkpoint__every=0)
    job = start(words(**settings, output__dir=str(tmp_path / "run"))).succeed()
    assert "left out  deepspeed.config: ZeRO stage 0 runs without DeepSpeed" in job.out
    layers = 4  # 2 main ones and one refiner of each kind
    assert f"on attention {4 * layers} of {4 * layers}, feed-forward {3 * layers} of {3 * layers}" in job.out
    assert re.search(r"conditioning: 100%.*\b(\d+)/\1\b", job.err)
    assert "has gone 43.8 % of the way from the start to the student: 1 - 0.75^2" in job.out
    tensors = load_file(tmp_path / "run" / "export" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".lora_B." in name)
    config = json.loads((tmp_path / "run" / "export" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]


def test_every_computed_context_moves_the_bar(tmp_path):
    family = open_family(tiny.shared("zimage"), CONDITIONING)
    seen = []

    def progress(keys):
        seen.append(len(keys))
        yield from keys

    cache = ContextCache("memory", None, family, progress=progress)
    keys = [cache.request("student", prompt) for prompt in ("a", "b", "c")]
    assert cache.complete(keys) == 3 and seen == [3]
    assert cache.complete(keys) == 0 and seen == [3]  # nothing to wait for, no bar


# ---- masters as low bits ---------------------------------------------------------------------------------------------


def ties(live):
    """The fp32 masters of bf16 `live` in the middle between it and its neighbour towards 0: kept as the low bits -32768."""
    masters = join(live, torch.full(live.shape, -32768, dtype=torch.int16))
    assert torch.equal(split(masters)[0], live)
    return masters


def test_an_untied_number_rounds_to_the_live_one():
    live = torch.linspace(-3, 3, 4001).bfloat16()
    live = live[live != 0]
    masters = ties(live)
    assert 0.3 < (masters.bfloat16() != live).float().mean() < 0.7  # every second tie rounds away from what is live
    untied = untie_(masters.clone())
    for stored in (torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(untied.to(stored).bfloat16(), live)
    assert not torch.equal(untied.half().bfloat16(), live)  # which rounds back to the middle
    moved = untied != masters
    assert torch.equal(moved, masters.bfloat16() != live)
    assert ((untied - masters).abs() <= masters.abs() * 2**-22).all()
    others = torch.randn(10_000)
    others = others[(others.view(torch.int32) & 0xFFFF) != 0x8000]
    assert torch.equal(untie_(others.clone()), others)


def test_the_export_of_low_bits_is_the_live_weight(tmp_path):
    family = open_family(tiny.make_zimage(tmp_path / "source", dtype=torch.bfloat16), CONDITIONING)
    live = {name: tensor for name, tensor in family.load_transformer(torch.bfloat16).state_dict().items()}
    masters = {name: torch.where(tensor != 0, ties(tensor), tensor.float()) for name, tensor in live.items()}

    def agree(problem=""):
        assert not problem

    trainer = SimpleNamespace(
        engine=SimpleNamespace(full_tensors=lambda branch: ((name, tensor.clone()) for name, tensor in masters.items())),
        settings=SimpleNamespace(train=SimpleNamespace(masters="low_bits")), pair=SimpleNamespace(lora_config=None), rank=0,
        family=family, consensus=SimpleNamespace(agree=agree),
    )
    out = tmp_path / "export"
    verify_export._export(trainer, "student", out)
    verify_export._check_weights(trainer, "student", out)
    stored = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in live.items())

    name = max(live, key=lambda one: live[one].numel())
    shapes = {name: list(live[name].shape)}
    plan = convert._FullExport(lambda *given: masters[name].flatten().clone(), shapes, family.path, True, family, None)
    ((_, converted),) = plan.tensors("master")
    assert torch.equal(converted.bfloat16(), live[name])


# ---- native Windows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["train", "convert"])
def test_native_windows_gets_one_line(module, tmp_path):
    """Without the modules that Python has on POSIX alone."""
    script = tmp_path / "windows.py"
    script.write_text(f"""
import runpy, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "dopsd_fast"]:
    del sys.modules[name]  # as at the start of a program
import torch, deepspeed, dopsd_fast.settings
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.platform = "win32"
sys.argv = ["dopsd_fast/{module}.py", "nano_lora"]
runpy.run_path({str(ROOT / "dopsd_fast" / f"{module}.py")!r}, run_name="__main__")
""")
    job = start([], script=script)
    job.fail("Windows", "WSL")
    assert job.codes == [2]
