"""What bench/full_size.py and bench/first_run.py import, where it comes from, and what to do where it is not there.

They run in a copy of this repository on a machine that has torch, Triton, transformers and PEFT and no network. Whoever adds a
dependency to pyproject.toml names it here: a test compares the two lists.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Package:
    """name: on PyPI. module: what is imported. brought: the GPU machine does not have it, it comes as a wheel. needed: nothing
    runs without it; else what is lost without it is said in the rows. least: the oldest version that does, where the GPU
    machine may have an older one, with which the run would end in the middle of an import."""

    name: str
    module: str
    brought: bool = False
    needed: bool = True
    least: str = ""


PACKAGES = (
    Package("torch", "torch"),
    Package("transformers", "transformers", least="5.10.2"),  # older ones take the folder kernels/ for a package
    Package("peft", "peft"),
    Package("safetensors", "safetensors"),
    Package("accelerate", "accelerate"),
    Package("numpy", "numpy"),
    Package("pillow", "PIL"),
    Package("tqdm", "tqdm"),
    Package("psutil", "psutil"),
    Package("rich", "rich"),
    Package("pydantic", "pydantic", brought=True),
    Package("pydantic-core", "pydantic_core", brought=True),
    Package("annotated-types", "annotated_types", brought=True),
    Package("typing-inspection", "typing_inspection", brought=True),
    Package("typing-extensions", "typing_extensions", brought=True, least="4.16.0"),  # pydantic 2.14
    Package("diffusers", "diffusers", brought=True),
    Package("tomli-w", "tomli_w", brought=True),
    Package("triton", "triton", needed=False),
    Package("tensorboard", "tensorboard", needed=False),
    Package("matplotlib", "matplotlib", needed=False),
    Package("jinja2", "jinja2", needed=False),
    Package("hjson", "hjson", brought=True, needed=False),
    Package("deepspeed", "deepspeed", brought=True, needed=False),
    Package("flash-attn", "flash_attn", needed=False),
)


def absent(needed: bool) -> list[str]:
    """Modules of PACKAGES that are not installed: those that are needed, or those that are only welcome."""
    lost = [package.module for package in PACKAGES if package.needed == needed and not installed(package.module)]
    if needed and installed("deepspeed") and not installed("hjson"):
        lost.append("hjson")  # deepspeed does not import without it
    return lost


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def outdated() -> dict[str, str]:
    """Module of PACKAGES -> what is wrong with its version. A package without metadata is taken as it is."""
    found = {}
    for package in PACKAGES:
        try:
            here = version(package.name) if package.least else ""
        except PackageNotFoundError:
            continue
        if numbers(here) < numbers(package.least):
            found[package.module] = f"{package.module} is {here}, needs {package.least} or newer"
    return found


def numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)[:3]]


def refusal(script: str) -> str:
    """One line that names what is missing or too old and what to do; empty: all is there."""
    lost, old = absent(needed=True), outdated()
    if not lost and not old:
        return ""
    said = [f"{', '.join(lost)} not installed"] * bool(lost) + list(old.values())
    names = " ".join(package.name for package in PACKAGES if package.module in [*lost, *old])
    return (f"{script}: {'; '.join(said)}: `python -m pip install -c constraints.txt {names}`, or on a machine without a "
            "network wheels, as bench/full_size.py says at its top")
