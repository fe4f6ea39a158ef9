"""Models that are not the few-step ones: said before anything is loaded, and refused unless `model.allow` lets them in."""

import json
import shutil

import pytest
import torch

from dopsd_fast.errors import UserError
from dopsd_fast.families.flux2.family import KV_PIPELINE
from dopsd_fast.families.registry import open_family
from dopsd_fast.memory import planner
from dopsd_fast.settings.load import load_settings
from dopsd_fast.settings.schema import ConditioningSettings
from tests import tiny
from tests.driving import data, start, words

CONDITIONING = ConditioningSettings(max_text_tokens=32, max_vlm_tokens=64)


def variant(folder, kind, file="", changes=None, drop=()):
    """A copy of the tiny pipeline with one of its JSON files changed."""
    shutil.copytree(tiny.shared(kind), folder)
    if file:
        content = json.loads((folder / file).read_text()) | (changes or {})
        (folder / file).write_text(json.dumps({name: value for name, value in content.items() if name not in drop}))
    return folder


SCHEDULER, TRANSFORMER, INDEX = "scheduler/scheduler_config.json", "transformer/config.json", "model_index.json"
DEV = {"num_attention_heads": 48, "attention_head_dim": 128, "num_layers": 8, "num_single_layers": 48,
       "joint_attention_dim": 15360}
KLEIN_4B = DEV | {"num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20, "joint_attention_dim": 7680}
CASES = [
    ("zimage", SCHEDULER, {"shift": 6.0}, (), "base", "shift is 6"),
    ("zimage", SCHEDULER, {"shift": 1.0}, (), "shift", "shift is 1"),
    ("zimage", SCHEDULER, {}, ("shift",), "shift", "shift is 1"),
    ("zimage", SCHEDULER, {"use_dynamic_shifting": True}, (), "shift", "follows the size"),
    ("zimage", TRANSFORMER, {"dim": 3840, "n_layers": 40}, (), "size", "n_layers 40"),
    ("flux2_klein", INDEX, {"is_distilled": False}, (), "base", "is_distilled"),
    ("flux2_klein", INDEX, {}, ("is_distilled",), "base", "is_distilled"),
    ("flux2_klein", INDEX, {"_class_name": KV_PIPELINE}, (), "kv", KV_PIPELINE),
    ("flux2_klein", TRANSFORMER, {"guidance_embeds": True}, (), "guidance", "guidance_embeds"),
    ("flux2_klein", TRANSFORMER, DEV, (), "size", "num_single_layers 48"),
    ("flux2_klein", SCHEDULER, {"use_dynamic_shifting": False, "shift": 2.0}, (), "shift", "fixed at 2"),
    ("flux2_klein", SCHEDULER, {"time_shift_type": "linear"}, (), "shift", "of type linear"),
]


@pytest.mark.parametrize("kind, file, changes, drop, name, said", CASES)
def test_a_variant_is_named_and_can_be_allowed(tmp_path, kind, file, changes, drop, name, said):
    family = open_family(variant(tmp_path / "model", kind, file, changes, drop), CONDITIONING)
    with pytest.raises(UserError) as caught:
        family.check_variant([])
    text = str(caught.value)
    assert said in text and f"model.path={tmp_path / 'model'}" in text and text.endswith(f"model.allow={name}")
    (why,) = family.check_variant([name])
    assert said in why
    with pytest.raises(UserError):
        family.check_variant(["kv" if name != "kv" else "base"])


@pytest.mark.parametrize(
    "kind, file, changes",
    [("zimage", SCHEDULER, {"shift": "6.0"}), ("zimage", SCHEDULER, {"shift": None}), ("zimage", TRANSFORMER, {"dim": None}),
     ("flux2_klein", TRANSFORMER, {"num_attention_heads": "48"}), ("flux2_klein", INDEX, {"is_distilled": "false"})],
)
def test_values_of_another_type_are_one_line(tmp_path, kind, file, changes):
    family = open_family(variant(tmp_path / "model", kind, file, changes), CONDITIONING)
    with pytest.raises(UserError, match="model.path"):
        family.check_variant([])


def test_several_differences_are_told_at_once(tmp_path):
    folder = variant(tmp_path / "model", "flux2_klein", INDEX, {"is_distilled": False})
    config = json.loads((folder / TRANSFORMER).read_text()) | {"guidance_embeds": True}
    (folder / TRANSFORMER).write_text(json.dumps(config))
    family = open_family(folder, CONDITIONING)
    with pytest.raises(UserError) as caught:
        family.check_variant([])
    assert str(caught.value).endswith('model.allow=["base","guidance"]')
    with pytest.raises(UserError) as caught:
        family.check_variant(["base"])
    assert "is_distilled" not in str(caught.value) and str(caught.value).endswith('model.allow=["base","guidance"]')
    assert load_settings(['model.allow=["base","guidance"]']).model.allow == ["base", "guidance"]
    assert len(family.check_variant(["guidance", "base"])) == 2


@pytest.mark.parametrize("kind", ["zimage", "flux2_klein"])
def test_the_deployed_models_and_small_ones_are_no_variants(tmp_path, kind):
    assert open_family(tiny.shared(kind), CONDITIONING).check_variant([]) == []
    turbo = {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "cap_feat_dim": 2560}
    published = turbo if kind == "zimage" else KLEIN_4B
    assert open_family(variant(tmp_path / "model", kind, TRANSFORMER, published), CONDITIONING).check_variant([]) == []


def test_a_transformer_with_a_guidance_embedding_is_called_as_its_pipeline_does(tmp_path):
    """Where it is allowed: klein's pipeline gives no guidance, whatever the transformer could take."""
    plain = open_family(tiny.shared("flux2_klein"), CONDITIONING).load_transformer(torch.float32)
    from diffusers import Flux2Transformer2DModel

    folder = variant(tmp_path / "model", "flux2_klein")
    model = Flux2Transformer2DModel.from_config(dict(plain.config) | {"guidance_embeds": True})
    model.load_state_dict(plain.state_dict(), strict=False)
    model.save_pretrained(folder / "transformer")
    family = open_family(folder, CONDITIONING)
    x = torch.randn(1, *family.latent_shape(16, 16), generator=torch.Generator().manual_seed(0))
    contexts = [{"text": torch.ones(32, 48)}]
    with torch.no_grad():
        found = [family.velocity(m, x, torch.tensor([0.5]), contexts) for m in (family.load_transformer(torch.float32), plain)]
    torch.testing.assert_close(*found)  # to rounding: the weights lie elsewhere in memory


def test_a_run_stops_before_anything_is_read_and_says_what_was_allowed(tmp_path):
    folder = variant(tmp_path / "model", "zimage", SCHEDULER, {"shift": 6.0})
    for weights in folder.rglob("*.safetensors"):  # none of them is looked at
        weights.write_bytes(b"")
    short = dict(model__path=str(folder), data__path=str(tmp_path / "none"), output__dir=str(tmp_path / "run"))
    start(words(**short)).fail("model.path", "base checkpoint", "model.allow=base")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="model.allow=base"):
        planner.find_family(load_settings([f"model.path={folder}"]))

    folder = variant(tmp_path / "again", "zimage", SCHEDULER, {"shift": 6.0})
    settings = dict(model__path=str(folder), data__path=str(data()), train__steps=1, sample__count=0, checkpoint__every=0)
    job = start(words(**settings, output__dir=str(tmp_path / "run"), model__allow=["base"])).succeed()
    assert "allowed  the scheduler's shift is 6" in job.out
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["variants"]
