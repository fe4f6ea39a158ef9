"""Data as people bring it: the authors' own set from its folder, and a small set in each of the three formats."""

import signal
from pathlib import Path

import pytest

from tests.driving import (
    assert_same_run,
    authors_jsonl,
    huggingface_folder,
    image_folder,
    numbers,
    rows,
    start,
    wait_for_step,
    words,
)

SHARED = Path(__file__).parents[2] / "shared"
CORGI = SHARED / "data" / "dopsd-official" / "dataset" / "corgi"


def needs_corgi() -> None:
    if not (CORGI / "data.jsonl").is_file():
        pytest.skip("needs shared data/dopsd-official")


@pytest.fixture(scope="module")
def context_cache(tmp_path_factory) -> Path:
    """Shared by the runs of a set, as a user's would be."""
    return tmp_path_factory.mktemp("contexts")


def train(run: Path, data: Path, cache: Path, **more) -> list[str]:
    common = dict(data__path=str(data), output__dir=str(run), resume="auto", data__resolution=64, train__steps=5,
                  train__batch_size=1, train__accumulation=1, checkpoint__every=2, conditioning__cache="disk",
                  conditioning__folder=str(cache), conditioning__max_text_tokens=512)
    return words(**common | more)


@pytest.mark.parametrize(("kind", "ranks"), [("full", 1), ("lora", 2)])
def test_the_authors_set_trains_as_it_is(kind, ranks, context_cache, tmp_path):
    """Whole; and killed once, stopped once and continued: the same numbers and weights, from the file or from its folder. The
    other two pairs of kind and ranks are below, with a set of that format."""
    needs_corgi()
    whole, run = tmp_path / "whole", tmp_path / "run"
    job = start(train(whole, CORGI / "data.jsonl", context_cache, adapter__kind=kind), ranks).succeed()
    assert "4 records in 1 bucket(s), 0 skipped" in job.out
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows(whole))

    for step, number in ((1, signal.SIGKILL), (3, signal.SIGTERM)):
        job = start(train(run, CORGI / "data.jsonl", context_cache, adapter__kind=kind), ranks)
        wait_for_step(run, step, job)
        job.kill(number)
        job.wait()
        assert any(job.codes)
    start(train(run, CORGI / "data.jsonl", context_cache, adapter__kind=kind), ranks).succeed()
    assert_same_run(run, whole, ("export", "export_teacher"))

    if ranks == 1:  # named by its folder; and by a path that starts elsewhere
        named = [train(tmp_path / "folder", CORGI, context_cache, adapter__kind=kind, train__steps=2)]
        relative = dict(data__root=str(CORGI.parents[1]), adapter__kind=kind, train__steps=2)
        named.append(train(tmp_path / "relative", Path("corgi/data.jsonl"), context_cache, **relative))
        for settings, name in zip(named, ("folder", "relative")):
            start(settings, cwd=CORGI.parent).succeed()
            assert numbers(tmp_path / name) == numbers(whole)[:2]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_four_images_at_batch_8_and_with_one_language(kind, context_cache, tmp_path):
    """A set smaller than the batch wraps around; prompts are drawn from the named fields alone."""
    needs_corgi()
    more = dict(adapter__kind=kind, train__batch_size=8, train__steps=2, data__prompt_keys=["short_en"])
    start(train(tmp_path / "run", CORGI, context_cache, **more)).succeed()
    table = rows(tmp_path / "run")
    assert [row["epoch"] for row in table] == [0, 1] and len({row["loss"] for row in table}) == 2


FORMATS = {"folder": image_folder, "huggingface": huggingface_folder, "jsonl": authors_jsonl}


@pytest.mark.parametrize("name", FORMATS)
def test_three_formats_killed_and_continued(name, context_cache, tmp_path):
    """Each at one and two ranks, full and LoRA; 4 images at a batch of 8, so that each step is an epoch."""
    data = FORMATS[name](tmp_path / "set")
    small = dict(data__resolution=16, train__steps=4)
    for ranks, kind in ((1, "full"), (2, "lora")) if name != "jsonl" else ((2, "full"), (1, "lora")):
        whole, run = tmp_path / f"whole-{kind}", tmp_path / f"run-{kind}"
        small["train__batch_size"] = 8 // ranks
        job = start(train(whole, data, context_cache, adapter__kind=kind, **small), ranks).succeed()
        assert "4 records" in job.out and f"batch 8 = {8 // ranks} x 1 x {ranks} rank(s)" in job.out
        epochs = [row["epoch"] for row in rows(whole)]
        assert epochs == ([0, 0, 1, 1] if name == "jsonl" else [0, 1, 2, 3])  # jsonl: two buckets

        job = start(train(run, data, context_cache, adapter__kind=kind, **small), ranks)
        wait_for_step(run, 2, job)
        job.kill()
        job.wait()
        start(train(run, data, context_cache, adapter__kind=kind, **small), ranks).succeed()
        assert_same_run(run, whole)


def test_formats_agree(context_cache, tmp_path):
    """The same pictures and captions are the same numbers, however they are written down."""
    found = []
    for name in ("folder", "huggingface"):
        run = tmp_path / f"run-{name}"
        data = FORMATS[name](tmp_path / name)
        start(train(run, data, context_cache, data__resolution=16, train__steps=2)).succeed()
        found.append(numbers(run))
    assert found[0] == found[1]
