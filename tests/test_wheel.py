"""The wheel that `pip install .` builds works outside a checkout: what it holds, and a run from an empty folder."""

import email
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests import driving

ROOT = driving.ROOT
PARTS = {"dopsd_fast": ROOT / "dopsd_fast", "dopsd_kernels": ROOT / "kernels" / "dopsd_kernels"}
UNOPTIMISED = ["-C", "cmake.build-type=None", "-C", "cmake.define.CMAKE_CXX_FLAGS=-O0"]
"""What the optimiser does is no question here, and costs 15 s."""

# Runs at the start of every interpreter of the environment, and notes what no run may do: open a file of the checkout, or look
# for a machine other than this one. It also notes which native module was loaded.
WATCH = """
import sys

def note(event, given):
    if event == "open" and isinstance(given[0], str) and given[0].startswith({inside!r}):
        line = "checkout " + given[0]
    elif event == "import" and given[0] == "dopsd_kernels._native" and given[1]:
        line = "native " + given[1]
    elif event == "socket.getaddrinfo" and given[0] not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::"):
        line = "host " + str(given[0])
    elif event == "socket.connect" and isinstance(given[1], tuple) and str(given[1][0]) not in ("127.0.0.1", "::1"):
        line = "host " + str(given[1])
    else:
        return
    with open({notes!r}, "a") as file:
        file.write(line + "\\n")

sys.addaudithook(note)
"""


def files_of(folder: Path) -> set[str]:
    """The files below a package folder, without what running it leaves there and without the native sources."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    left = (path for path in found if path.suffix not in (".pyc", ".so") and not {"__pycache__", "csrc"} & {*path.parts})
    return {path.as_posix() for path in left}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-index", "--no-deps",
               "--no-build-isolation", *UNOPTIMISED, "-w", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("*.whl")
    return file


class Installed:
    """An environment that holds the wheel, and of everything else only what the wheel depends on.

    The dependencies are the present environment's: a line of a .pth file adds their folder to the path, and the .pth files
    in that folder, through which an editable install puts the checkout before everything else, are not read."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder / "env", with_pip=False, symlinks=True)
        self.python = folder / "env" / "bin" / "python"
        (self.packages,) = (folder / "env" / "lib").glob("python*/site-packages")
        self.empty, self.notes = folder / "empty", folder / "notes"
        self.empty.mkdir()
        self.notes.touch()
        places = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        (self.packages / "dependencies.pth").write_text("\n".join(places) + "\n")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.python), "install", "-q",
                   "--no-index", "--no-deps", str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        inside = tuple(str(ROOT / name) + "/" for name in ("dopsd_fast", "kernels", "bench", "tests"))
        (self.packages / "watch.py").write_text(WATCH.format(inside=inside, notes=str(self.notes)))
        (self.packages / "watch.pth").write_text("import watch\n")

    def run(self, *words: str) -> driving.Job:
        """`python *words` from the empty folder, to its end; it touched nothing but the wheel."""
        self.notes.write_text("")
        environment = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": ""}
        job = driving.command([str(self.python), *words], cwd=self.empty, env=environment).succeed()
        noted = set(self.notes.read_text().splitlines())
        (native,) = self.packages.glob("dopsd_kernels/_native.*")
        assert noted <= {f"native {native}"}, noted
        self.loaded_native = bool(noted)
        return job


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (info,) = {name.split("/")[0] for name in names if name.split("/")[0] not in PARTS}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
    for name, folder in PARTS.items():
        held = {file.removeprefix(f"{name}/") for file in names if file.startswith(f"{name}/")}
        native = {file for file in held if file.startswith("_native.")}
        assert held - native == files_of(folder)
        assert "py.typed" in held and len(native) == (name == "dopsd_kernels")
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == ["LICENSE"]
    assert not [text for text in metadata.get_all("Classifier") if text.startswith("License")]
    assert metadata["Project-URL"] == "Paper, https://arxiv.org/abs/2605.05204"


def test_a_run_from_an_empty_folder(installed):
    """`deepspeed --module dopsd_fast.train` on 2 ranks, with the embedded pipeline and data, by a recipe; no host is looked
    up."""
    launcher = Path(sys.executable).parent / "deepspeed"
    options = ["--num_accelerators", "2", "--master_port", str(driving.free_port()), "--module", "dopsd_fast.train"]
    settings = ["nano_lora", "output.dir=out", "train.steps=2", "train.threads=1", "train.batch_size=1",
                "data.prompt_keys=['short_en']", "sample.every=0", "sample.count=1", "sample.prompts=[]"]
    job = installed.run(str(launcher), *options, *settings)
    out = installed.empty / "out"
    assert installed.loaded_native and "ops native" in job.out
    assert f"model  {installed.packages / 'dopsd_fast' / 'nano' / 'pipeline'}" in job.out
    assert "128 records" in job.out and "0 skipped" in job.out and "finished 2 steps" in job.out
    assert [row["step"] for row in driving.rows(out)] == [1, 2]
    assert (out / "export" / "adapter_model.safetensors").is_file()
    assert {path.name for path in installed.empty.iterdir()} == {"out"}


def test_a_plan_from_an_empty_folder(installed):
    job = installed.run("-m", "dopsd_fast.plan", "nano_lora", "--gpus", "1", "--memory", "80")
    assert job.out.startswith("plan: nano, 3,040,512 parameters") and "fits (80.0 GB a GPU)" in job.out
