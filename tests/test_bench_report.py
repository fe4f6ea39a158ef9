"""Tables, progress, plots and report of the benchmark, on rows that are made up."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench.report import page as report
from bench.report import plots
from bench.report import tables as show
from bench.results import Row, failed, write_results

ROOT = Path(__file__).resolve().parent.parent
FACTS = {
    "cpu": "some <CPU>", "threads": 2, "commit": "0123abc", "model": "nano", "device": "cpu", "load": [0.5, 0.25],
    "torch": "2.13", "gpu": None, "quick": False,
}
REASON = "RuntimeError: <script>alert('no compiler')</script> & \"more\""


def spread(value: float) -> dict:
    return {"value": value, "p20": 0.96 * value, "p80": 1.05 * value, "n": 20}


def made_up() -> list[Row]:
    """Something for every suite and plot, a failure and a fallback."""
    rows = []
    for kind in ("lora", "full"):
        for end in ("", "@K8"):
            for variant, slower in (("ours", 1.0), ("R1", 2.25), ("R4", 1.375)):
                seconds = spread(0.51625 * slower)
                if (variant, end) == ("R4", "@K8"):
                    rows.append(failed("step", f"{kind}@K8", "R4", "seconds_per_step", "s", REASON))
                    rows.append(failed("step", f"{kind}/R4@K8", "ours", "speedup", "x", REASON))
                    continue
                rows.append(Row("step", f"{kind}{end}", variant, "seconds_per_step", unit="s", **seconds))
                rows.append(Row("step", f"{kind}{end}", variant, "gradient_relative_error", 2.74924e-07, ""))
                if variant != "ours":
                    rows.append(Row("step", f"{kind}/{variant}{end}", "ours", "speedup", unit="x", **spread(slower)))
                for part, share in (("gemm", 0.75), ("idle", 0.25)):
                    if variant != "R4" and not end:
                        rows.append(Row("profile", kind, variant, f"seconds_{part}", share * seconds["value"], "s"))
        rows.append(Row("step", kind, "floor", "seconds_per_step", unit="s", **spread(0.31725)))
        rows.append(Row("step", kind, "encoders", "seconds_per_step", unit="s", **spread(0.12975)))
        rows.append(Row("rollout", kind, "ours", "states_per_second", unit="1/s", **spread(61.75)))
        rows.append(Row("rollout", f"{kind}/R1", "ours", "speedup", unit="x", **spread(2.625)))
        rows.append(Row("memory", kind, "ours", "peak_bytes", 19.2e9, "B"))
        rows.append(Row("memory", kind, "R1", "peak_bytes", 24.75e9, "B"))
        rows.append(Row("memory", kind, "planner", "planned_bytes", 20.5e9, "B"))
        rows.append(Row("memory", f"{kind}/R1", "ours", "peak_ratio", 19.2 / 24.75, "x"))
        rows.append(Row("memory", f"{kind}@full_size", "ours", "peak_bytes", 31.0e9, "B"))
        rows.append(Row("zero", kind, "ours", "gathers_per_step", 2.0, ""))
        rows.append(Row("zero", kind, "plain", "gathers_per_step", 16.0, ""))
        rows.append(Row("cost", kind, "ours", "launches_per_step", 5500.0, ""))
        rows.append(Row("cost", kind, "R1", "launches_per_step", 68874.0, ""))
    for arm, value in (("start", 9.0), ("dopsd", 0.4), ("off_policy", 0.5), ("live_teacher", 24.0)):
        for step in (0, 100):
            for domain, metric in (("target", "style_distance"), ("target", "patch_fd"), ("original", "patch_fd")):
                ends = {"low": 0.9 * value, "high": 1.1 * value}
                rows.append(Row("reproduce", f"{domain}@step_{step}", arm, f"curve_{metric}", value, "", n=3, **ends))
    rows.append(Row("kernels", "copy", "copy", "bytes_per_second", 2.625e10, "B/s"))
    rows.append(Row("kernels", "gemm", "gemm", "flops_per_second", 2.3125e11, "FLOP/s"))
    for phase in ("forward", "backward"):
        for op, work in (("swiglu", 8.0e6), ("attention", 4.0e8)):
            rows.append(Row("kernels", op, "ours", f"bytes_{phase}", 1.0e7, "B"))
            rows.append(Row("kernels", op, "ours", f"flops_{phase}", work, "FLOP"))
            for variant, seconds in (("ours", 0.003125), ("eager", 0.0065)):
                fell = {"status": "fallback", "note": "not built"} if variant == "ours" else {}
                rows.append(Row("kernels", op, variant, f"seconds_{phase}", unit="s", **spread(seconds), **fell))
                rate = spread(work / seconds)
                rows.append(Row("kernels", op, variant, f"flops_per_second_{phase}", unit="FLOP/s", **rate, **fell))
            rows.append(Row("kernels", f"{op}/eager", "ours", f"speedup_{phase}", unit="x", **spread(2.08)))
    rows.append(Row("kernels", "kernels", "ours", "suite_seconds", 41.25, "s"))
    return rows


def of(suite: str) -> list[Row]:
    return [row for row in made_up() if row.suite == suite]


def shown(rows: list[Row], width: int) -> list[Row]:
    """In the cells of their tables."""
    return [row for grid in show.grids(rows, width) for line in grid.lines for row in line[2] if row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a report."""
    folder = tmp_path_factory.mktemp("results")
    write_results(folder, FACTS, made_up())
    assert report.write_report(folder) == folder / "report.html"
    return folder


# ---- numbers and tables ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "metric", "unit", "said"), [
    (0.0123456, "seconds_per_step", "s", "12.3 ms"),
    (3.04e-5, "seconds_forward", "s", "30.4 us"),
    (1.1806, "seconds_per_step", "s", "1.18 s"),
    (2.5e-10, "seconds", "s", "0.250 ns"),
    (0.0, "seconds_communication", "s", "0 s"),
    (24.75e9, "peak_bytes", "B", "24.8 GB"),
    (512.0, "bytes", "B", "512 B"),
    (44.34, "gigabytes_per_second", "GB/s", "44.3 GB/s"),
    (808.4, "gemm_tflop_per_step", "TFLOP", "808 TFLOP"),
    (54.44, "gemm_gflop_per_step", "GFLOP", "54.4 GFLOP"),
    (0.6167, "floor_share", "", "61.7%"),
    (2.269, "speedup", "x", "2.27x"),
    (68874.0, "launches_per_step", "", "68,874"),
    (0.0, "gathers_per_step", "", "0"),
    (2.749e-07, "gradient_relative_error", "", "2.7e-07"),
])
def test_numbers_are_read_in_fitting_units(value, metric, unit, said):
    assert show.read(Row("s", "c", "ours", metric, value, unit))[0] == said


def test_a_spread_has_the_unit_of_its_value():
    row = Row("step", "lora", "ours", "seconds_per_step", 0.98, "s", 0.95, 1.02, 20)
    assert show.read(row) == ("980 ms", "950..1,020")
    assert show.read(replace(row, n=1)) == ("980 ms", "")
    assert show.read(replace(row, status="fallback"))[0] == "980 ms*"
    assert show.read(failed("step", "lora", "ours", "seconds_per_step", "s", "no")) == ("failed", "")


def test_every_row_has_its_cell_and_a_ratio_stands_with_its_peer():
    rows = of("step")
    for width in (60, 80, 120, 400):
        assert sorted(row.key for row in shown(rows, width)) == sorted(row.key for row in rows)
    (grid,) = show.grids(rows, 400)
    lines = {(case, variant): dict(zip(grid.metrics, cells)) for case, variant, cells in grid.lines}
    assert lines["lora", "R1"]["speedup"].value == 2.25 and lines["lora@K8", "R1"]["speedup"].case == "lora/R1@K8"
    assert lines["lora@K8", "R4"]["speedup"].status == "failed" and lines["lora", "ours"]["speedup"] is None
    assert [variant for case, variant, _ in grid.lines if case == "lora"] == ["ours", "R1", "R4", "floor", "encoders"]


def test_a_ratio_stands_in_the_line_of_its_peer_where_that_has_one():
    alone = Row("memory", "lora/R1@recompute", "ours", "peak_ratio", 0.9, "x")
    named = Row("optimizer", "bfloat16@low_bits/torch", "ours", "speedup", 1.5, "x")
    beside = Row("optimizer", "bfloat16@low_bits", "torch", "seconds_per_step", 0.5, "s")
    places = [[line[:2] for grid in show.grids(rows, 120) for line in grid.lines] for rows in ([alone], [named, beside])]
    assert places == [[("lora/R1@recompute", "ours")], [("bfloat16@low_bits", "torch")]]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("suite", ["step", "kernels", "memory", "cost"])
def test_the_terminals_tables_keep_to_the_width(suite, width, capsys):
    show.show(suite, of(suite), show.console_of(width))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= width and "\x1b" not in said and said.strip().startswith(suite)
    tables = " ".join(said.split())
    for row in of(suite):
        assert " ".join(show.read(row)).strip() in tables, row
    if suite == "step":
        assert "failed" in said and "alert('no compiler')" in said
    if suite == "kernels":
        assert "* fallback: not built" in said and "in 41.2 s; medians, p20..p80" in said


def test_no_rows_are_said_to_be_none(capsys):
    show.show("step", [], show.console_of())
    assert capsys.readouterr().out.split() == ["step", "no", "results"]


# ---- plots -----------------------------------------------------------------------------------------------------------


def test_plots_are_drawn_alike_every_time_and_only_where_there_are_rows(folder, tmp_path):
    again = plots.draw(made_up(), FACTS, tmp_path / "again")
    assert {path.stem for path in again} == set(plots.PLOTS)
    for one in again:
        assert one.read_bytes() == (folder / "plots" / one.name).read_bytes() and one.read_bytes().startswith(b"\x89PNG")
    assert plots.draw([], FACTS, tmp_path / "none") == []
    assert plots.draw([failed("step", "step", "ours", "suite", "", "all of it")], FACTS, tmp_path / "none") == []


# ---- the report ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would load, and the text that it would show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def written(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_report_needs_nothing_else(written):
    page = Page(written)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href", "action", "data", "poster", "background"):
            target = attributes.get(name)
            assert target is None or target.startswith("data:image/png;base64," if tag == "img" else "#"), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
    style = "".join(re.findall(r"<style>(.*?)</style>", written, re.DOTALL))
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert "://" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", written)
    assert len(written.encode()) < 5e6
    assert sum(tag == "img" for tag, _ in page.tags) == len(plots.PLOTS)
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"} <= anchors


def test_the_report_shows_every_row(written):
    page = Page(written)
    texts = {text.strip() for text in page.texts}
    hovered = {attributes["title"] for tag, attributes in page.tags if tag == "td" and "title" in attributes}
    for row in made_up():
        if row.metric != show.SUITE_SECONDS and not row.metric.startswith(show.PLOTTED):
            number = "" if row.value is None else f" = {row.value} {row.unit}, n = {row.n}"
            assert f"{row.case}, {row.variant}: {row.metric}{number}{row.note and '; '}{row.note}" in hovered, row
            assert show.read(row)[0] in texts, row
        assert row.value is None or str(row.value) in texts, row
    assert "in 41.2 s; medians, p20..p80" in texts and {"load", "0.5, 0.25", "some <CPU>"} <= texts and "gpu" not in texts


def test_the_report_says_what_failed_before_anything_else_and_escapes_it(written):
    assert "<script" not in written and "some <CPU>" not in written
    text = " ".join(Page(written).texts)
    first = text.index(REASON)
    assert text.index("Not measured") < first < text.index("How to read this")
    assert text.index("not built") < text.index("How to read this")
    for one in ("lora@K8: R4 (seconds_per_step, speedup); full@K8: R4 (seconds_per_step, speedup)", "swiglu: ours"):
        assert one in text


def test_a_page_without_failures_has_no_box_and_says_what_repeats_it(tmp_path):
    write_results(tmp_path, FACTS | {"command": "python bench/run.py cost"}, of("cost"))
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "<pre>python bench/run.py cost</pre>" in page and 'class="box' not in page and "<img" not in page


def test_the_command_line(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "bench.report", *arguments], capture_output=True, text=True, cwd=ROOT)

    write_results(tmp_path / "out", FACTS, [Row("strange", "case", "ours", "metric", 1.5, "")])
    done = run(str(tmp_path / "out"))
    assert done.returncode == 0 and "strange" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8"), done.stderr
    done = run(str(tmp_path / "none"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_committed_results_can_be_shown(tmp_path, capsys):
    files = [file for file in (ROOT / "bench" / "results").glob("*/*.json") if "rows" in json.loads(file.read_text())]
    assert files
    for file in files:
        content = json.loads(file.read_text())
        rows = [Row(**row) for row in content["rows"]]
        plots.draw(rows, content["environment"], tmp_path)
        for suite in dict.fromkeys(row.suite for row in rows):
            mine = [row for row in rows if row.suite == suite]
            show.show(suite, mine, show.console_of(80))
            left_out = {row.key for row in mine} - {row.key for row in shown(mine, 80)}
            assert {metric for *_, metric in left_out if not metric.startswith(show.PLOTTED)} <= {show.SUITE_SECONDS}
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
