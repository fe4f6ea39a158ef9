"""The layout rules of the project, each from a failure that happened."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("dopsd_fast", "kernels", "bench", "tests")
SOURCES = sorted(
    path
    for folder in OURS
    for suffix in ("py", "cpp", "hpp", "h", "toml", "sh")
    for path in (ROOT / folder).rglob(f"*.{suffix}")
    if "__pycache__" not in path.parts
)
PYTHON = [path for path in SOURCES if path.suffix == ".py"]

# Names that break a program when a script's own folder comes first on sys.path, installed here or not.
TAKEN = {"datasets", "evaluate", "flash_attn", "xformers", "bitsandbytes", "wandb", "kernels", "liger_kernel", "quack"}


def imports(path: Path) -> list[str]:
    """Dotted names of everything that a file imports, relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, node.module)) if node.module else ".".join(base)
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


def test_kernels_folder_holds_no_python_itself():
    assert list((ROOT / "kernels").glob("*.py")) == []
    assert (ROOT / "kernels" / "dopsd_kernels" / "__init__.py").is_file()


@pytest.mark.parametrize("folder", ["dopsd_fast", "bench", "tests"])
def test_no_folder_called_kernels(folder):
    assert [path for path in (ROOT / folder).rglob("kernels") if path.is_dir()] == []


def test_nothing_imports_kernels():
    found = [str(path) for path in PYTHON for name in imports(path) if name.split(".")[0] == "kernels"]
    assert found == []


def test_nothing_imports_the_entry_point():
    found = [str(path) for path in PYTHON if "dopsd_fast.train" in imports(path)]
    assert found == []


def test_module_names_are_free():
    """A script's folder is first on sys.path: a module there called like another one would replace it everywhere."""
    installed = set(importlib.metadata.packages_distributions()) - {"dopsd_fast", "dopsd_kernels", "bench", "tests"}
    taken = set(sys.stdlib_module_names) | installed | TAKEN
    names = {
        (path.stem if path.suffix else path.name): path
        for folder in ("dopsd_fast", "bench")
        for path in (ROOT / folder).rglob("*")
        if (path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))) and not path.name.startswith("__")
    }
    assert {name: str(path) for name, path in names.items() if name in taken} == {}


def scripts() -> list[Path]:
    """What is run by its path; a module that is run by its name says so in its first words."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "bench").rglob("*.py"))}
    run = [path for path, text in texts.items() if "__main__" in text and not text.startswith('"""`python -m bench.')]
    return [ROOT / "dopsd_fast" / "train.py", *run]


@pytest.mark.parametrize("script", scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_drop_their_folder_from_sys_path_first(script):
    """Before any import from outside the standard library, a top-level statement changes sys.path."""
    for node in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if all(name.split(".")[0] in sys.stdlib_module_names for name in names):
                continue
            pytest.fail(f"{script}:{node.lineno} imports before the script's folder is dropped from sys.path")
        if "sys.path" in ast.unparse(node) and not isinstance(node, ast.FunctionDef):
            return
    pytest.fail(f"{script} never touches sys.path")


def test_no_long_file():
    long = {str(path): count for path in SOURCES if (count := len(path.read_text(encoding="utf-8").splitlines())) > 500}
    assert long == {}


def session(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest on the files in `folder`, with our conftest.py. torch is the one library that it imports, and takes seconds."""
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\nclass distributed: pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(folder)]
    environment = {**os.environ, "CI": "true", "PYTHONPATH": str(folder)}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def test_a_fast_test_that_starts_something_fails(tmp_path):
    """And a file that says what it starts is left out."""
    (tmp_path / "test_fast.py").write_text(
        "import os, torch\ndef test_a(): os.system('true')\ndef test_b(): torch.distributed.init_process_group('gloo')\n")
    (tmp_path / "test_whole.py").write_text("import subprocess\ndef test_c(): assert False\n")
    done = session(tmp_path, "--fast", "-p", "no:xdist")
    assert done.returncode == 1 and "2 failed in" in done.stdout, done.stdout + done.stderr
    assert "os.system in" in done.stdout and "a process group in" in done.stdout


@pytest.mark.parametrize("reason, code", [("needs GPU: none here", 0), ("could not be bothered", 1)])
def test_a_skip_by_mistake_fails_the_session_in_ci(tmp_path, reason, code):
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip({reason!r})\n")
    done = session(tmp_path, "-n", "1")
    assert done.returncode == code, done.stdout + done.stderr
    assert ("skipped by mistake" in done.stderr) == (code == 1)


def test_import_mode_is_importlib(pytestconfig):
    assert pytestconfig.getoption("importmode") == "importlib"


def test_requires_a_transformers_that_survives_the_folder_name():
    assert '"transformers>=5.10.2"' in (ROOT / "pyproject.toml").read_text()


def test_constraints_are_exact_and_portable():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines
    assert [line for line in lines if "==" not in line or "/" in line or "@" in line or "+" in line] == []
