"""`load_settings` layers the defaults, a recipe and `field=value` arguments, later ones winning, and checks what must
hold between fields.
"""

from __future__ import annotations

from dopsd_fast.errors import UserError
from dopsd_fast.settings import deepspeed_dict, source
from dopsd_fast.settings.names import FAMILIES
from dopsd_fast.settings.schema import PACKAGE, MethodSettings, Settings

RECIPES = PACKAGE / "recipes"
DEFAULT_RECIPE = "nano_full"


def load_settings(argv: list[str]) -> Settings:
    """Settings from `[RECIPE | FILE.toml] [field=value ...]`; without a recipe, nano_full.

    A value is read as TOML (`1e-4`, `true`, `["a", "b"]`), or else taken as it stands (`runs/first`). The launcher's
    `--local_rank` and a request for help are passed over. Raises UserError: unknown recipe or field, file that is
    missing or not TOML, wrong type, number out of range, settings that contradict each other.
    """
    layers = source.read_layers(argv, Settings, RECIPES, DEFAULT_RECIPE)
    settings: Settings = source.validate(Settings, layers)
    for problem in contradictions(settings):
        raise UserError(f"impossible combination: {problem}")
    return settings


def wants_help(argv: list[str]) -> bool:
    return any(word in ("--help", "-h") for word in argv)


def help_text() -> str:
    """What `--help` prints: usage, recipes, and every field with type, default and meaning."""
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.toml")))
    return source.describe(Settings, recipes, DEFAULT_RECIPE)


def contradictions(s: Settings) -> list[str]:
    """One line for each pair of settings that cannot go together, those of `deepspeed.config` included."""
    found = []
    if s.method.name == "sft" and s.method.states == "off_policy":
        found.append("method.states=off_policy chooses D-OPSD's states, method.name=sft has none: drop one of them")
    if s.method.name == "sft" and s.method.backward == "k_graphs":
        found.append("method.backward=k_graphs needs K states, method.name=sft has one: drop one of them")
    if s.method.name == "pso" and s.teacher.kind != "frozen":
        found.append(f"method.name=pso compares with the starting weights, teacher.kind is {s.teacher.kind}: use "
                     "teacher.kind=frozen")
    if s.method.name == "pso" and (s.method.states == "off_policy" or s.method.backward == "k_graphs"):
        found.append("method.states=off_policy and method.backward=k_graphs are D-OPSD's, not of method.name=pso: drop them")
    for name, owner in (("targets", "sft"), ("pairs", "pso"), ("beta", "pso")):
        value = getattr(s.method, name)
        if s.method.name != owner and value != MethodSettings.model_fields[name].default:
            found.append(f"method.{name}={value} belongs to method.name={owner}, it is {s.method.name}: drop one of them")
    if s.adapter.kind == "full" and s.adapter.targets:
        found.append("adapter.targets names LoRA modules, adapter.kind=full trains every weight: drop one of them")
    if s.train.fp8 != "off" and s.adapter.kind == "full" and (s.train.fp8 == "frozen" or s.teacher.kind != "frozen"):
        found.append(
            f"train.fp8={s.train.fp8} is for frozen matrices; with adapter.kind=full and teacher.kind={s.teacher.kind} they "
            "change at every step: use adapter.kind=lora, or train.fp8=off"
        )
    if s.backbone == "diffusers" and (s.train.fp8 != "off" or s.train.activations == "selective"):
        what = f"train.fp8={s.train.fp8}" if s.train.fp8 != "off" else "train.activations=selective"
        found.append(f"{what} belongs to the pair forward, backbone=diffusers runs diffusers' own: drop one of them")
    if s.conditioning.max_pixels and s.conditioning.min_pixels > s.conditioning.max_pixels:
        found.append(
            f"conditioning.min_pixels={s.conditioning.min_pixels} is larger than "
            f"conditioning.max_pixels={s.conditioning.max_pixels}"
        )
    family_context = FAMILIES[s.model.family].context if s.model.family != "auto" else ""
    if family_context and s.conditioning.context not in ("auto", family_context):
        found.append(
            f"conditioning.context={s.conditioning.context} with model.family={s.model.family}: "
            f"that family has {family_context}"
        )
    return found + deepspeed_dict.contradictions(s) + _of_stage(s)


def _of_stage(s: Settings) -> list[str]:
    """What deepspeed.stage and deepspeed.gather ask of the other settings."""
    train, stage, gather, found = s.train, s.deepspeed.stage, s.deepspeed.gather, []
    if train.masters == "low_bits" and train.precision != "bf16":
        found.append(f"train.masters=low_bits keeps the bits that bf16 weights lack, train.precision is {train.precision}: "
                     "use train.precision=bf16, or train.masters=fp32")
    if train.masters == "low_bits" and stage:
        found.append(f"train.masters=low_bits needs deepspeed.stage=0, it is {stage}: DeepSpeed's shards are fp32 masters")
    if gather != "auto" and stage != 3:
        found.append(f"deepspeed.gather={gather} gathers sharded weights, with deepspeed.stage={stage} they are whole: use "
                     "deepspeed.stage=3, or deepspeed.gather=auto")
    if train.masters == "low_bits" and s.teacher.ema_dtype == "bf16":
        found.append("train.masters=low_bits keeps the average's fp32 bits, teacher.ema_dtype=bf16 has none: drop one of them")
    if gather == "sweep":
        wanted = {
            "method.name": (s.method.name, s.method.name != "pso", "dopsd or sft"),
            "backbone": (s.backbone, s.backbone != "diffusers", "auto"),
            "model.family": (s.model.family, s.model.family in ("auto", "zimage"), "zimage (the one with a pair forward)"),
            "method.backward": (s.method.backward, s.method.backward == "per_state", "per_state"),
            "train.accumulation": (train.accumulation, train.accumulation == 1, "1"),
            "adapter.kind": (s.adapter.kind, s.adapter.kind == "full", "full"),
        }
        for name, (value, fine, need) in wanted.items():
            if not fine:
                found.append(f"deepspeed.gather=sweep needs {name}={need}, it is {value}: change one, or use gather=step")
    return found
