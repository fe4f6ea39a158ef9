"""What the benchmark measures, and what it says of the machine."""

import pytest
import torch

from bench import machine
from bench.models import Model
from bench.references.reference_eager import Condition, predict_noise_direction
from dopsd_fast.errors import UserError
from tests import tiny

CPU = torch.device("cpu")


def test_random_weights_are_the_same_every_time_and_nowhere_zero():
    model = Model("zimage-small", CPU)
    one, two = (dict(model.transformer().named_parameters()) for _ in range(2))
    assert all(torch.equal(two[name], value) for name, value in one.items())
    assert all((value != 0).float().mean() > 0.99 for value in one.values())
    assert {value.dtype for value in one.values()} == {torch.float32} and all(value.requires_grad for value in one.values())


def test_the_small_model_is_the_published_one_but_for_its_size():
    from diffusers import ZImageTransformer2DModel

    model, published = Model("zimage-small", CPU), ZImageTransformer2DModel
    with torch.device("meta"):
        full = dict(published().config)
    differs = {name for name, value in model.config.items() if not name.startswith("_") and full[name] != value}
    assert differs == {"dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "cap_feat_dim", "axes_dims", "axes_lens"}
    ours, theirs = ({name.replace(".1.", ".0.") for name, _ in m.named_parameters()}
                    for m in (model.transformer(), model.family.meta_transformer()))
    assert ours == theirs


@pytest.mark.parametrize("name", ["nano", "zimage-small", "tiny"])
def test_a_model_computes_what_depends_on_all_that_it_is_given(name):
    model = Model(str(tiny.shared("zimage")) if name == "tiny" else name, CPU)
    s = model.standard
    noise, texts = model.noise(2, s.pixels), model.features(2, s.text_tokens, 1)
    assert noise.shape[1:] == model.family.latent_shape(s.pixels, s.pixels)
    assert [text.shape[0] for text in texts] == [s.text_tokens] * 2 and not torch.equal(*texts)
    transformer = model.transformer()
    with torch.no_grad():
        velocity = predict_noise_direction(transformer, noise, 0.5, [Condition(text) for text in texts])
        other = predict_noise_direction(transformer, noise, 0.5, [Condition(text) for text in texts[::-1]])
    assert velocity.isfinite().all() and 0.05 < velocity.std() < 20
    assert (velocity - other).norm() > 1e-3 * velocity.norm()
    grid = model.grid(4, s.pixels)
    assert grid[0] == 0 and grid[-1] == 1 and len(grid) == 5 and grid == sorted(grid)


def test_names_of_cases():
    assert Model("nano", CPU).suffix == "" == Model(str(Model("nano", CPU).folder), CPU).suffix
    assert Model("zimage-small", CPU).suffix == "@zimage-small" and Model("zimage-small", CPU).folder is None
    assert Model(str(tiny.shared("zimage")), CPU).suffix == "@zimage"


@pytest.mark.parametrize(("name", "said"), [
    ("zimage-turbo", "--model zimage-turbo computes for hours on a CPU"),
    ("/no/such/folder", "no such folder"),
    ("flux", "no such folder"),
])
def test_a_model_that_cannot_be_measured(name, said):
    with pytest.raises(UserError, match=said):
        Model(name, CPU)


def test_another_family_is_named():
    with pytest.raises(UserError, match="it is flux2_klein"):
        Model(str(tiny.shared("flux2_klein")), CPU)


def test_ceilings_count_what_is_read_and_written(monkeypatch):
    """A copy of n bytes moves 2 n; a product of two [s, s] matrices is 2 s^3 operations. The best round counts."""
    seen = {}

    def interleaved(calls, rounds, warmup, device, clock):
        for call in calls.values():
            call()
        seen["target"], seen["out"] = calls["copy"].func.__self__, calls["gemm"].keywords["out"]
        return {"copy": [2.0, 1.0, 4.0], "gemm": [0.5, 1.0, 2.0]}

    monkeypatch.setattr(machine, "interleaved", interleaved)
    machine.ceilings.cache_clear()
    found = machine.ceilings(CPU, torch.float32, quick=True)
    machine.ceilings.cache_clear()
    assert found.bytes_per_second == 2 * seen["target"].nbytes
    assert found.flops_per_second == 2 * len(seen["out"]) ** 3 / 0.5
    assert (seen["target"] == 1).all()
