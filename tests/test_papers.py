"""What the papers say is so: links and anchors, the file tree, the examples, the commands that CI runs."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from dopsd_fast import plan
from dopsd_fast.settings.load import load_settings

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PAPERS = [ROOT / "README.md", ROOT / "LOG.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("dopsd_fast", "bench", "kernels")


def anchors(text: str) -> set[str]:
    """Of every heading, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_links_lead_somewhere(paper):
    text = paper.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    wrong = []
    for link in links:
        name, _, anchor = link.partition("#")
        if "://" in name:
            continue
        target = paper.parent / name if name else paper
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("paper", [paper for paper in PAPERS if paper.name not in ("LOG.md", "CHANGELOG.md")],
                         ids=lambda paper: paper.name)
def test_files_that_are_named_are_there(paper):
    """LOG.md and CHANGELOG.md may name what there was. NAME stands for one's own."""
    text = paper.read_text(encoding="utf-8")
    named = re.findall(r"`((?:dopsd_fast|bench|kernels|tests|docs|examples|\.github)/[\w./-]+)", text)
    assert named and [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_every_fact_has_the_date_of_an_entry():
    text = (ROOT / "docs" / "facts.md").read_text(encoding="utf-8")
    facts = re.findall(r"^\* .*$", text, re.MULTILINE)
    dates = set(re.findall(r"^## (\d{4}-\d\d-\d\d)", (ROOT / "LOG.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert facts and [fact for fact in facts if not dates & set(re.findall(r"\d{4}-\d\d-\d\d", fact))] == []
    labels = dict(re.findall(r"^\[(\w+)\]: \S+#(\d{4}-\d\d-\d\d)", text, re.MULTILINE))
    used = re.findall(r"\[(\d{4}-\d\d-\d\d)\]\[(\w+)\]", text)
    assert used and [(date, label) for date, label in used if labels.get(label) != date] == []


def named_in_the_tree() -> set[str]:
    """Folders of README's file tree, from the root: the name ends in a slash, and deeper ones are indented further."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"^```text\n(.+?)^```", text, re.MULTILINE | re.DOTALL)
    assert tree, "README.md has no file tree"
    found, above = set(), []
    for line in tree[1].splitlines():
        name = line.split()[0]
        indent = len(line) - len(line.lstrip())
        above = [(depth, part) for depth, part in above if depth < indent]
        if name.endswith("/"):
            above.append((indent, name))
            found.add("".join(part for _, part in above).rstrip("/"))
    return found


def test_the_file_tree_is_that_of_the_repository():
    named = named_in_the_tree()
    assert [name for name in sorted(named) if not (ROOT / name).is_dir()] == []
    code = {path.parent for top in PACKAGES for path in (ROOT / top).rglob("*.py") if "__pycache__" not in path.parts}
    assert sorted({str(folder.relative_to(ROOT)) for folder in code} - named) == []


def run(script: str, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """A script of examples/, run in `folder` with the programs of `folder`/bin before all others."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", str(EXAMPLES / script), *words], env={**os.environ, "PATH": path, **environment},
                          cwd=folder, capture_output=True, text=True)


def program(folder: Path, name: str, text: str) -> None:
    file = folder / "bin" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda script: script.name)
def test_scripts_are_bash_and_name_settings_that_are_there(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    named = re.findall(r"\b((?:[a-z_]+\.)+[a-z_]+=[^\s.\"]+|resume=\w+)", script.read_text(encoding="utf-8"))
    recipes = set(re.findall(r"\bzimage_turbo_\w+", script.read_text(encoding="utf-8")))
    assert recipes and len(named) >= 3
    for recipe in recipes:
        load_settings([recipe, *named])


def test_every_rank_under_slurm_is_told_who_it_is(tmp_path):
    """Two nodes of two ranks; afterwards a job whose ranks were stopped is queued again."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    program(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo first; echo second; else echo "scontrol $*"; fi')
    program(tmp_path, "srun", 'shift; for i in 0 1 2 3; do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@" || code=$?; done\n'
            'exit ${code:-0}')
    program(tmp_path, "python", 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_SIZE $MASTER_ADDR $MASTER_PORT $*"; exit $CODE')
    job = dict(SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_NODELIST="x", SLURM_JOB_ID="7", SLURM_NTASKS="4",
               SLURM_NTASKS_PER_NODE="2")
    words = ["nano_full", "train.steps=2", "data.path=my images"]
    ended = "dopsd_fast/train.py nano_full train.steps=2 data.path=my images resume=auto"
    ranks = [f"{i} {i % 2} 4 2 first 20007 {ended}" for i in range(4)]
    for code, more in ((0, []), (1, []), (143, ["scontrol requeue 7"])):
        done = run("slurm.sh", tmp_path, *words, CODE=str(code), **job)
        assert done.stdout.splitlines() == ranks + more, done.stderr
        assert done.returncode == (code if code != 143 else 0)


def test_two_nodes_are_a_hostfile_that_deepspeed_reads(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    program(tmp_path, "deepspeed", f'cp "$2" {tmp_path}/hosts; shift 2; printf "%s\\n" "$@" > {tmp_path}/words')
    assert run("two_nodes.sh", tmp_path, "a", "b", "data.path=my images", "output.dir=out").returncode == 0
    assert dict(fetch_hostfile(str(tmp_path / "hosts"))) == {"a": 8, "b": 8}
    script, *words = (tmp_path / "words").read_text().splitlines()
    settings = load_settings(words)
    assert (script, settings.data.path, settings.resume) == ("dopsd_fast/train.py", "my images", "auto")
    assert settings.deepspeed.config["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert run("two_nodes.sh", tmp_path, "a").returncode == 2


def test_the_small_card_fits_by_the_count_that_is_quoted(capsys):
    assert plan.main([str(EXAMPLES / "card_24gb.toml"), "--gpus", "1", "--memory", "24"]) == 0
    peak = re.search(r"^ +peak +([\d.]+)", capsys.readouterr().out, re.MULTILINE)[1]
    assert f"counts a peak of {peak} GB" in (EXAMPLES / "card_24gb.toml").read_text(encoding="utf-8")
    for paper in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        assert re.search(rf"\b{float(peak):.1f} GB", paper.read_text(encoding="utf-8"))


def test_ci_runs_the_commands_of_the_readme():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    ran = [step["run"] for step in job["steps"] if "run" in step]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(make \w+) ", readme.split("## Two commands")[1].split("##")[0], re.MULTILINE)
    assert commands == ["make demo", "make test"] and set(commands) < set(ran)
    needed = re.findall(r"apt-get install ([^\";]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    installed = {word for command in ran for word in command.split()}
    assert needed and {package for words in needed for package in words.split()} <= installed
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    assert "3.11" in job["strategy"]["matrix"]["python"]
    assert all(f"Programming Language :: Python :: {python}" in supported for python in job["strategy"]["matrix"]["python"])
