"""README's table of measurements is that of the committed results."""

from dataclasses import replace

import pytest

from bench import readme
from bench.results import Row, write_results

FACTS = {"cpu": "A CPU", "threads": 2, "model": "nano", "commit": "0123456789abcdef", "torch": "2.13.0", "quick": False}
ROWS = [
    Row("step", "lora/R1", "ours", "speedup", 2.25, "x", 2.2, 2.3, 20),
    Row("step", "full/R1", "ours", "speedup", 1.75, "x", 1.7, 1.8, 20),
    Row("step", "lora/R1@K8", "ours", "speedup", 9.0, "x", 9.0, 9.0, 8),
    Row("rollout", "lora", "ours", "states_per_second", 106.0, "1/s", 104.0, 109.0, 20),
    Row("cost", "lora", "ours", "launches_per_step", 5463.0, ""),
    Row("cost", "lora", "R1", "launches_per_step", 68874.0, ""),
]


def test_the_committed_table_is_that_of_the_committed_results():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.whole(text, readme.RESULTS) == text, "run python -m bench.readme"


def test_the_table(tmp_path):
    write_results(tmp_path / "a", FACTS, ROWS)
    assert readme.block([tmp_path / "a"]) == (
        "| `nano` on A CPU, 2 threads: over the peer's, median (p20..p80) | LoRA | full fine-tuning |\n"
        "| --- | --- | --- |\n"
        "| training step over the published step | 2.25 x (2.20..2.30) | 1.75 x (1.70..1.80) |\n"
        "| the same, a second | 106 (104..109) |  |\n"
        "\n"
        "| Z-Image at 1024^2 by count, ours / published | LoRA | full fine-tuning |\n"
        "| --- | --- | --- |\n"
        "| kernel launches a step | 5,463 / 68,874 |  |\n"
        "\n"
        "(`bench/results/a`, commit 012345678, torch 2.13.0.)\n"
    )


def test_of_each_machine_the_newest_counts(tmp_path):
    for name, more in {"2026-01-01-cpu": {}, "2026-02-01-cpu": {}, "2026-03-01-cpu": {"quick": True},
                       "2026-01-02-h100": {"gpu": "NVIDIA H100"}}.items():
        write_results(tmp_path / name, FACTS | more, ROWS)
    assert [path.name for path in readme.newest(tmp_path)] == ["2026-02-01-cpu", "2026-01-02-h100"]


def test_the_table_of_the_comparison(tmp_path):
    rows = [
        Row("reproduce", "target@4_steps", arm, "patch_fd", value, "", n=3, low=value - 0.05, high=value + 0.05)
        for arm, value in (("start", 9.0), ("sft", 0.7), ("dopsd", 0.4))
    ]
    answers = (("a", 1, 3), ("b", -1, 3), ("c", 0, 0))
    rows += [Row("reproduce", name, "ours", "claim", value, "", n=n) for name, value, n in answers]
    write_results(tmp_path / "2026-01-01-cpu", FACTS, ROWS)
    write_results(tmp_path / "2026-02-01-reproduce", FACTS, rows)
    assert [path.name for path in readme.newest(tmp_path)] == ["2026-01-01-cpu"]
    text = f"{readme.BEGIN}\n{readme.END}\n{readme.REPRODUCED[0]}\n{readme.REPRODUCED[1]}\n"
    found = readme.whole(text, tmp_path)
    assert "| paper: FID | DINO dist. | Quality | Aesthetic | GenEval | DPG |\n" in found and "| D-OPSD |  | 0.400" in found
    assert "| SFT |  | 0.700 (0.650..0.750) |  |  |  | 82.2 | 0.1896 | 2.61 | 2.49 | 0.159 | 70 |" in found
    assert "Claims supported: `a`; contradicted: `b`." in found and "training step over" in found
    assert readme.whole(found, tmp_path) == found
    assert "four images" not in found and "changed in one thing" not in found
    more = [replace(rows[0], variant=arm, value=0.5, low=0.4, high=0.6) for arm in ("custom_pso", "weight_mu")]
    write_results(tmp_path / "2026-02-01-reproduce", FACTS, [*rows, *more])
    _, custom, ablations = readme.whole(text, tmp_path).split("| 4 steps a picture unless said |")[1:]
    assert "| start |" in custom and "| 4 images, LoRA: PSO |  | 0.500 (0.400..0.600) |  |  |  | 0.057 |  |" in custom
    assert "| D-OPSD |" in ablations and "| weight mu |  | 0.500" in ablations and "PSO" not in ablations


def test_the_command(tmp_path, monkeypatch, capsys):
    file = tmp_path / "README.md"
    file.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    monkeypatch.setattr(readme, "README", file)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.main([]) == 2 and "no results" in capsys.readouterr().err
    write_results(tmp_path / "a", FACTS, ROWS)
    assert readme.main(["--check"]) == 1 and "old" in file.read_text()
    assert "run python -m bench.readme" in capsys.readouterr().err
    assert readme.main([]) == 0 and readme.main(["--check"]) == 0
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "2.25 x" in text and "old" not in text
    write_results(tmp_path / "a", FACTS, [replace(ROWS[0], value=3.0), *ROWS[1:]])
    assert readme.main(["--check"]) == 1
    file.write_text("no marks")
    assert readme.main([]) == 2 and "are missing" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [[], [replace(ROWS[0], suite="zero")]])
def test_results_without_what_the_table_shows(rows, tmp_path):
    write_results(tmp_path / "a", FACTS, rows)
    assert readme.block([tmp_path / "a"]) == ""
