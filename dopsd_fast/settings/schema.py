"""Every setting of a run: its name, type, default and meaning.

What must hold for a single field stands in its type; what must hold between fields, and how a recipe and the command line
are laid over these defaults, is in load.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from dopsd_fast.settings import source
from dopsd_fast.settings.names import ContextChoice, FamilyChoice, VariantChoice

PACKAGE = Path(__file__).resolve().parents[1]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _no_zero_byte(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a zero byte")
    return value


Text = Annotated[str, AfterValidator(_no_zero_byte)]


def embedded(value: str, part: str) -> Path:
    """The folder or file that a path setting names: "nano" and "nano/..." lie inside the package, others on the disk.

    part: "pipeline" or "data", the embedded folder that "nano" stands for.
    """
    head, _, rest = value.partition("/")
    if head == "nano":
        return PACKAGE / "nano" / part / rest
    return Path(value).expanduser()


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSettings(Section):
    path: Text = "nano"
    """Pipeline folder in the diffusers layout; "nano" is the embedded one."""
    family: FamilyChoice = "auto"
    """Model family; auto reads it from the folder's model_index.json."""
    allow: list[VariantChoice] = []
    """Train on a variant that the family's few steps are not made for, instead of refusing it: base, a checkpoint that is not
    distilled; kv, klein's variant with cached references; guidance, a transformer with a guidance embedding; size, one of
    another size than the published ones; shift, a scheduler that shifts time otherwise than the deployed one."""

    @property
    def folder(self) -> Path:
        return embedded(self.path, "pipeline")


class DataSettings(Section):
    path: Text = "nano"
    """Data set: a .jsonl file, a folder with metadata.jsonl or one .jsonl below it, or a folder of images with .txt
    captions; "nano" is the embedded one."""
    root: Text = ""
    """Folder that relative image paths start from; empty: found by looking where the first image lies."""
    resolution: Annotated[int, Field(ge=8, le=16384)] = 32
    """Side in pixels of the square bucket; the other aspect ratios are scaled with it."""
    prompt_keys: list[Text] = []
    """Names of the prompt fields to draw from; empty: every text field of a record."""
    repeats: Positive = 1
    """How often each record appears in one epoch, each time with its own noise and prompt."""
    skip_bad: bool = False
    """Leave out bad records, count them and list them at the end, instead of stopping at the first one."""

    @property
    def source(self) -> Path:
        return embedded(self.path, "data")


class TrainSettings(Section):
    steps: Positive = 100
    """Number of optimizer steps."""
    batch_size: Positive = 8
    """Samples per rank in one forward."""
    accumulation: Positive = 1
    """Forwards per optimizer step; gradients are summed in fp32."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Learning rate after warm-up."""
    warmup: NonNegative = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or a cosine down to 0 at the last step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair)] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Noise, times, prompt choice and order are functions of it."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Dtype of weights and activations; the optimizer's master copy and the EMA are fp32 either way."""
    masters: Literal["fp32", "low_bits"] = "fp32"
    """How the masters and the EMA of bf16 weights are kept: whole in fp32, or only the 16 bits that the bf16 copies lack: the
    same numbers, 4 bytes a parameter less. low_bits needs precision bf16 and deepspeed.stage 0."""
    activations: Literal["keep", "selective", "recompute"] = "keep"
    """What stays in memory for the backward pass: keep (fastest), selective (all but the wide feed-forward layer, computed
    again), recompute (each block's input; about a third more time)."""
    attention: Literal[
        "auto", "flash_attn_2", "flash_attn_3", "flash_attn_4", "cudnn", "flash", "varlen", "cpu_flash", "math"
    ] = "auto"
    """Which library computes attention in the pair forward; auto takes the fastest that fits the machine."""
    fp8: Literal["off", "teacher", "frozen"] = "off"
    """8-bit products with frozen matrices: off; teacher, the teacher's only; frozen, the student's frozen ones too. Changes the
    numbers; on a GPU needs compute capability 8.9 or newer and precision bf16."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads per rank; 0 leaves torch's own choice."""


class MethodSettings(Section):
    name: Literal["dopsd", "sft", "pso"] = "dopsd"
    """dopsd: on-policy self-distillation. The paper's baselines: sft, supervised flow matching; pso, pairwise sample
    optimization."""
    weight: Literal["v", "x1", "mu"] = "v"
    """Weight of state k in the D-OPSD loss: v = 1, x1 = (1 - t_k)^2, mu = (t_{k+1} - t_k)^2."""
    states: Literal["on_policy", "off_policy"] = "on_policy"
    """States that student and teacher are compared at: the student's own trajectory, or noised target images."""
    num_states: Annotated[int, Field(ge=1, le=1000)] = 4
    """K, the length of the training trajectory."""
    shift: Annotated[float, Field(ge=0)] = 0.0
    """Time shift of the training grid; 0 is the model's own."""
    backward: Literal["per_state", "k_graphs"] = "per_state"
    """per_state holds one graph at a time; k_graphs holds all K until the end, as published. Both give one gradient."""
    targets: Literal["data", "teacher"] = "data"
    """What sft learns: the data's images, or what the teacher, shown them, draws (the paper's ablation)."""
    pairs: Literal["online", "offline"] = "online"
    """Who draws the losers of pso's pairs: the student, or the starting weights."""
    beta: Annotated[float, Field(gt=0)] = 100.0
    """How sharply pso tells winner from loser."""


class TeacherSettings(Section):
    kind: Literal["ema", "frozen", "student"] = "ema"
    """ema: running average of the student. frozen: the starting weights. student: the live weights (collapses)."""
    ema_decay: Annotated[float, Field(ge=0, le=1)] = 0.9999
    """Decay of the average per optimizer step."""
    ema_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the average. bf16, an ablation, is what the published code has: at a decay of 0.9999 it never moves."""


class AdapterSettings(Section):
    kind: Literal["full", "lora"] = "full"
    """full trains every weight of the transformer, lora a low-rank adapter."""
    rank: Positive = 64
    """LoRA rank."""
    alpha: Annotated[float, Field(gt=0)] = 128.0
    """LoRA alpha; the update is scaled by alpha / rank."""
    targets: list[Text] = []
    """Endings of the module names that get an adapter; empty: the family's list."""


class ConditioningSettings(Section):
    cache: Literal["off", "memory", "disk"] = "memory"
    """Where text, image and latent contexts are kept once computed; off computes them at every step."""
    folder: Text = ""
    """Folder of the disk cache; empty: a folder named context_cache beside the run folder."""
    vlm_path: Text = ""
    """Folder of the vision-language model that the teacher reads the image with; empty: vlm inside model.path."""
    context: ContextChoice = "auto"
    """How the teacher sees the target image: vlm (Z-Image), edit (FLUX.2); auto is the family's own."""
    min_pixels: NonNegative = 0
    """Fewest pixels of an image that the vision-language model is shown; 0 is its processor's own."""
    max_pixels: NonNegative = 0
    """Most pixels of an image that the vision-language model is shown; 0 is its processor's own."""
    max_text_tokens: Positive = 512
    """Longest prompt of the student, in tokens."""
    max_vlm_tokens: Positive = 1024
    """Longest prompt and image of the teacher, in tokens."""
    edit_instruction: Text = "Keep the main subject, the background and the composition of the reference image."
    """Appended to the prompt in the edit context."""


class SampleSettings(Section):
    prompts: list[Text] = []
    """Prompts shown in the sample grids besides those of the data set."""
    every: NonNegative = 50
    """Steps between sample grids; 0 draws them only at the start and at the end."""
    steps: NonNegative = 0
    """Function evaluations per sample; 0 is the family's deployment count."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the noise that every grid starts from."""
    count: NonNegative = 4
    """Number of records shown in the grids."""


class DeepSpeedSettings(Section):
    stage: Annotated[int, Field(ge=0, le=3)] = 2
    """ZeRO stage."""
    gather: Literal["auto", "step", "sweep", "unit"] = "auto"
    """How ZeRO-3 gathers the weights: step, once, kept until the optimizer steps (LoRA: the frozen base is not sharded at
    all); sweep, once for the forwards of all states and once, block by block, for their backwards; unit, before every use.
    auto is the first of these that fits the memory."""
    config: dict[str, Any] = {}
    """Further DeepSpeed settings, passed through."""


class CheckpointSettings(Section):
    every: NonNegative = 50
    """Steps between checkpoints; 0 saves only at the end."""
    keep: Positive = 2
    """Number of checkpoints kept; the oldest goes once a new one is complete."""


class OutputSettings(Section):
    dir: Text = ""
    """Run folder; empty: a new one under runs/."""


class Settings(Section):
    recipe: Text = ""
    """Name of the recipe that the settings started from."""
    resume: Text = "never"
    """never refuses an output.dir that holds a run; auto continues the run there, or begins one; a path (of a run, or of one
    of its checkpoints) continues from there, in place or in another output.dir."""
    backbone: Literal["auto", "pair", "diffusers"] = "auto"
    """pair runs student and teacher side by side through the fused kernels; diffusers runs its own forward, twice. auto is pair
    where the family has one (Z-Image)."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    train: TrainSettings = TrainSettings()
    method: MethodSettings = MethodSettings()
    teacher: TeacherSettings = TeacherSettings()
    adapter: AdapterSettings = AdapterSettings()
    conditioning: ConditioningSettings = ConditioningSettings()
    sample: SampleSettings = SampleSettings()
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    output: OutputSettings = OutputSettings()

    @property
    def vlm_folder(self) -> Path:
        """conditioning.vlm_path, or its default inside the model folder."""
        given = self.conditioning.vlm_path
        return embedded(given, "pipeline") if given else self.model.folder / "vlm"

    def to_toml(self) -> str:
        """Every setting as TOML; `load_settings([that file])` gives an equal Settings."""
        return source.write_toml(self.model_dump())
