"""The encoders with random weights, and the suite that measures what caching contexts saves."""

import math
from types import SimpleNamespace

import pytest
import torch

from bench.models import Model
from bench.references import random_encoders
from bench.references.random_encoders import RandomEncoders
from bench.results import Options, merged
from bench.suites import conditioning
from dopsd_fast.conditioning.cache import ContextCache
from tests import tiny

CPU = torch.device("cpu")


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def encoders():
    return RandomEncoders(Model("zimage-small", CPU))


# ---- random encoders -------------------------------------------------------------------------------------------------


def test_the_published_encoders_have_the_published_sizes():
    text = random_encoders.text_encoder(2560, True, "meta", torch.bfloat16)
    vlm = random_encoders.vision_language_model(2560, True, "meta", torch.bfloat16)
    assert parameters(text) == 4_022_468_096
    assert parameters(vlm) == 4_437_815_808
    assert parameters(vlm.model.visual) == 4_437_815_808 - 4_022_468_096  # the language part is Qwen3-4B's shape
    assert {p.dtype for part in (text, vlm) for p in part.parameters()} == {torch.bfloat16}
    assert vlm.config.text_config.hidden_size == vlm.config.vision_config.out_hidden_size == 2560


def test_a_picture_of_the_published_size(monkeypatch):
    """768x768 pixels in 16x16 patches, of which 2x2 make a token; 192 of 768 tokens are left for text."""
    built = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)))
    monkeypatch.setattr(random_encoders, "text_encoder", lambda *_: built)
    monkeypatch.setattr(random_encoders, "vision_language_model", lambda *_: built)
    monkeypatch.setattr(random_encoders, "draw_weights", lambda *_: None)
    standard = SimpleNamespace(text_tokens=256, teacher_tokens=768)
    model = SimpleNamespace(device=CPU, dtype=torch.bfloat16, standard=standard, config={"cap_feat_dim": 2560, "dim": 3840})
    large = RandomEncoders(model)
    assert large.image_tokens == 576 and large.image_grid.tolist() == [[1, 48, 48]]


def test_contexts_have_the_standard_lengths_and_are_the_prompts_own(encoders):
    student, teacher = encoders.student(["a", "b"]), encoders.teacher(["a", "b"], [None, None])
    assert [tuple(one.text.shape) for one in student] == [(20, 64)] * 2
    assert [tuple(one.text.shape) for one in teacher] == [(80, 64)] * 2
    for conditions, alone in ((student, encoders.student(["b"])), (teacher, encoders.teacher(["b"], [None]))):
        assert not torch.allclose(conditions[0].text, conditions[1].text, atol=0.1)
        torch.testing.assert_close(conditions[1].text, alone[0].text, rtol=1e-4, atol=1e-4)
    again = RandomEncoders(Model("zimage-small", CPU)).student(["a", "b"])
    assert all(torch.equal(x.text, y.text) for x, y in zip(student, again))


def test_padding_and_picture_take_part(encoders, monkeypatch):
    """The student's padding costs but does not count; the teacher's picture does."""
    seen = []
    encoders.text_encoder.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    short, long = encoders.student(["a"], 64), encoders.student(["a"], 512)
    assert seen == [(1, 64), (1, 512)]
    torch.testing.assert_close(short[0].text, long[0].text, rtol=1e-4, atol=1e-4)
    before = encoders.teacher(["a"], [None])[0].text
    pixels = encoders._pixels("a")
    assert pixels.shape == (4 * encoders.image_tokens, 3 * 2 * 16 * 16) and pixels.abs().max() <= 1
    monkeypatch.setattr(encoders, "_pixels", lambda _: -pixels)
    after = encoders.teacher(["a"], [None])[0].text
    first = random_encoders.OPENING
    assert torch.equal(before[:first], after[:first])  # what comes before the picture does not see it
    assert (before[first:] - after[first:]).norm() > 1e-2 * before[first:].norm()


# ---- the suite -------------------------------------------------------------------------------------------------------


def test_break_even():
    assert conditioning.break_even(10.0, 3.0, 1.0) == 5.0
    assert conditioning.break_even(10.0, 3.0, 3.0) == math.inf


def test_differences():
    one, other = [{"text": torch.tensor([[3.0, 4.0]])}], [{"text": torch.tensor([[3.0, 4.5]])}]
    assert conditioning.difference(one, one) == 0 and conditioning.difference(other, one) == 0.5
    with pytest.raises(ValueError, match="dtype"):
        conditioning.difference([{"text": one[0]["text"].double()}], one)


def measured(name: str) -> dict:
    rows = merged(conditioning.measure(Options(name, CPU, quick=True, threads=1)))
    assert {row.suite for row in rows} == {"conditioning"}
    return {row.key[1:]: row for row in rows}


@pytest.mark.parametrize("name", ["zimage-small", "folder"])
def test_the_rows_of_conditioning(name):
    found = measured(str(tiny.shared("zimage")) if name == "folder" else name)
    case = "contexts@zimage" if name == "folder" else "contexts@zimage-small"
    assert all(row.status == "ok" for row in found.values()), [row for row in found.values() if row.status != "ok"]
    for variant in ("every_step", "memory", "disk", "R1"):
        assert found[case, variant, "seconds_per_batch"].value > 0
    for variant in ("memory", "disk"):
        assert found[case, variant, "difference_from_encoders"].value == 0
        assert found[case.replace("contexts", "contexts/every_step"), variant, "speedup"].value > 0
        assert found[case, variant, "break_even_steps"].value > 0 and found[case, variant, "seconds_to_build"].value > 0
    stored = found[case, "memory", "bytes_per_record"].value
    assert stored < found[case, "disk", "bytes_per_record"].value < 2 * stored + 4096
    if name == "zimage-small":
        assert stored == (20 + 80) * 64 * 4
        modules = RandomEncoders(Model(name, CPU)).modules()
        assert found[case, "every_step", "encoder_bytes"].value == 4 * sum(map(parameters, modules))
    else:  # ours shares the language weights and holds no language head
        assert found[case, "every_step", "encoder_bytes"].value < found[case, "R1", "encoder_bytes"].value


def test_a_cache_that_returns_something_else_is_seen(monkeypatch):
    get = ContextCache.get

    def rounded(self, key):
        return {name: t.bfloat16().to(t.dtype) if self.policy == "disk" else t for name, t in get(self, key).items()}

    monkeypatch.setattr(ContextCache, "get", rounded)
    found = measured("zimage-small")
    assert found["contexts@zimage-small", "memory", "difference_from_encoders"].value == 0
    assert found["contexts@zimage-small", "disk", "difference_from_encoders"].value > 1e-4


def test_what_cannot_be_measured_is_said(monkeypatch):
    def broken(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(conditioning, "published", broken)
    found = measured(str(tiny.shared("zimage")))
    lost = {key[1:]: row.note for key, row in found.items() if row.status == "failed"}
    assert lost == {("R1", "seconds_per_batch"): "RuntimeError: no room"}
