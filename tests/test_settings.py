"""Settings: layering, round trip, and one clear line for everything that can be wrong."""

import pytest

from dopsd_fast.errors import UserError
from dopsd_fast.settings.load import RECIPES, help_text, load_settings, wants_help
from dopsd_fast.settings.schema import PACKAGE, Settings
from dopsd_fast.settings.source import fields

RECIPE_NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


def error(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load_settings(list(argv))
    text = str(caught.value)
    assert text and "\n" not in text
    return text


def test_the_recipes_that_the_readme_names():
    promised = {"nano_full", "nano_lora", "zimage_turbo_lora", "zimage_turbo_full", "flux2_klein_4b_lora"}
    assert promised <= set(RECIPE_NAMES)


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_recipes_load_and_survive_the_run_folder(recipe, tmp_path):
    settings = load_settings([recipe])
    assert settings.recipe == recipe
    written = tmp_path / "settings.toml"
    written.write_text(settings.to_toml(), encoding="utf-8")
    assert load_settings([str(written)]) == settings


def test_published_hyper_parameters_of_the_real_recipe():
    s = load_settings(["zimage_turbo_lora"])
    assert (s.adapter.kind, s.adapter.rank, s.adapter.alpha) == ("lora", 64, 128)
    assert (s.train.learning_rate, s.train.steps, s.train.weight_decay, s.train.grad_clip) == (1e-4, 2000, 0.0, 1.0)
    assert (s.method.num_states, s.method.shift, s.method.states) == (4, 0.0, "on_policy")
    assert (s.teacher.kind, s.teacher.ema_decay, s.train.precision) == ("ema", 0.9999, "bf16")
    assert (s.conditioning.min_pixels, s.conditioning.max_pixels) == (512**2, 768**2)
    assert (s.conditioning.max_text_tokens, s.conditioning.max_vlm_tokens) == (512, 1024)


def test_default_recipe_and_the_order_of_layers(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text("[train]\nsteps = 7\nlearning_rate = 1e-3\n")
    assert load_settings([]).recipe == "nano_full"
    s = load_settings([str(own), "train.learning_rate=2e-3", "train.seed=5", "train.seed=6"])
    assert (s.recipe, s.train.steps, s.train.learning_rate, s.train.seed) == ("own", 7, 2e-3, 6)


def test_values_are_toml_or_else_text():
    s = load_settings(
        [
            "output.dir=2024",
            "resume=true",
            'data.path="with space"',
            "data.root=a=b",
            "data.skip_bad=true",
            "adapter.kind=lora",
            'adapter.targets=["to_q", "to_k"]',
            "sample.prompts=[V] in the snow",
            "train.betas=[0.8, 0.95]",
            "train.learning_rate=1",
            "deepspeed.config.zero_optimization.overlap_comm=true",
            "deepspeed.config.comms_logger={enabled = true}",
        ]
    )
    assert (s.output.dir, s.resume, s.data.path, s.data.root) == ("2024", "true", "with space", "a=b")
    assert s.data.skip_bad is True
    assert (s.adapter.targets, s.sample.prompts) == (["to_q", "to_k"], ["[V] in the snow"])
    assert (s.train.betas, s.train.learning_rate) == ((0.8, 0.95), 1.0)
    assert s.deepspeed.config == {"zero_optimization": {"overlap_comm": True}, "comms_logger": {"enabled": True}}


def test_round_trip_of_awkward_values(tmp_path):
    s = load_settings(["train.learning_rate=1.2345678901234567e-5", "deepspeed.config={a = {b = [1, 2.5, \"x\"]}}"])
    s.sample.prompts = ['a "quoted" \\ back\nslash', "[V] 坐在户外 \x7f\t", ""]
    s.output.dir = "C:\\runs\\#1 = 'x'"
    written = tmp_path / "settings.toml"
    written.write_text(s.to_toml(), encoding="utf-8")
    assert load_settings([str(written)]) == s


@pytest.mark.parametrize("extra", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=0"], ["--help"], ["-h"]])
def test_words_that_are_not_settings(extra):
    assert load_settings([*extra, "nano_lora", "train.steps=3"]).train.steps == 3
    assert wants_help(extra) == extra[0].startswith(("--help", "-h"))


def test_nano_lies_in_the_package(tmp_path):
    s = load_settings(["model.path=nano", "data.path=nano/train.jsonl"])
    assert s.model.folder == PACKAGE / "nano" / "pipeline"
    assert s.data.source == PACKAGE / "nano" / "data" / "train.jsonl"
    assert s.vlm_folder == PACKAGE / "nano" / "pipeline" / "vlm"
    s = load_settings([f"model.path={tmp_path}", "data.path=./nano", "conditioning.vlm_path=vlm_elsewhere"])
    assert (s.model.folder, str(s.data.source), str(s.vlm_folder)) == (tmp_path, "nano", "vlm_elsewhere")
    assert str(load_settings(["data.path=nanobots"]).data.source) == "nanobots"


def test_help_names_every_field_with_a_meaning():
    text = help_text()
    for name, field in fields(Settings):
        assert f"  {name} (" in text
        assert field.description, f"{name} has no meaning written down"
    assert all(recipe in text for recipe in RECIPE_NAMES)
    assert max(len(line) for line in text.splitlines()) <= 160


@pytest.mark.parametrize(
    "word, near",
    [
        ("train.stepz=3", "train.steps"),
        ("train.batchsize=3", "train.batch_size"),
        ("steps=3", "train.steps"),
        ("data.resolutoin=32", "data.resolution"),
        ("model.pth=x", "model.path"),
        ("metod.weight=v", "method.weight"),
        ("output.directory=x", "output.dir"),
    ],
)
def test_unknown_field_names_the_nearest(word, near):
    assert f"did you mean {near}?" in error(word)


@pytest.mark.parametrize(
    "word",
    [
        "train.steps=0",
        "train.steps=-5",
        "train.steps=1.5",
        "train.steps=true",
        "train.steps=many",
        "train.steps=",
        "train.batch_size=0",
        "train.accumulation=0",
        "train.learning_rate=-1e-4",
        "train.learning_rate=0",
        "train.learning_rate=nan",
        "train.learning_rate=inf",
        "train.betas=[0.9]",
        "train.betas=[0.9, 1.0]",
        "train.seed=-1",
        "train.precision=fp16",
        "train.activations=yes",
        "method.num_states=0",
        "method.weight=w",
        "method.name=dpo",
        "method.beta=0.0",
        "method.pairs=mine",
        "teacher.ema_dtype=fp16",
        "teacher.ema_decay=1.5",
        "teacher.kind=live",
        "adapter.rank=0",
        "adapter.alpha=0",
        "adapter.targets=[1, 2]",
        "data.resolution=4",
        "data.repeats=0",
        "checkpoint.keep=0",
        "deepspeed.stage=4",
        "deepspeed.config=3",
        "conditioning.cache=ram",
    ],
)
def test_wrong_type_or_out_of_range_names_the_field_and_the_value(word):
    name, _, value = word.partition("=")
    text = error(word)
    assert text.startswith(f"{name} = ") and "command line" in text
    assert value.strip("[]").split(",")[0].replace("1e-4", "0.0001") in text


@pytest.mark.parametrize(
    "words, names",
    [
        ("method.name=sft method.states=off_policy", ("method.name", "method.states")),
        ("method.name=sft method.backward=k_graphs", ("method.name", "method.backward")),
        ("method.name=pso", ("method.name", "teacher.kind")),
        ("method.name=pso teacher.kind=frozen method.backward=k_graphs", ("method.name", "method.backward")),
        ("method.name=pso teacher.kind=frozen method.states=off_policy", ("method.name", "method.states")),
        ("method.targets=teacher", ("method.name", "method.targets")),
        ("method.name=sft method.pairs=offline", ("method.name", "method.pairs")),
        ("method.name=sft method.beta=3.0", ("method.name", "method.beta")),
        ("deepspeed.gather=sweep deepspeed.stage=3 method.name=pso teacher.kind=frozen", ("deepspeed.gather", "method.name")),
        ("train.masters=low_bits train.precision=bf16 deepspeed.stage=0 teacher.ema_dtype=bf16", ("low_bits", "ema_dtype")),
        ("adapter.kind=full adapter.targets=to_q", ("adapter.kind", "adapter.targets")),
        ("conditioning.min_pixels=9 conditioning.max_pixels=4", ("min_pixels", "max_pixels")),
        ("model.family=zimage conditioning.context=edit", ("model.family", "conditioning.context")),
        ("deepspeed.config.zero_optimization.stage=3", ("zero_optimization.stage", "deepspeed.stage")),
        ("deepspeed.config.train_micro_batch_size_per_gpu=3", ("train_micro_batch_size_per_gpu", "train.batch_size")),
        ("deepspeed.config.bf16.enabled=true train.precision=fp32", ("bf16.enabled", "train.precision")),
        ("deepspeed.config.optimizer.type=Adam", ("optimizer", "train.learning_rate")),
        ("train.fp8=frozen adapter.kind=full", ("train.fp8", "adapter.kind")),
        ("train.fp8=teacher adapter.kind=full", ("train.fp8", "teacher.kind")),
        ("train.fp8=frozen adapter.kind=lora backbone=diffusers", ("train.fp8", "backbone")),
        ("train.activations=selective backbone=diffusers", ("train.activations", "backbone")),
        ("train.masters=low_bits deepspeed.stage=0", ("train.masters=low_bits", "train.precision=bf16")),
        ("train.masters=low_bits train.precision=bf16 deepspeed.stage=3", ("train.masters=low_bits", "deepspeed.stage=0")),
        ("deepspeed.gather=step deepspeed.stage=2", ("deepspeed.gather=step", "deepspeed.stage=3")),
        ("deepspeed.gather=unit deepspeed.stage=0", ("deepspeed.gather=unit", "deepspeed.stage=3")),
        ("deepspeed.gather=sweep deepspeed.stage=3 backbone=diffusers", ("deepspeed.gather=sweep", "backbone")),
        ("deepspeed.gather=sweep deepspeed.stage=3 model.family=flux2_klein", ("deepspeed.gather=sweep", "model.family")),
        ("deepspeed.gather=sweep deepspeed.stage=3 method.backward=k_graphs", ("deepspeed.gather=sweep", "method.backward")),
        ("deepspeed.gather=sweep deepspeed.stage=3 train.accumulation=2", ("deepspeed.gather=sweep", "train.accumulation")),
        ("deepspeed.gather=sweep deepspeed.stage=3 adapter.kind=lora", ("deepspeed.gather=sweep", "adapter.kind")),
    ],
)
def test_impossible_combinations_name_both(words, names):
    text = error(*words.split())
    assert text.startswith("impossible combination") and all(name in text for name in names)


@pytest.mark.parametrize(
    "words",
    [
        "teacher.kind=frozen teacher.ema_decay=0.5",
        "method.name=sft",
        "method.name=sft method.targets=teacher teacher.kind=frozen",
        "method.name=pso teacher.kind=frozen method.pairs=offline method.beta=10.0",
        "teacher.ema_dtype=bf16 train.precision=bf16",
        "train.fp8=frozen adapter.kind=lora",
        "train.fp8=teacher teacher.kind=frozen",
        "backbone=diffusers train.activations=recompute",
        "method.states=off_policy teacher.kind=student method.backward=k_graphs",
        "deepspeed.config.gradient_clipping=1.0 deepspeed.config.train_micro_batch_size_per_gpu=auto",
        "train.warmup=10 train.steps=2",
        "train.masters=low_bits train.precision=bf16 deepspeed.stage=0",
        "deepspeed.gather=auto deepspeed.stage=0",
        "deepspeed.gather=sweep deepspeed.stage=3 model.family=zimage method.name=sft",
        "deepspeed.gather=step deepspeed.stage=3 adapter.kind=lora train.accumulation=4",
        "deepspeed.gather=step deepspeed.stage=3 deepspeed.config.zero_optimization.offload_param.device=cpu",
    ],
)
def test_combinations_that_are_fine(words):
    load_settings(words.split())


def test_other_command_line_mistakes():
    assert all(name in error("no_such_recipe") for name in RECIPE_NAMES)
    assert "did you mean nano_lora?" in error("nano_lorra")
    assert "nano_full" in error("nano_full", "nano_lora") and "nano_lora" in error("nano_full", "nano_lora")
    assert "--steps" in error("--steps=3")
    assert "section" in error("train=3") and "train.steps" in error("train=3")
    assert '["a", "b"]' in error("adapter.targets=[to_q, to_k]")


def test_toml_file_mistakes(tmp_path):
    assert "does not exist" in error(str(tmp_path / "none.toml"))
    file = tmp_path / "own.toml"
    for content, words in [
        ("[train]\nsteps = 3\nlr == 4\n", ("own.toml", "line 3")),
        ("[train]\nstepz = 3\n", ("own.toml", "train.stepz", "did you mean train.steps?")),
        ("[trian]\nsteps = 3\n", ("own.toml", "trian", "did you mean train")),
        ("[train]\nsteps = '3'\n", ("own.toml", "train.steps", '"3"')),
        ("train = 3\n", ("own.toml", "section")),
        ("[train]\nsteps = 3\nsteps = 4\n", ("own.toml", "line 3")),
    ]:
        file.write_text(content)
        text = error(str(file))
        assert all(word in text for word in words), text
    file.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in error(str(file))
    (tmp_path / "folder.toml").mkdir()
    assert "not a file" in error(str(tmp_path / "folder.toml"))
    file.write_text("[train]\nsteps = 3\n")
    file.rename(tmp_path / "a=b.toml")
    assert load_settings([str(tmp_path / "a=b.toml")]).train.steps == 3


# ---- recipes that extend others ------------------------------------------------------------------------------------------


def test_a_recipe_extends_another(tmp_path):
    base, middle, last = (tmp_path / f"{name}.toml" for name in ("base", "middle", "last"))
    base.write_text('extends = "zimage_turbo_full"\n[train]\nsteps = 7\nseed = 3\n')
    middle.write_text(f'extends = "{base}"\n[train]\nseed = 4\n')
    last.write_text(f'extends = "{middle}"\n[deepspeed.config.zero_optimization]\noverlap_comm = true\n')
    s = load_settings([str(last), "train.warmup=2"])
    assert (s.recipe, s.train.steps, s.train.seed, s.train.warmup) == ("last", 7, 4, 2)
    assert (s.train.learning_rate, s.deepspeed.stage) == (1e-5, 3)  # of the recipe that comes with the program
    assert s.deepspeed.config == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize(("text", "said"), [
    ('extends = "nowhere"', "unknown recipe nowhere"),
    ("extends = 3", "must be the name of a recipe"),
    ('extends = "SELF"', "extend each other"),
])
def test_a_recipe_that_extends_nothing_good(text, said, tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(text.replace("SELF", str(file)))
    assert said in error(str(file))
