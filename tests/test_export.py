"""Exports: the pipeline folder with new weights, LoRA for both loaders at alpha = 2 x rank, and what errors leave."""

import errno
import json
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline, ZImageTransformer2DModel
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dopsd_fast.errors import UserError
from dopsd_fast.families.registry import open_family
from dopsd_fast.run import verify_export
from dopsd_fast.settings.schema import ConditioningSettings
from dopsd_fast.storage import atomic, pipeline, safetensors_layout
from dopsd_fast.storage.lora import export_lora
from dopsd_fast.storage.pipeline import export_full
from tests.tiny import make_zimage, shared

CONDITIONING = ConditioningSettings(max_text_tokens=32, max_vlm_tokens=64)
RANK, ALPHA = 4, 8


def files_below(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def weights(family, dtype=torch.float32):
    return family.load_transformer(dtype).state_dict()


def run(family, transformer, seed=0):
    width = {"zimage": 32, "flux2_klein": 48}[family.name]
    x = torch.randn(2, *family.latent_shape(16, 16), generator=torch.Generator().manual_seed(seed))
    text = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return family.velocity(transformer, x, torch.tensor([0.1, 0.6]), [{"text": row} for row in text])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_unchanged_tensors_give_the_same_folder(tmp_path, dtype, sharded):
    source = make_zimage(tmp_path / "source", dtype=dtype)
    if sharded:
        model = ZImageTransformer2DModel.from_pretrained(source / "transformer", torch_dtype=dtype)
        shutil.rmtree(source / "transformer")
        model.save_pretrained(source / "transformer", max_shard_size="200KB")
    family = open_family(source, CONDITIONING)
    tensors = [(name, tensor.float()) for name, tensor in weights(family, dtype).items()]
    export_full(family.path, reversed(tensors), tmp_path / "export")  # any order, fp32 master weights
    before, after = files_below(source), files_below(tmp_path / "export")
    assert before == after
    assert (len([name for name in after if name.startswith("transformer/diffusion")]) > 4) == sharded
    for name in before:
        linked = os.path.samefile(source / name, tmp_path / "export" / name)
        assert linked == (not (name.startswith("transformer/") and name.endswith(".safetensors"))), name


def test_changed_tensors_load_in_the_pipeline(tmp_path):
    family = open_family(shared("zimage"), CONDITIONING)
    trained = {name: tensor + 0.01 for name, tensor in weights(family).items()}
    export_full(family.path, trained.items(), tmp_path / "export")
    pipeline = ZImagePipeline.from_pretrained(tmp_path / "export")
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, trained[name])
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", height=16, width=16, num_inference_steps=1, guidance_scale=0.0).images[0].size == (16, 16)
    assert len(open_family(tmp_path / "export", CONDITIONING).load_encoders().student(["a cat"])) == 1
    assert (tmp_path / "export" / "vlm" / "model.safetensors").is_file()


def test_flux2_folder(tmp_path):
    family = open_family(shared("flux2_klein"), CONDITIONING)
    export_full(family.path, weights(family).items(), tmp_path / "export")
    assert files_below(shared("flux2_klein")) == files_below(tmp_path / "export")
    Flux2KleinPipeline.from_pretrained(tmp_path / "export")


def test_links_through_symbolic_links_and_copies_where_links_fail(tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(shared("zimage"), source)
    blob = tmp_path / "blob"
    (source / "vae" / "config.json").rename(blob)
    (source / "vae" / "config.json").symlink_to(blob)
    family = open_family(source, CONDITIONING)
    export_full(family.path, weights(family).items(), tmp_path / "linked")
    config = tmp_path / "linked" / "vae" / "config.json"
    assert not config.is_symlink() and config.samefile(blob)

    def refuse(*_):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    export_full(family.path, weights(family).items(), tmp_path / "copied")
    assert files_below(tmp_path / "copied") == files_below(tmp_path / "linked")
    assert not (tmp_path / "copied" / "vae" / "config.json").samefile(blob)


def test_weights_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    source, out, synced = open_family(shared("zimage"), CONDITIONING), tmp_path / "export", {}
    monkeypatch.setattr(os, "fsync", lambda handle: synced.update({
        Path(os.readlink(f"/proc/self/fd/{handle}")).name: (os.fstat(handle).st_size, out.exists())}))
    export_full(source.path, weights(source).items(), out)
    assert synced.pop(tmp_path.name)[1]  # the folder that the new name is in comes last
    assert synced == {file.name: (file.stat().st_size, False) for file in pipeline.weight_files(out / "transformer")}


def test_stale_weights_are_not_taken_along(tmp_path):
    source = shutil.copytree(shared("zimage"), tmp_path / "source")
    (source / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"old")
    family = open_family(source, CONDITIONING)
    export_full(family.path, weights(family).items(), tmp_path / "export")
    assert not (tmp_path / "export" / "transformer" / "diffusion_pytorch_model.fp16.safetensors").exists()


@pytest.mark.parametrize("case", ["missing", "unknown", "shape", "twice", "full disk"])
def test_an_error_leaves_the_old_export(tmp_path, monkeypatch, case):
    family = open_family(shared("zimage"), CONDITIONING)
    out = tmp_path / "export"
    export_full(family.path, weights(family).items(), out)
    before = files_below(out)
    pairs = list(weights(family).items())
    if case == "missing":
        pairs.pop()
    elif case == "unknown":
        pairs.append(("layers.9.w", torch.zeros(1)))
    elif case == "shape":
        pairs[0] = (pairs[0][0], torch.zeros(3))
    elif case == "twice":
        pairs.append(pairs[0])
    else:

        def exhausted(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(pipeline, "_write_weights", exhausted)
    with pytest.raises(UserError) as error:
        export_full(family.path, iter(pairs), out)
    assert "\n" not in str(error.value)
    assert files_below(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_killed_swap_is_repaired(tmp_path):
    family = open_family(shared("zimage"), CONDITIONING)
    out = tmp_path / "export"
    export_full(family.path, weights(family).items(), out)
    before = files_below(out)
    out.rename(tmp_path / "export.old")  # what a kill between the two renames leaves
    with pytest.raises(UserError):
        export_full(family.path, iter([]), out)
    assert files_below(out) == before


def test_full_device_is_one_line(tmp_path):
    family = open_family(shared("zimage"), CONDITIONING)
    shard = safetensors_layout.Shard.read(family.path / "transformer" / "diffusion_pytorch_model.safetensors")
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / shard.name).symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        pipeline._write_weights([shard], folder, weights(family).items())
    assert error.value.errno == errno.ENOSPC


def test_one_tensor_in_memory_at_a_time(tmp_path):
    """When the next tensor is asked for, none but the last given one is still alive."""
    family = open_family(shared("zimage"), CONDITIONING)
    shapes = {name: tensor.shape for name, tensor in weights(family).items()}
    given, most = [], []

    def tensors():
        for name, shape in shapes.items():
            most.append(sum(reference() is not None for reference in given))
            tensor = torch.zeros(shape)
            given.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    export_full(family.path, tensors(), tmp_path / "export")
    assert len(given) == len(shapes) and max(most) <= 1


# ---- read back at the end of a run -------------------------------------------------------------------------------------


def finished(family, tensors, rank=0):
    """What verify_export.py asks of a trainer, whose live weights are `tensors`."""

    def agree(problem=""):
        if problem:
            raise UserError(problem)

    engine = SimpleNamespace(full_tensors=lambda branch: iter(tensors), stage=3)
    settings = SimpleNamespace(train=SimpleNamespace(masters="fp32"))
    return SimpleNamespace(engine=engine, pair=SimpleNamespace(lora_config=None), rank=rank, world=2, settings=settings,
                           consensus=SimpleNamespace(agree=agree), family=family,
                           parameters=100, dtype=torch.bfloat16, device=torch.device("cpu"))


def test_every_exported_weight_is_compared_with_the_live_one(tmp_path):
    source = open_family(make_zimage(tmp_path / "source", dtype=torch.bfloat16), CONDITIONING)
    live = {name: tensor + 0.001 for name, tensor in weights(source).items()}  # rounded where they are stored
    out = tmp_path / "export"
    export_full(source.path, live.items(), out)
    verify_export._check_weights(finished(source, live.items()), "student", out)
    name = max(live)
    for value in (live[name] + 0.01 * live[name].abs().max(), -live[name], torch.full_like(live[name], torch.nan)):
        with pytest.raises(UserError, match=f"its {name} is not what was written"):
            verify_export._check_weights(finished(source, (live | {name: value}).items()), "student", out)
    verify_export._check_weights(finished(source, [(name, torch.empty(0))], rank=1), "student", out)
    with pytest.raises(UserError, match="its new.weight cannot be read back"):
        verify_export._check_weights(finished(source, [*live.items(), ("new.weight", torch.zeros(1))]), "student", out)
    file = out / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="was written but cannot be read back"):
        verify_export._check_weights(finished(source, live.items()), "student", out)


def test_a_second_copy_of_the_model_needs_room(monkeypatch):
    trainer = finished(None, [])
    assert verify_export._has_room(trainer)
    trainer.parameters = 10**15
    assert not verify_export._has_room(trainer)  # of main memory
    trainer.parameters, trainer.device = 100, torch.device("cuda")
    assert not verify_export._has_room(trainer)  # sharded over accelerators
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (301, 1000))
    trainer.world = 1
    assert verify_export._has_room(trainer)
    trainer.parameters = 101
    assert not verify_export._has_room(trainer)
    trainer.rank = 1
    assert verify_export._has_room(trainer)  # only rank 0 reads back


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def trained_adapter(kind, adapter="student"):
    """A transformer with a random (as if trained) adapter, its family, its PEFT state and config."""
    family = open_family(shared(kind), CONDITIONING)
    transformer = family.load_transformer(torch.float32)
    targets = list(family.lora_targets)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="gaussian", target_modules=targets)
    inject_adapter_in_model(config, transformer, adapter_name=adapter)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return family, transformer, config


@pytest.fixture(scope="module", params=["zimage", "flux2_klein"])
def lora(request, tmp_path_factory):
    family, transformer, config = trained_adapter(request.param)
    folder = tmp_path_factory.mktemp("lora") / "export"
    export_lora(family.pipeline_class, get_peft_model_state_dict(transformer, adapter_name="student"), config, folder)
    return family, run(family, transformer), folder


def content(folder):
    """Bytes of tensors and metadata; safetensors writes its metadata in no fixed order."""
    found = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            found[file.name] = file.read_text()
            continue
        with safe_open(file, framework="pt") as opened:
            found[file.name] = opened.metadata(), {n: opened.get_tensor(n).tolist() for n in opened.keys()}  # noqa: SIM118
    return found


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def differs(found, expected):
    return (found - expected).abs().max() > 1e-2


def test_lora_files(lora):
    _, _, folder = lora
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, RANK, "LORA")
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
    }


def test_lora_loads_with_peft_model(lora):
    family, expected, folder = lora
    base = family.load_transformer(torch.float32)
    assert differs(run(family, base), expected)
    model = PeftModel.from_pretrained(base, folder)
    close(run(family, model), expected)
    other = PeftModel.from_pretrained(family.load_transformer(torch.float32), folder, adapter_name="x")
    other.load_adapter(folder, "y")
    other.set_adapter("y")
    close(run(family, other), expected)


def test_lora_loads_by_injection(lora):
    family, expected, folder = lora
    transformer = family.load_transformer(torch.float32)
    inject_adapter_in_model(LoraConfig.from_pretrained(folder), transformer)
    state = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    result = set_peft_model_state_dict(transformer, state)
    assert not result.unexpected_keys
    close(run(family, transformer), expected)


def test_lora_loads_with_diffusers(lora):
    family, expected, folder = lora
    pipeline = {"zimage": ZImagePipeline, "flux2_klein": Flux2KleinPipeline}[family.name].from_pretrained(family.path)
    pipeline.load_lora_weights(folder)
    close(run(family, pipeline.transformer), expected)
    adapter = next(iter(pipeline.transformer.peft_config.values()))
    assert (adapter.r, adapter.lora_alpha) == (RANK, RANK)


def plain_reader(transformer, file):
    """W + B A, as a program applies a LoRA that looks at tensors alone: no metadata, no configuration."""
    tensors = load_file(file)
    assert not [name for name in tensors if "alpha" in name]
    weights = dict(transformer.named_parameters())
    for name in [name for name in tensors if ".lora_A." in name]:
        target = name.removeprefix("transformer.").removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        weights[target].data += tensors[name.replace(".lora_A.", ".lora_B.")] @ tensors[name]
    return transformer


def pixels(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    options = {} if type(pipeline).__name__.startswith("ZImage") else {"text_encoder_out_layers": (9, 18, 27)}
    image = pipeline(prompt="a cat", height=32, width=32, num_inference_steps=2, sigmas=[1.0, 0.5], guidance_scale=0.0,
                     max_sequence_length=32, generator=torch.Generator().manual_seed(0), **options).images[0]
    return np.asarray(image, dtype=int)


def test_lora_draws_the_same_picture_in_every_program(lora, tmp_path):
    """diffusers, PEFT and a reader of tensors alone, on pipelines; half the strength, what the last one would make of a scale
    that is kept in metadata, is another picture."""
    family, _, folder = lora
    kind = {"zimage": ZImagePipeline, "flux2_klein": Flux2KleinPipeline}[family.name]

    def pipeline(change=lambda transformer: transformer):
        made = kind.from_pretrained(family.path)
        made.transformer = change(made.transformer)
        return made

    trained = pixels(pipeline(lambda _: trained_adapter(family.name)[1]))
    assert np.abs(pixels(pipeline()) - trained).max() > 8
    with_diffusers = pipeline()
    with_diffusers.load_lora_weights(folder)
    merged = {name: pipeline(lambda transformer, name=name: plain_reader(transformer, folder / name))
              for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")}
    merged["peft"] = pipeline(lambda transformer: PeftModel.from_pretrained(transformer, folder).merge_and_unload())
    for found in (with_diffusers, *merged.values()):
        assert np.abs(pixels(found) - trained).max() <= 1
    halved = {name: tensor / 2 if ".lora_B." in name else tensor
              for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(halved, tmp_path / "half.safetensors")
    half = pipeline(lambda transformer: plain_reader(transformer, tmp_path / "half.safetensors"))
    assert np.abs(pixels(half) - trained).max() > 4


def test_lora_needs_no_metadata(lora, tmp_path):
    """The tensors alone act as they were trained; with the metadata, too."""
    family, expected, folder = lora
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    pipeline = {"zimage": ZImagePipeline, "flux2_klein": Flux2KleinPipeline}[family.name].from_pretrained(family.path)
    pipeline.load_lora_weights(tmp_path)
    close(run(family, pipeline.transformer), expected)
    transformer = family.load_transformer(torch.float32)
    transformer.load_lora_adapter(folder, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
    close(run(family, transformer), expected)


def test_lora_state_with_adapter_names(lora, tmp_path):
    """Names from the module tree (`...lora_A.student.weight`) give the same files; two adapters are refused."""
    family, _, folder = lora
    _, transformer, config = trained_adapter(family.name)
    state = {name: p for name, p in transformer.named_parameters() if "lora_" in name}
    export_lora(family.pipeline_class, state, config, tmp_path / "export")
    assert content(folder) == content(tmp_path / "export")
    doubled = state | {name.replace(".student.", ".teacher."): tensor for name, tensor in state.items()}
    with pytest.raises(ValueError, match="more than one adapter"):
        export_lora(family.pipeline_class, doubled, config, tmp_path / "export")
    assert content(folder) == content(tmp_path / "export")


def test_a_folder_is_on_the_disk_before_it_takes_the_place_of_the_last_one(tmp_path: Path, monkeypatch) -> None:
    """An export or a converted pipeline: its files first, then its name, then the folder around it."""
    order: list[Any] = []
    rename = Path.rename

    def seen(what: Any) -> None:
        order.append((what, sorted(file.name for file in tmp_path.iterdir())))

    monkeypatch.setattr(atomic, "_sync_file_system", lambda folder: seen(("files", (folder / "weights").read_text())))
    monkeypatch.setattr(atomic, "sync_folder", lambda folder: seen(("name", folder)))
    monkeypatch.setattr(Path, "rename", lambda old, new: rename(old, new) and seen(new.name))
    for text in ("one", "two"):
        order.clear()
        with atomic.atomic_folder(tmp_path / "export") as folder:
            (folder / "weights").write_text(text)
    assert order == [
        (("files", "two"), ["export", "export.tmp"]), ("export.old", ["export.old", "export.tmp"]),
        ("export", ["export", "export.old"]), (("name", tmp_path), ["export", "export.old"]),
    ]
    assert (tmp_path / "export" / "weights").read_text() == "two" and not (tmp_path / "export.old").exists()
