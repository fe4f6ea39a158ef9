"""Data sets as people bring them: nothing is trained on as something else than was meant without a word.

Each case is from a public report. What a set is read as is asked of `read_records`; what a person sees of it, of a run.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from dopsd_fast.data.images import is_other_picture, is_readable
from dopsd_fast.data.records import Dataset, read_records
from dopsd_fast.errors import UserError
from dopsd_fast.run.accounts import of_records
from dopsd_fast.run.folder import _changes, _read_data
from dopsd_fast.settings.schema import DataSettings
from tests.driving import numbers, picture, start, words

RUN = dict(train__steps=1, sample__count=0, checkpoint__every=0)


def jsonl(folder: Path, **columns) -> Path:
    """Four records with the pictures 0.png ... 3.png; `{}` in a column's text is the record's number."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
        texts = {name: value.format(i) if isinstance(value, str) else value for name, value in columns.items()}
        lines.append({"local_path_list": [f"{i}.png"]} | texts)
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def pairs(folder: Path, count: int = 4, text: str = "a cat {}", suffix: str = ".txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
        (folder / f"{i}{suffix}").write_bytes(text.format(i).encode())
    return folder


def read(path: Path, **more) -> Dataset:
    return read_records(DataSettings(path=str(path), **more), 8)


def error(path: Path, **more) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def notes(dataset: Dataset, subject: str) -> str:
    return " | ".join(text for name, text in dataset.notes if name == subject)


# ---- several pictures a record ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    ["64*96", ["32*32", "32*32", "64*96"], ["64*96"], [[32, 32], [32, 32], [64, 96]], [64, 96]],
    ids=["one", "list", "list of one", "list of numbers", "numbers"],
)
def test_the_last_picture_is_the_target(tmp_path, size):
    for name, shape in (("ref0", (32, 32)), ("ref1", (32, 32)), ("target", (96, 64))):
        Image.new("RGB", shape).save(tmp_path / f"{name}.png")
    line = {"local_path_list": ["ref0.png", "ref1.png", "target.png"], "h*w": size, "short_en": "move the ball"}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    dataset = read(tmp_path / "data.jsonl", resolution=64)
    record = dataset.records[0]
    assert [file.name for file in record.images] == ["target.png", "ref0.png", "ref1.png"]
    assert record.size == (64, 96) and record.width > record.height
    said = notes(dataset, "pictures")
    assert "1 record(s)" in said and "target.png" in said and "left out" in said
    assert not notes(dataset, "sizes")


@pytest.mark.parametrize("size", [["64*96", "32*32"], ["64*96", 5, "1*1"], [1, 2, 3], "64", [0, 3]])
def test_a_list_of_sizes_that_fits_no_picture_is_named(tmp_path, size):
    file = jsonl(tmp_path, short_en="a cat {}", **{"h*w": size})
    assert '"h*w"' in error(file) and "data.jsonl:1" in error(file)


# ---- columns ---------------------------------------------------------------------------------------------------------


def test_unknown_columns_beside_known_ones_are_no_prompts(tmp_path):
    file = jsonl(tmp_path, short_en="a cat {}", Caption="photo of cat {}", captioner="qwen-vl-max", style="photo", medium="oil")
    dataset = read(file)
    assert dataset.records[1].prompts == {"short_en": "a cat 1", "Caption": "photo of cat 1"}
    said = notes(dataset, "prompts")
    assert said.startswith("columns short_en, Caption; no prompts: captioner, style, medium") and "data.prompt_keys" in said
    chosen = read(file, prompt_keys=["style"])
    assert chosen.records[0].prompts == {"style": "photo"}
    assert notes(chosen, "prompts").startswith("column style; no prompts: short_en")


def test_a_set_with_unknown_columns_only_is_refused(tmp_path):
    file = jsonl(tmp_path, captioner="qwen-vl-max", style="photo {}")
    for more in ({}, {"skip_bad": True}):
        assert "data.prompt_keys" in error(file, **more) and "captioner, style" in error(file, **more)
    assert read(file, prompt_keys=["style"]).records[3].prompts == {"style": "photo 3"}


def test_a_record_without_the_known_columns_of_the_others_is_bad(tmp_path):
    file = jsonl(tmp_path, short_en="a cat {}")
    lines = file.read_text().splitlines()
    lines[2] = json.dumps({"local_path_list": ["2.png"], "style": "photo", "short_en": None})
    file.write_text("\n".join(lines))
    assert f"{file}:3: no prompt" in error(file) and "style" in error(file)
    dataset = read(file, skip_bad=True)
    assert [record.prompts for record in dataset.records] == [{"short_en": f"a cat {i}"} for i in (0, 1, 3)]


# ---- types of pictures, letters' case, links -------------------------------------------------------------------------


def test_every_type_that_pillow_opens_is_read(tmp_path):
    kinds = {"avif": "AVIF", "jfif": "JPEG", "jp2": "JPEG2000", "tga": "TGA", "webp": "WEBP", "PNG": "PNG", "mpo": "MPO"}
    for kind, name in kinds.items():
        picture(0, (32, 24)).save(tmp_path / f"{kind}.{kind}", format=name)
        (tmp_path / f"{kind}.txt").write_text(f"a {kind}")
    records = read(tmp_path).records
    assert sorted(record.prompts["caption"] for record in records) == sorted(f"a {kind}" for kind in kinds)


def test_other_pictures_beside_a_caption_are_named(tmp_path):
    pairs(tmp_path)
    (tmp_path / "4.HEIC").write_bytes(b"ftypheic")
    (tmp_path / "4.txt").write_text("a cat 4")
    (tmp_path / "logo.svg").write_text("<svg/>")
    (tmp_path / "notes.md").write_text("mine")
    text = error(tmp_path)
    assert str(tmp_path / "4.HEIC") in text and ".HEIC cannot be read" in text and "data.skip_bad" in text
    dataset = read(tmp_path, skip_bad=True)
    assert len(dataset.records) == 4 and len(dataset.skipped) == 1
    assert "logo.svg" in notes(dataset, "left out") and "notes.md" not in notes(dataset, "left out")
    for kind in ("eps", "wmf", "jxl", "dng", "cr3"):
        assert is_other_picture(f"a.{kind}") and not is_readable(f"a.{kind}")


def test_a_folder_of_unreadable_pictures_alone_names_the_first(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a cat")
    assert "a.heic" in error(tmp_path)
    assert "every record" in error(tmp_path, skip_bad=True) and "a.heic" in error(tmp_path, skip_bad=True)


def test_the_case_of_letters_does_not_matter(tmp_path):
    for i, (image, caption) in enumerate((("A.JPG", "A.TXT"), ("b.Png", "B.txt"), ("c.jpeg", "c.Txt"))):
        picture(i).save(tmp_path / image, format="PNG")
        (tmp_path / caption).write_text(f"a cat {i}")
    dataset = read(tmp_path)
    assert [record.prompts["caption"] for record in dataset.records] == ["a cat 0", "a cat 1", "a cat 2"]
    assert not dataset.skipped
    sensitive = pairs(tmp_path / "two", 1)
    picture(5).save(sensitive / "a.png")
    for name in ("a.txt", "A.txt"):
        (sensitive / name).write_text(name)
    assert {record.prompts["caption"] for record in read(sensitive).records} == {"a cat 0", "a.txt"}
    shutil.move(sensitive / "a.txt", sensitive / "a.TXT")
    assert {record.prompts["caption"] for record in read(sensitive).records} == {"a cat 0", "a.txt"}
    shutil.move(sensitive / "a.png", sensitive / "A.png")
    shutil.move(sensitive / "A.txt", sensitive / "a.Txt")
    assert "a.TXT and a.Txt both fit" in error(sensitive)


def test_names_in_a_jsonl_may_differ_in_case(tmp_path):
    file = jsonl(tmp_path / "Set", short_en="a cat {}")
    file.write_text(file.read_text().replace("1.png", "1.PNG"))
    (tmp_path / "Set" / "Sub").mkdir()
    shutil.move(tmp_path / "Set" / "2.png", tmp_path / "Set" / "Sub" / "Two.png")
    file.write_text(file.read_text().replace("2.png", "SUB/two.PNG"))
    assert [record.images[0].name for record in read(file).records] == ["0.png", "1.png", "Two.png", "3.png"]
    file.write_text(file.read_text().replace('"3.png"', json.dumps(str(tmp_path / "SET" / "3.Png"))))
    assert read(file).records[3].images[0] == tmp_path / "Set" / "3.png"
    upper = file.rename(file.with_name("METADATA.JSONL"))
    upper.write_text(upper.read_text().replace("local_path_list", "File_Name").replace("short_en", "text"))
    assert read(upper.parent).format == "huggingface"


def test_linked_folders_are_followed_and_loops_survived(tmp_path):
    set_, elsewhere = pairs(tmp_path / "set", 2), pairs(tmp_path / "elsewhere", 2, "a dog {}")
    (set_ / "more").symlink_to(elsewhere, target_is_directory=True)
    (set_ / "again").symlink_to(elsewhere, target_is_directory=True)  # read once
    (set_ / "loop").symlink_to(set_, target_is_directory=True)
    (elsewhere / "back").symlink_to(set_, target_is_directory=True)
    (set_ / "nowhere").symlink_to(tmp_path / "gone", target_is_directory=True)
    (set_ / "itself").symlink_to(set_ / "itself")
    dataset = read(set_)
    assert "2 link(s) that lead nowhere: itself, nowhere" in notes(dataset, "left out")
    assert sorted(record.prompts["caption"] for record in dataset.records) == ["a cat 0", "a cat 1", "a dog 0", "a dog 1"]
    inner = pairs(set_ / "z", 1, "a bird")
    (set_ / "a").symlink_to(inner, target_is_directory=True)  # by its own path, not by the link's
    assert [record.images[0].parent for record in read(set_).records if record.prompts["caption"] == "a bird"] == [inner]
    (set_ / "3.png").symlink_to(tmp_path / "gone.png")
    (set_ / "3.txt").write_text("a cat")
    assert "3.png" in error(set_) and "does not exist" in error(set_)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (pairs(tmp_path, 2) / "closed").mkdir()
    scan = os.scandir

    def refuse(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read every folder
    assert f"{tmp_path / 'closed'}: Permission denied" in error(tmp_path)


def test_one_caption_for_two_pictures_is_said(tmp_path):
    pairs(tmp_path, 2)
    picture(7).save(tmp_path / "0.jpg")
    said = notes(read(tmp_path), "prompts")
    assert "0.txt (2 pictures)" in said


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_a_stated_size_that_contradicts_the_picture_is_said(tmp_path):
    file = jsonl(tmp_path, short_en="a cat {}", **{"h*w": "576*1344"})
    for i in range(4):
        Image.new("RGB", (64, 150)).save(tmp_path / f"{i}.png")
    dataset = read(file, resolution=64)
    assert all(record.height > record.width for record in dataset.records)
    said = notes(dataset, "sizes")
    assert "4 record(s)" in said and "576*1344 stated, 150*64 found" in said


@pytest.mark.parametrize("stated, said", [("1000*1020", False), ("1000*1021", True), ("1020*1000", False), ("1021*1000", True)])
def test_two_per_cent_is_the_limit(tmp_path, stated, said):
    file = jsonl(tmp_path, short_en="a cat {}", **{"h*w": stated})  # the pictures are square
    assert bool(notes(read(file), "sizes")) == said


def test_a_turned_picture_contradicts_nothing(tmp_path):
    file = jsonl(tmp_path, short_en="a cat {}", **{"h*w": "48*24"})
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(4):
        Image.new("RGB", (48, 24)).save(tmp_path / f"{i}.png", exif=exif)
    assert not notes(read(file), "sizes")


# ---- a set that changed between stop and resume ----------------------------------------------------------------------


def test_content_is_known_by_its_bytes(tmp_path):
    before = of_records(read(pairs(tmp_path)))
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    after = of_records(read(tmp_path))
    assert [i for i in before if before[i] != after[i]] == ["1"] and before["1"]["picture"] != after["1"]["picture"]


def test_a_large_picture_is_known_by_all_its_bytes(tmp_path):
    Image.new("RGB", (700, 700)).save(tmp_path / "0.bmp")  # not compressed: a change stays where it is
    (tmp_path / "0.txt").write_text("a cat")
    before = of_records(read(tmp_path))
    content = bytearray((tmp_path / "0.bmp").read_bytes())
    content[len(content) // 3 + 5000] ^= 255
    (tmp_path / "0.bmp").write_bytes(content)
    assert _changes(before, of_records(read(tmp_path))) == "the picture of 0.bmp changed"


@pytest.mark.parametrize("text", ["", "[]", '{"records": [1]}', '{"records": {"0": {"a": 1}}}', '{"records": null}'])
def test_a_damaged_account_of_the_data_is_one_line(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match="data.json is damaged"):
        _read_data(tmp_path / "data.json")
    assert _read_data(tmp_path / "none.json") is None


def test_column_names_are_shown_on_one_line(tmp_path):
    file = jsonl(tmp_path, short_en="a cat {}", **{"odd\nname": "x", "\ud800": "y"})
    said = notes(read(file), "prompts")
    assert "odd name" in said and "\\ud800" in said and said.isprintable()


def add(folder):
    picture(9).save(folder / "00.png")
    (folder / "00.txt").write_text("a new cat")
    return "1 record(s) added (00.png)"


def remove(folder):
    (folder / "2.png").unlink()
    (folder / "2.txt").unlink()
    return "1 record(s) removed (2.png)"


def reword(folder):
    (folder / "3.txt").write_text("a dog")
    return "the prompts of 3.png changed"


def redraw(folder):
    picture(8).save(folder / "1.png")
    return "the picture of 1.png changed"


@pytest.mark.parametrize("change", [add, remove, reword, redraw])
def test_what_changed_is_told(tmp_path, change):
    before = of_records(read(pairs(tmp_path)))
    said = change(tmp_path)
    assert _changes(before, of_records(read(tmp_path))) == said
    assert not _changes(before, before)


def test_a_changed_set_is_refused(tmp_path):
    """Nothing is lost by it: with the set restored, the run goes on to the numbers of an undisturbed one."""
    folder = pairs(tmp_path / "set")
    settings = dict(data__path=str(folder), train__steps=2, checkpoint__every=1, sample__count=0, resume="auto")
    run, straight = tmp_path / "run", tmp_path / "straight"
    start(words(**settings, output__dir=str(straight))).succeed()
    start(words(**settings | {"train__steps": 1}, output__dir=str(run))).succeed()
    kept = {file: file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file() and file.name != ".lock"}
    said = add(folder)
    start(words(**settings, output__dir=str(run))).fail("data.path", "is not what", said, "restore")
    start(words(**settings | {"resume": str(run)}, output__dir=str(tmp_path / "branch"))).fail(said)
    assert {file: file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file() and file.name != ".lock"} == kept
    (folder / "00.png").unlink()
    (folder / "00.txt").unlink()
    start(words(**settings, output__dir=str(run))).succeed()
    assert numbers(run) == numbers(straight) and len(numbers(run)) == 2


# ---- what a person sees ----------------------------------------------------------------------------------------------


def test_the_first_screen_says_how_the_set_was_read(tmp_path):
    """Paragraphs and tabs are one prompt and are drawn; what was read otherwise than expected stands on the first screen."""
    folder = tmp_path / "set"
    caption = "a red ball {}\n\nSecond paragraph,\twith a tab and\u2028more.\r\n" + "and more " * 80
    jsonl(folder, short_en=caption, style="photo", **{"h*w": "576*1344"})
    (folder / "broken.png").write_bytes(b"")
    with open(folder / "data.jsonl", "a") as file:
        file.write(json.dumps({"local_path_list": ["broken.png"], "short_en": "x"}) + "\n")
        file.write(json.dumps({"local_path_list": ["0.png", "1.png"], "short_en": "move it"}) + "\n")
    run = tmp_path / "run"
    settings = RUN | dict(data__path=str(folder), data__skip_bad=True, sample__count=2, output__dir=str(run))
    job = start(words(**settings)).succeed()
    lines = job.out.splitlines()
    screen = lines[: next(i for i, line in enumerate(lines) if line.startswith("plan:"))]
    shown = "\n".join(" ".join(line.split()) for line in screen)
    for part in ("prompts column short_en; no prompts: style", "576*1344 stated", "left out", "broken.png is empty",
                 "1 record(s) have several pictures (1.png)"):
        assert part in shown, part
    assert (run / "samples" / "step-000001.png").is_file()
    begun = json.loads((run / "data.json").read_text())["records"]
    assert begun["0"]["prompts"]["short_en"].startswith("a red ball 0\n\nSecond paragraph,\twith a tab and\u2028more.")
    assert begun["4"]["images"] == ["1.png", "0.png"]
