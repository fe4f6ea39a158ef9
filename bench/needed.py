"""What bench/full_size.py and bench/first_run.py import, where it comes from, and what to do where it is not there.

They run in a copy of this repository on a machine that has torch, Triton, transformers and PEFT and no network. Whoever adds a
dependency to pyproject.toml names it here: a test compares the two lists.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """name: on PyPI. module: what is imported. brought: the GPU machine does not have it, it comes as a wheel. needed: nothing
    runs without it; else what is lost without it is said in the rows."""

    name: str
    module: str
    brought: bool = False
    needed: bool = True


PACKAGES = (
    Package("torch", "torch"),
    Package("transformers", "transformers"),
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
    Package("typing-extensions", "typing_extensions", brought=True),  # it has an older one than pydantic may want
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


def refusal(script: str) -> str:
    """One line that names what is missing and what to do; empty: nothing is missing."""
    lost = absent(needed=True)
    if not lost:
        return ""
    names = " ".join(package.name for package in PACKAGES if package.module in lost)
    return (f"{script}: {', '.join(lost)} not installed: `python -m pip install -c constraints.txt {names}`, or on a machine "
            "without a network wheels, as bench/full_size.py says at its top")
