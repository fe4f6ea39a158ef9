"""Makes the memory plan: what each rank needs for given settings on a given machine, whether it fits, and what would.

    plan = make_plan(settings, Machine.here(world, local_world, device))
    plan.fits, plan.gather, plan.advice, plan.table()

The bytes come from the ledger, and the activations in it from a step on the meta device. GB = 1e9 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dopsd_fast.conditioning.context import Shapes
from dopsd_fast.errors import UserError
from dopsd_fast.families.base import Family
from dopsd_fast.families.published import PUBLISHED, published_family
from dopsd_fast.families.registry import open_family
from dopsd_fast.memory.activations import largest_shapes, measure
from dopsd_fast.memory.ledger import KINDS, Machine, Moment, Run, Sizes, device_of, sizes_of
from dopsd_fast.settings.deepspeed_dict import deepspeed_config
from dopsd_fast.settings.load import contradictions
from dopsd_fast.settings.schema import Settings

GB = 1e9
GATHERS = ("step", "sweep", "unit")


@dataclass
class Plan:
    """The memory plan of one run.

    gather: the value of deepspeed.gather, with "auto" resolved at stage 3.
    gathers_per_step, gathered_bytes, reduced_bytes: the network traffic of one rank in a step (see `Run.traffic`).
    source: where the model's sizes come from.
    advice: one line that says what would fit; empty where this fits."""

    settings: Settings
    machine: Machine
    gather: str
    moments: list[Moment]
    gathers_per_step: float
    gathered_bytes: int
    reduced_bytes: int
    parameters: int
    trained_parameters: int
    source: str
    advice: str = ""

    @property
    def worst(self) -> Moment:
        """The moment at which the device holds most."""
        return max(self.moments, key=lambda moment: self._device(moment))

    def _device(self, moment: Moment) -> int:
        """Returns the bytes in the device's memory, which on a CPU is the host's memory too."""
        return moment.device.total() + (moment.host.total() if self.machine.kind == "cpu" else 0)

    @property
    def device_peak(self) -> int:
        return self._device(self.worst)

    @property
    def host_peak(self) -> int:
        if self.machine.kind == "cpu":
            return self.device_peak
        return max(moment.host.total() for moment in self.moments)

    @property
    def items(self) -> dict[str, tuple[int, int]]:
        """Kind -> (bytes on the device, bytes on the host), each at the moment at which that memory is fullest."""
        fullest = max(self.moments, key=lambda moment: moment.host.total()) if self.machine.kind == "cuda" else self.worst
        found = {kind: (self.worst.device[kind], fullest.host[kind]) for kind in KINDS}
        return {kind: sizes for kind, sizes in found.items() if any(sizes)}

    @property
    def fits(self) -> bool:
        machine = self.machine
        host = machine.host_bytes is None or self.host_peak * machine.ranks_per_node <= machine.host_bytes
        device = machine.kind == "cpu" or machine.device_bytes is None or self.device_peak <= machine.device_bytes
        return host and device

    def table(self) -> list[str]:
        """Returns the lines that the trainer shows when it starts and that `python -m dopsd_fast.plan` prints."""
        m, s = self.machine, self.settings
        where = f"{m.ranks} {'GPU' if m.kind == 'cuda' else 'CPU rank'}{'s' if m.ranks > 1 else ''}"
        nodes = f" on {m.ranks // m.ranks_per_node} nodes" if m.ranks > m.ranks_per_node else ""
        how = f"ZeRO {s.deepspeed.stage}" + (f", gather={self.gather}" if s.deepspeed.stage == 3 else "")
        lines = [
            f"plan: {self.source}, {self.parameters:,} parameters, {self.trained_parameters:,} trained "
            f"({s.adapter.kind}, {s.train.precision}, activations={s.train.activations}); {how}; {where}{nodes}",
            f"per rank, GB = 1e9 bytes    {'device':>9} {'host':>9}    (device while: {self.worst.name})",
        ]
        lines += [f"  {kind:<26}{_gb(device):>9} {_gb(host):>9}" for kind, (device, host) in self.items.items()]
        lines.append(f"  {'peak':<26}{_gb(self.device_peak):>9} {_gb(self.host_peak):>9}")
        device = "" if m.device_bytes is None else f"{m.device_bytes / GB:.1f} GB a GPU"
        host = "" if m.host_bytes is None else (
            f"{m.host_bytes / GB:.1f} GB a node, of which {m.ranks_per_node} rank{'s' * (m.ranks_per_node > 1)} "
            f"need{'s' * (m.ranks_per_node == 1)} {self.host_peak * m.ranks_per_node / GB:.1f}"
        )
        given = ", ".join(part for part in (device, host) if part)
        lines.append(f"a step: {self.gathers_per_step:.2f} gathers of the whole model, {self.gathered_bytes / GB:.2f} GB "
                     f"gathered and {self.reduced_bytes / GB:.2f} GB reduced by a rank")
        lines.append((f"fits ({given})" if self.fits else f"does not fit ({given}): {self.advice}") if given else "")
        return [line for line in lines if line]


def _gb(size: int) -> str:
    return f"{size / GB:.2f}" if size else "-"


# ---- the plan ----------------------------------------------------------------------------------------------------------


_traced: dict[str, Any] = {}
"""Caches counts and traces, which take seconds, under all settings that they depend on. The search for advice needs each many
times."""


class Planner:
    """Makes plans of one model on one machine. `shapes`: the largest latents and contexts, or None to take the largest that the
    settings allow. `source`: where the model's sizes come from."""

    def __init__(self, machine: Machine, family: Family, shapes: Shapes | None, source: str) -> None:
        self.machine, self.family, self.shapes, self.source = machine, family, shapes, source

    def _once(self, key: Sequence[Any], make: Callable[[], Any]) -> Any:
        model = [self.family.name, getattr(self.family, "transformer_config", id(self.family))]
        text = json.dumps([model, key], default=str)
        if text not in _traced:
            _traced[text] = make()
        return _traced[text]

    def plan(self, settings: Settings, machine: Machine | None = None) -> Plan:
        """Returns the plan of `settings`, without advice. Where deepspeed.gather is "auto", it takes the first of step, sweep
        and unit that fits, because that one gathers least. Raises UserError where the settings contradict each other."""
        for problem in contradictions(settings):
            raise UserError(f"impossible combination: {problem}")
        if settings.deepspeed.stage != 3:
            return self._plan(settings, None, machine)
        given = settings.deepspeed.gather
        plans = (self._plan(settings, gather, machine) for gather in self._gathers(settings, given))
        last = None
        for last in plans:
            if last.fits:
                return last
        assert last is not None
        return last

    def _gathers(self, settings: Settings, given: str) -> list[str]:
        if given != "auto":
            return [given]
        with_sweep = settings.model_copy(deep=True)
        with_sweep.deepspeed.gather = "sweep"
        able = not contradictions(with_sweep) and self._of_model(settings).fused
        return [gather for gather in GATHERS if gather != "sweep" or able]

    def _of_model(self, settings: Settings) -> Sizes:
        key = ["sizes", settings.adapter, settings.teacher.kind, settings.train.precision, settings.backbone]
        return self._once(key, lambda: sizes_of(self.family, settings))

    def _plan(self, settings: Settings, gather: str | None, machine: Machine | None) -> Plan:
        machine = machine or self.machine
        sizes = self._of_model(settings)
        traced = settings.train
        wanted = ["shapes", settings.data.resolution, settings.conditioning]
        shapes = self.shapes or self._once(wanted, lambda: largest_shapes(self.family, settings.data.resolution))
        key = ["activations", machine.kind, shapes, settings.adapter, settings.method, settings.teacher.kind,
               settings.backbone, gather, traced.precision, traced.activations, traced.batch_size, traced.accumulation > 1,
               traced.fp8]
        activations = self._once(key, lambda: measure(self.family, settings, shapes, gather, machine.kind))
        zero = deepspeed_config(settings).get("zero_optimization", {})
        run = Run(settings, machine, sizes, activations, gather, zero)
        return Plan(settings, machine, gather or "auto", run.moments(), *run.traffic(), sizes.model, run.total, self.source)

    # ---- what would fit

    def advice(self, settings: Settings) -> str:
        """Returns a line with the smallest set of changes that makes the run fit, written as on the command line. Among sets of
        one size, it takes the least harmful. Where not even four are enough, the line says what would be."""
        changes = list(_changes(settings, self.machine))
        for count in range(1, 5):
            for chosen in combinations(changes, count):
                words = [word for change in chosen for word in change]
                if len({word.partition("=")[0] for word in words}) == len(words) and self._would_fit(settings, words):
                    return f"it would with {' '.join(words)}"
        return self._more_ranks(settings)

    def _would_fit(self, settings: Settings, words: Sequence[str], machine: Machine | None = None) -> bool:
        try:
            return self.plan(changed(settings, words), machine).fits
        except UserError:
            return False

    def _more_ranks(self, settings: Settings) -> str:
        m, unit = self.machine, "GPUs" if self.machine.kind == "cuda" else "CPU ranks"
        words = ["deepspeed.stage=3", "deepspeed.gather=auto", "train.masters=fp32", "train.activations=recompute"]
        words += _smaller_batch(settings)
        ranks = 2 * m.ranks
        while ranks <= 1024 and m.kind == "cuda":
            more = Machine(ranks, max(m.ranks_per_node, min(ranks, 8)), m.device_bytes, m.host_bytes, m.kind)
            if self._would_fit(settings, words, more):
                return f"no setting is enough on {m.ranks}; it would on {ranks} {unit} with {' '.join(words)}"
            ranks *= 2
        return f"no setting is enough on {m.ranks} {unit}: use a smaller data.resolution, or {unit} with more memory"


def _changes(s: Settings, machine: Machine) -> Iterator[list[str]]:
    """Yields single changes that save memory, from the least harmful on."""
    steps = ("keep", "selective", "recompute")
    for activations in steps[steps.index(s.train.activations) + 1 :]:
        yield [f"train.activations={activations}"]
    if s.deepspeed.stage == 3 and s.deepspeed.gather != "auto":
        for gather in GATHERS[GATHERS.index(s.deepspeed.gather) + 1 :]:
            yield [f"deepspeed.gather={gather}"]
    if machine.ranks > 1:
        low_bits = ["train.masters=fp32"] if s.train.masters == "low_bits" else []
        for stage in range(max(2, s.deepspeed.stage + 1), 4):
            yield [f"deepspeed.stage={stage}", *low_bits]
    if s.train.masters == "fp32" and s.train.precision == "bf16":
        whole = ["deepspeed.stage=0", "deepspeed.gather=auto"] if s.deepspeed.stage else []
        yield ["train.masters=low_bits", *whole]
    if machine.kind == "cuda" and device_of(s.deepspeed.config.get("zero_optimization", {}).get("offload_optimizer")) != "cpu":
        need = ["deepspeed.stage=3"] if not s.deepspeed.stage else []
        need += ["train.masters=fp32"] if s.train.masters == "low_bits" else []
        yield ["deepspeed.config.zero_optimization.offload_optimizer.device=cpu", *need]
    if s.train.batch_size > 1:
        yield _smaller_batch(s)
    if s.train.precision == "fp32":
        yield ["train.precision=bf16"]
    if s.adapter.kind == "full":
        yield ["adapter.kind=lora"]


def _smaller_batch(s: Settings) -> list[str]:
    if s.train.batch_size == 1:
        return []
    return ["train.batch_size=1", f"train.accumulation={s.train.accumulation * s.train.batch_size}"]


def changed(settings: Settings, words: Sequence[str]) -> Settings:
    """Returns a copy of `settings` with each "section.field=value" applied. Missing inner tables of deepspeed.config are
    made."""
    copy = settings.model_copy(deep=True)
    for word in words:
        path, _, text = word.partition("=")
        value: Any = int(text) if text.isdigit() else text
        *parents, last = path.split(".")
        place: Any = copy
        for name in parents:
            place = place.setdefault(name, {}) if isinstance(place, dict) else getattr(place, name)
        if isinstance(place, dict):
            place[last] = value
        else:
            setattr(place, last, value)
    return copy


def make_plan(settings: Settings, machine: Machine, family: Family | None = None, shapes: Shapes | None = None) -> Plan:
    """Makes the plan of `settings` on `machine`, with advice where it does not fit.

    family, shapes: given where they are known already. Otherwise the family is the one that the settings name, and the shapes
    are the longest contexts and the largest bucket that they allow. Raises UserError for settings that contradict each other,
    and for a model that is not known."""
    source = str(settings.model.path)
    if family is None:
        family, source = find_family(settings)
    planner = Planner(machine, family, shapes, source)
    plan = planner.plan(settings)
    if not plan.fits:
        plan.advice = planner.advice(settings)
    return plan


def find_family(settings: Settings) -> tuple[Family, str]:
    """Returns (family, where its architecture comes from). The architecture is read from the model's folder; where there is no
    folder, it is the published one of `model.family`."""
    model = settings.model
    if not model.folder.is_dir() and model.family in PUBLISHED:
        title = PUBLISHED[model.family]["title"]
        return published_family(model.family, settings.conditioning), f"published {title} ({model.path} is not here)"
    family = open_family(model.folder, settings.conditioning, model.family)
    family.check_variant(model.allow)
    return family, str(model.path)
