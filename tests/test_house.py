"""The house: which package of dopsd_fast may import which, and that none imports itself by way of another."""

import ast
import inspect
from pathlib import Path
from typing import get_args

import pytest

from dopsd_fast.families.registry import family_class
from dopsd_fast.families.zimage.pair import ZImagePair
from dopsd_fast.pair.contract import PairForward
from dopsd_fast.settings import names

ROOT = Path(__file__).resolve().parent.parent

FLOORS = [
    {"errors"},
    {"settings", "storage"},
    {"method"},
    {"data"},
    {"conditioning"},
    {"pair"},
    {"families", "distributed"},
    {"memory"},
    {"run"},
    {"train", "plan", "convert", "nano"},
]
"""From the ground up. What is on one floor imports what lies below it, and not its neighbour."""


def modules() -> dict[str, Path]:
    files = sorted((ROOT / "dopsd_fast").rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def arrows() -> dict[str, set[str]]:
    """Module -> modules of dopsd_fast that it imports anywhere: at its top, inside functions, for types only."""
    known, found = modules(), {}
    for module, file in known.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}: one import style, from dopsd_fast..."
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= (inside & known.keys()) | ({node.module} if inside - known.keys() else set())
        found[module] = {target for target in targets if target in known and target not in (module, "dopsd_fast")}
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def test_every_room_has_a_floor():
    rooms = {room(module) for module in modules() if "." in module}
    assert rooms == set().union(*FLOORS)


def test_no_arrow_points_up_or_to_a_neighbour():
    wrong = {f"{module} imports {target}" for module, targets in arrows().items() if "." in module for target in targets
             if room(module) != room(target) and floor(target) >= floor(module)}
    assert wrong == set()


def test_there_is_no_circle():
    graph, done = arrows(), set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_below_the_planner_rooms_take_sections_of_the_settings():
    """Whoever takes the whole `Settings` depends on all of it. The planner asks what other settings would fit, the loop keeps
    them, and the check of DeepSpeed's fields compares these with all sections."""
    whole = {"settings", "memory", "run", "nano", "train", "plan", "convert"}
    takers = set()
    for module, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and "Settings" in {alias.name for alias in node.names}:
                takers.add(module)
    assert "dopsd_fast.run.trainer" in takers  # the walk finds them
    assert {module for module in takers if room(module) not in whole} == {"dopsd_fast.distributed.deepspeed_check"}


@pytest.mark.parametrize("name", names.FAMILIES)
def test_a_familys_names_are_those_of_its_class(name):
    family = family_class(name)
    assert family.name == name and family.pipeline_class == names.FAMILIES[name].pipelines[0]
    assert names.FAMILIES[name].context in family.contexts
    assert set(get_args(names.FamilyChoice)) == {"auto", *names.FAMILIES}


def test_the_pair_forward_offers_what_the_contract_asks():
    asked = {name for name, value in vars(PairForward).items() if callable(value) and not name.startswith("_")}
    expected = {"layout", "prepare", "summed_parameters", "gather_units", "state_path", "prepare_path", "describe", "modules"}
    assert asked == expected
    offered = inspect.signature(ZImagePair.forward)  # nn.Module's __call__ would take anything
    wanted = inspect.signature(PairForward.__call__)
    assert [p.annotation for p in offered.parameters.values()] == [p.annotation for p in wanted.parameters.values()]
    assert offered.return_annotation == wanted.return_annotation
    assert all(callable(getattr(ZImagePair, name)) for name in asked)
