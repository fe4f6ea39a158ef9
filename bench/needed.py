r"""What bench/first_run.py imports, where it comes from, and what to do where it is not there.

It runs in a copy of this repository on a GPU machine that has Python 3.12, torch 2.11, Triton 3.6, transformers and PEFT.
Nothing is built there: on a GPU the kernels are Triton's. Without a network, bring wheels that were made elsewhere by

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
        --platform manylinux_2_28_x86_64 -c constraints.txt -d wheels \
        pydantic pydantic-core annotated-types typing-inspection typing-extensions diffusers hjson tomli-w
    DS_BUILD_OPS=0 python -m pip wheel --no-deps --no-build-isolation -c constraints.txt -w wheels deepspeed  # has no wheel

and there:

    python -m pip install --no-index --no-deps --target /tmp/site wheels/*.whl
    export PYTHONPATH=/tmp/site

Whoever adds a dependency to pyproject.toml names it here: a test compares the two lists.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

BROUGHT = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "diffusers", "tomli-w")
"""What such a machine does not have, by its name on PyPI."""
NEEDED = ("torch", "transformers", "peft", "safetensors", "accelerate", "numpy", "pillow", "tqdm", "psutil", "rich", *BROUGHT)
"""Without which nothing runs."""
WELCOME = ("triton", "tensorboard", "matplotlib", "jinja2", "hjson", "deepspeed", "flash-attn")
"""What is lost without these is said in the rows."""
LEAST = {"transformers": "5.10.2", "typing-extensions": "4.16.0"}
"""The oldest versions that do, where a machine may have older ones: of transformers those take the folder kernels/ for a
package, and pydantic 2.14 would end in the middle of its import."""


def module(name: str) -> str:
    return "PIL" if name == "pillow" else name.replace("-", "_")


def absent(names: Sequence[str]) -> list[str]:
    """Those that are not installed; hjson too where deepspeed, which does not import without it, is."""
    also = ["hjson"] if names is NEEDED and installed("deepspeed") else []
    return [name for name in [*names, *also] if not installed(module(name))]


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def outdated() -> dict[str, str]:
    """Name -> what is wrong with its version. A package without metadata is taken as it is."""
    found = {}
    for name, least in LEAST.items():
        try:
            here = version(name)
        except PackageNotFoundError:
            continue
        if numbers(here) < numbers(least):
            found[name] = f"{module(name)} is {here}, needs {least} or newer"
    return found


def numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)[:3]]


def refusal(script: str) -> str:
    """One line that names what is missing or too old and what to do; empty: all is there."""
    lost, old = absent(NEEDED), outdated()
    if not lost and not old:
        return ""
    said = [f"{', '.join(map(module, lost))} not installed"] * bool(lost) + list(old.values())
    names = " ".join([*lost, *old])
    return (f"{script}: {'; '.join(said)}: `python -m pip install -c constraints.txt {names}`, or on a machine without a "
            "network wheels, as bench/needed.py says at its top")
