"""Data sets, images, buckets and epochs: what is read, what is refused and with which words."""

import json
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dopsd_fast.data.buckets import bucket_sizes, nearest_bucket
from dopsd_fast.data.epochs import epoch_batches, item_noise, item_seed, micro_batch
from dopsd_fast.data.images import MAX_PIXELS, check_image, image_digest, load_image
from dopsd_fast.data.records import Dataset, read_records
from dopsd_fast.errors import UserError
from dopsd_fast.settings.schema import DataSettings

CORGI = Path(__file__).resolve().parents[2] / "shared" / "data" / "dopsd-official"


def picture(height: int = 24, width: int = 24, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def write_set(folder: Path, count: int = 4, fmt: str = "jsonl", size=(24, 24)) -> Path:
    """A data set of `count` pictures in one of the three formats; returns what data.path takes."""
    (folder / "pics").mkdir(parents=True)
    lines = []
    for i in range(count):
        name = f"pics/{i}.png"
        picture(*size, seed=i).save(folder / name)
        if fmt == "jsonl":
            lines.append({"class_name": "c", "local_path_list": [name], "h*w": f"{size[0]}*{size[1]}"})
            lines[-1] |= {"short_en": f"short {i}", "detailed_en": f"detailed {i}"}
        elif fmt == "huggingface":
            lines.append({"file_name": name, "text": f"text {i}", "artist": "nobody", "id": i})
        else:
            (folder / f"pics/{i}.txt").write_text(f"caption {i}\n")
    if fmt == "folder":
        return folder / "pics"
    file = folder / ("data.jsonl" if fmt == "jsonl" else "metadata.jsonl")
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file if fmt == "jsonl" else folder


def read(path, multiple: int = 8, **more) -> Dataset:
    return read_records(DataSettings(path=str(path), **more), multiple)


def error(path, **more) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize(
    "fmt, prompts",
    [
        ("jsonl", {"short_en": "short 2", "detailed_en": "detailed 2"}),
        ("huggingface", {"text": "text 2"}),
        ("folder", {"caption": "caption 2"}),
    ],
)
def test_three_formats(tmp_path, fmt, prompts):
    dataset = read(write_set(tmp_path, fmt=fmt))
    assert (dataset.format, len(dataset.records), dataset.skipped) == (fmt, 4, [])
    record = dataset.records[2]
    assert (record.index, record.prompts, record.images) == (2, prompts, [tmp_path / "pics" / "2.png"])
    assert (record.height, record.width) == (32, 32)
    assert all(record.images[0].is_file() for record in dataset.records)


def test_folder_with_one_jsonl_below_and_with_several(tmp_path):
    write_set(tmp_path / "a" / "b")
    assert len(read(tmp_path).records) == 4
    write_set(tmp_path / "c")
    assert "2 .jsonl files" in error(tmp_path)


@pytest.mark.skipif(not CORGI.is_dir(), reason="needs shared/data/dopsd-official")
def test_the_authors_own_set():
    dataset = read(CORGI, multiple=16, resolution=64)
    # The root is found from the resolved path, and "shared" may be a symbolic link.
    assert len(dataset.records) == 4 and dataset.root == CORGI.resolve()
    assert dataset.records[0].size == (1024, 1024) and len(dataset.records[0].prompts) == 8
    assert dataset.records[0].prompts["short_en"] == "[V] in an outdoor scene"
    assert "class_name" not in dataset.records[0].prompts
    assert load_image(dataset.records[3].images[0], 64, 64).size == (64, 64)


def test_root_is_found_above_given_or_wrong(tmp_path, monkeypatch):
    file = write_set(tmp_path / "set")
    deep = tmp_path / "set" / "x" / "y" / "data.jsonl"
    deep.parent.mkdir(parents=True)
    file.rename(deep)
    assert read(deep).root == tmp_path / "set"
    elsewhere = tmp_path / "elsewhere.jsonl"
    deep.rename(elsewhere)
    assert read(elsewhere, root=str(tmp_path / "set")).root == tmp_path / "set"
    assert "pics/0.png does not exist" in error(elsewhere)
    monkeypatch.chdir(tmp_path / "set")
    assert read(elsewhere).root == tmp_path / "set"
    assert "not a folder" in error(elsewhere, root=str(tmp_path / "none"))


def test_prompt_keys(tmp_path):
    file = write_set(tmp_path)
    assert read(file, prompt_keys=["short_en"]).records[0].prompts == {"short_en": "short 0"}
    text = error(file, prompt_keys=["shrt_en"])
    assert "shrt_en" in text and "short_en" in text


# ------------------------------------------------------------------------------------------------ bad sets


def test_missing_unreadable_and_empty_sets(tmp_path):
    assert "does not exist" in error(tmp_path / "none.jsonl")
    assert "data.path is empty" in error("")
    (tmp_path / "e").mkdir()
    assert "neither" in error(tmp_path / "e")
    (tmp_path / "empty.jsonl").write_text("\n  \n")
    assert "no records" in error(tmp_path / "empty.jsonl")
    (tmp_path / "notes.md").write_text("x")
    assert "neither" in error(tmp_path / "notes.md")
    picture().save(tmp_path / "e" / "a.png")
    assert "no captions" in error(tmp_path / "e")


@pytest.mark.parametrize(
    "line, words",
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "an object was expected"),
        ("NaN", "an object was expected"),
        ("[" * 100_000, "not JSON"),
        ('{"short_en": "x"}', "no image"),
        ('{"local_path_list": [], "short_en": "x"}', "no image"),
        ('{"local_path_list": [3], "short_en": "x"}', "no image"),
        ('{"local_path_list": ["pics/none.png"], "short_en": "x"}', "none.png does not exist"),
        ('{"local_path_list": ["pics"], "short_en": "x"}', "is a folder"),
        ('{"local_path_list": ["pics/\\u0000.png"], "short_en": "x"}', "null"),
        ('{"local_path_list": ["pics/0.png"]}', "no prompt"),
        ('{"local_path_list": ["pics/0.png"], "short_en": "  "}', "no prompt"),
        ('{"local_path_list": ["pics/0.png"], "short_en": 5}', "no prompt"),
        ('{"local_path_list": ["pics/0.png"], "short_en": "\\ud800"}', "surrogate"),
        ('{"local_path_list": ["pics/0.png"], "h*w": "1024", "short_en": "x"}', "h*w"),
        ('{"local_path_list": ["pics/0.png"], "h*w": "0*5", "short_en": "x"}', "h*w"),
        ('{"local_path_list": ["pics/0.png"], "h*w": "nan*5", "short_en": "x"}', "h*w"),
    ],
)
def test_a_bad_line_names_file_and_line_or_is_skipped(tmp_path, line, words):
    file = write_set(tmp_path)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "", line, *lines[1:]]) + "\n")
    text = error(file)
    assert text.startswith(f"{file}:3: ") and words in text and "data.skip_bad" in text
    dataset = read(file, skip_bad=True)
    assert [record.prompts["short_en"] for record in dataset.records] == [f"short {i}" for i in range(4)]
    assert [record.index for record in dataset.records] == [0, 1, 2, 3]
    ((source, reason),) = dataset.skipped
    assert source == f"{file}:3" and words in reason


def test_not_utf8_and_byte_order_mark(tmp_path):
    file = write_set(tmp_path)
    good = file.read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + good)
    assert len(read(file).records) == 4
    file.write_bytes(good + b'{"short_en": "\xff"}\n')
    assert f"{file}:5: the line is not UTF-8" in error(file)


def test_every_record_bad_is_an_error_even_when_skipping(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text("{\n{\n")
    assert "every record" in error(file, skip_bad=True)


def test_image_folder_without_or_with_empty_caption(tmp_path):
    folder = write_set(tmp_path, fmt="folder")
    (folder / "1.txt").unlink()
    assert "1.png" in error(folder) and "1.txt does not exist" in error(folder)
    (folder / "1.txt").write_text(" \n")
    assert "1.txt is empty" in error(folder)
    (folder / "1.txt").write_text("back")
    (folder / "orphan.txt").write_text("no picture")
    assert read(folder).skipped == [(str(folder / "orphan.txt"), "no image of this name")]


# ------------------------------------------------------------------------------------------------ images


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises width x height pixels, and which holds next to none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def write_bad_image(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.{'jpg' if 'jpg' in kind else 'png'}"
    if kind.startswith("cut"):
        picture(400, 400).save(path)
        data = path.read_bytes()
        path.write_bytes(data[: {"half": len(data) // 2, "tail": len(data) - 600}[kind.rpartition("_")[2]]])
    elif kind == "empty":
        path.touch()
    elif kind == "one_pixel":
        picture(1, 1).save(path)
    elif kind == "text":
        path.write_text("this is no picture")
    elif kind == "bomb":
        path.write_bytes(png(100_000, 100_000))
    elif kind == "small_bomb":
        path.write_bytes(png(10_000, MAX_PIXELS // 10_000 + 1))
    return path


BAD_IMAGES = {
    "cut_png_half": "truncated",
    "cut_png_tail": "truncated",
    "cut_jpg_half": "truncated",
    "cut_jpg_tail": "truncated",
    "empty": "empty (0 bytes)",
    "one_pixel": "1 x 1 pixels: too small",
    "text": "not an image",
    "bomb": "bomb",
    "small_bomb": "bomb",
    "missing": "does not exist",
}


@pytest.mark.parametrize("kind, words", BAD_IMAGES.items())
def test_bad_image_is_found_when_the_set_is_read(tmp_path, recwarn, kind, words):
    folder = write_set(tmp_path, fmt="folder")
    path = write_bad_image(kind, folder)
    for call in (check_image, lambda file: load_image(file, 16, 16)):
        with pytest.raises(UserError) as caught:
            call(path)
        assert words in str(caught.value) and path.name in str(caught.value) and "\n" not in str(caught.value)
    if kind != "missing":
        path.with_suffix(".txt").write_text("a caption")
        assert words in error(folder)
        assert [source for source, _ in read(folder, skip_bad=True).skipped] == [str(path)]
    assert [str(warning.message) for warning in recwarn] == []


GREY = np.linspace(0, 255, 24 * 24).reshape(24, 24).astype(np.uint8)


def same(image: Image.Image, expected: np.ndarray, tolerance: int = 0) -> None:
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(int) - expected.astype(int))
    assert difference.max() <= tolerance


def test_the_same_size_is_left_alone(tmp_path):
    picture(24, 40).save(tmp_path / "a.png")
    same(load_image(tmp_path / "a.png", 24, 40), np.asarray(picture(24, 40)))


def test_palette_and_grey(tmp_path):
    grey = Image.fromarray(GREY)
    rgb = np.stack([GREY] * 3, -1)
    for name, image in [("l", grey), ("p", grey.convert("RGB").quantize(256)), ("g", grey.convert("RGB"))]:
        image.save(tmp_path / f"{name}.png")
        same(load_image(tmp_path / f"{name}.png", 24, 24), rgb, 2)
    Image.fromarray(GREY > 127).save(tmp_path / "bit.png")
    same(load_image(tmp_path / "bit.png", 24, 24), np.where(rgb > 127, 255, 0))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_keeps_its_range(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(GREY.astype(np.uint16) * 257).save(file)
    assert Image.open(file).mode.startswith("I")
    same(load_image(file, 24, 24), np.stack([GREY] * 3, -1))
    check_image(file)


def test_float_image(tmp_path):
    Image.fromarray(GREY.astype(np.float32) / 255).save(tmp_path / "f.tif")
    same(load_image(tmp_path / "f.tif", 24, 24), np.stack([GREY] * 3, -1))


def test_cmyk_looks_like_its_rgb(tmp_path):
    flat = Image.new("RGB", (24, 24), (200, 40, 90))
    flat.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert Image.open(tmp_path / "a.jpg").mode == "CMYK"
    same(load_image(tmp_path / "a.jpg", 24, 24), np.asarray(flat), 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_transparency_becomes_white(tmp_path, mode):
    colour = Image.new("RGB", (24, 24), (10, 10, 10))
    alpha = Image.fromarray(np.where(np.arange(24) < 12, 0, 255).astype(np.uint8)[None].repeat(24, 0))
    file = tmp_path / "a.png"
    if mode in ("RGBA", "LA"):
        image = colour.convert(mode)
        image.putalpha(alpha)
        image.save(file)
    elif mode == "PA":
        image = colour.convert("RGBA")
        image.putalpha(alpha)
        file = tmp_path / "a.gif"
        image.save(file)
    else:  # one colour declared transparent
        colour.paste((250, 0, 0), (0, 0, 12, 24))
        if mode == "P":
            image = colour.quantize(4)
            image.save(file, transparency=image.getpixel((0, 0)))
        else:
            colour.save(file, transparency=(250, 0, 0))
    values = np.asarray(load_image(file, 24, 24)).astype(int)
    assert (values[:, :12] == 255).all() and (abs(values[:, 12:] - 10) <= 1).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20] = 255
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    turns = {2: 0, 4: 1, 3: 3, 5: 5, 6: 4, 7: 6, 8: 2}
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(turns[undo]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert check_image(tmp_path / "a.png") == (24, 40)
    same(load_image(tmp_path / "a.png", 24, 40), upright)


def test_crop_is_central_and_covers(tmp_path):
    values = np.zeros((20, 60, 3), np.uint8)
    values[:, 20:40] = 255
    Image.fromarray(values).save(tmp_path / "a.png")
    assert (np.asarray(load_image(tmp_path / "a.png", 20, 20)) == 255).all()
    assert load_image(tmp_path / "a.png", 30, 17).size == (17, 30)


def test_digest_depends_on_bytes_and_crop(tmp_path):
    picture(seed=1).save(tmp_path / "a.png")
    first = image_digest(tmp_path / "a.png", 16, 16)
    assert first == image_digest(tmp_path / "a.png", 16, 16) != image_digest(tmp_path / "a.png", 16, 24)
    picture(seed=2).save(tmp_path / "a.png")
    assert image_digest(tmp_path / "a.png", 16, 16) != first
    with pytest.raises(UserError):
        image_digest(tmp_path / "none.png", 16, 16)


# ------------------------------------------------------------------------------------------------ buckets and epochs


def test_buckets_are_the_authors_at_1024_and_multiples_elsewhere():
    at_1024 = {(1024, 1024), (1152, 896), (1152, 864), (1248, 832), (1280, 720), (1344, 576)}
    assert set(bucket_sizes(1024, 16)) == at_1024 | {(height, width) for width, height in at_1024}
    for resolution, multiple in [(32, 8), (32, 16), (512, 16), (768, 32), (100, 16), (8, 16)]:
        sizes = bucket_sizes(resolution, multiple)
        assert len(set(sizes)) == len(sizes) <= 11
        assert all(side % multiple == 0 and side > 0 for size in sizes for side in size)
        assert {size[::-1] for size in sizes} == set(sizes)
    assert bucket_sizes(512, 16)[0] == (512, 512)
    assert (368, 640) in bucket_sizes(512, 16)  # 360 lies in the middle of 352 and 368, and is rounded upwards


def test_nearest_bucket_and_the_stated_size(tmp_path):
    sizes = bucket_sizes(1024, 16)
    assert nearest_bucket(780, 781, sizes) == (1024, 1024)
    assert nearest_bucket(1080, 1920, sizes) == (720, 1280)
    assert nearest_bucket(4000, 3000, sizes) == (1152, 864)
    assert nearest_bucket(1, 100, sizes) == (576, 1344)
    assert nearest_bucket(1000, 1530, [(100, 100), (100, 230)]) == (100, 230)  # 1.53 is 1.53 times 1, and 2.3 is 1.5 times 1.53
    record = read(write_set(tmp_path, size=(18, 32)), resolution=1024, multiple=16).records[0]
    assert (record.size, record.height, record.width) == ((18, 32), 720, 1280)


@pytest.fixture
def two_buckets(tmp_path):
    file = write_set(tmp_path / "square", 5)
    wide = write_set(tmp_path / "wide", 3, size=(16, 32))
    lines = [json.loads(line) for folder in (file, wide) for line in folder.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["local_path_list"] = [f"{'square' if i < 5 else 'wide'}/{line['local_path_list'][0]}"]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read(tmp_path / "all.jsonl", resolution=64)


def test_epoch_shows_every_record_in_whole_batches_of_one_bucket(two_buckets):
    batches = epoch_batches(two_buckets, epoch=0, seed=1, global_batch=2)
    assert [len(batch) for batch in batches] == [2] * 5
    assert all(len({(item.height, item.width) for item in batch}) == 1 for batch in batches)
    items = [item for batch in batches for item in batch]
    assert {item.record for item in items} == set(range(8))
    assert len({(item.record, item.repeat) for item in items}) == len(items)
    assert Counter(item.repeat for item in items) == {0: 8, 1: 2}
    for item in items:
        record = two_buckets.records[item.record]
        assert (item.height, item.width) == (record.height, record.width)
        assert item.prompt == record.prompts[item.prompt_key]


def test_an_epoch_shows_every_record_as_often_as_it_is_repeated(two_buckets):
    two_buckets.repeats = 3
    items = [item for batch in epoch_batches(two_buckets, epoch=0, seed=1, global_batch=1) for item in batch]
    assert sorted((item.record, item.repeat) for item in items) == [(record, turn) for record in range(8) for turn in range(3)]


def test_small_set_wraps_round_with_new_repeats(tmp_path):
    dataset = read(write_set(tmp_path))
    (batch,) = epoch_batches(dataset, 0, 0, 10)
    assert {item.record for item in batch[:4]} == {item.record for item in batch[4:8]} == set(range(4))
    assert [item.repeat for item in batch] == [0] * 4 + [1] * 4 + [2] * 2
    dataset.repeats = 3
    (batch,) = epoch_batches(dataset, 0, 0, 12)
    assert {(item.record, item.repeat) for item in batch} == {(r, k) for r in range(4) for k in range(3)}


def test_epochs_and_seeds_differ_and_repeat_themselves(two_buckets):
    plan = epoch_batches(two_buckets, 3, 7, 4)
    assert plan == epoch_batches(two_buckets, 3, 7, 4)
    orders = {tuple((item.record, item.repeat) for batch in epoch_batches(two_buckets, epoch, seed, 4) for item in batch)
              for epoch, seed in ((3, 7), (4, 7), (3, 8), (4, 8))}
    assert len(orders) == 4


def test_the_order_within_a_bucket_and_the_prompts_differ_from_epoch_to_epoch(tmp_path):
    """One bucket and one batch: no order of batches hides that of the records."""
    dataset = read(write_set(tmp_path))
    epochs = [epoch_batches(dataset, epoch, 0, 4)[0] for epoch in range(12)]
    assert len({tuple(item.record for item in batch) for batch in epochs}) > 4  # of 24
    for record in range(4):
        assert len({item.prompt_key for batch in epochs for item in batch if item.record == record}) > 1


def test_prompts_are_all_drawn_and_do_not_depend_on_the_batch(tmp_path):
    dataset = read(write_set(tmp_path))
    drawn = {}
    for global_batch in (1, 4):
        items = [i for epoch in range(12) for batch in epoch_batches(dataset, epoch, 0, global_batch) for i in batch]
        drawn[global_batch] = {(item.epoch, item.record, item.repeat): item.prompt_key for item in items}
    assert drawn[1] == drawn[4]
    assert set(drawn[1].values()) == {"short_en", "detailed_en"}
    only = epoch_batches(dataset, 0, 0, 4, ["short_en"])
    assert {item.prompt_key for item in only[0]} == {"short_en"}
    with pytest.raises(UserError, match="data.prompt_keys"):
        epoch_batches(dataset, 0, 0, 4, ["none"])


def test_micro_batches_tile_the_global_batch(tmp_path):
    (batch,) = epoch_batches(read(write_set(tmp_path)), 0, 0, 12)
    parts = [micro_batch(batch, a, rank, 3, 2) for a in range(2) for rank in range(3)]
    assert [item for part in parts for item in part] == batch


def test_noise_is_a_function_of_seed_epoch_record_and_repeat(tmp_path):
    (batch,) = epoch_batches(read(write_set(tmp_path)), 0, 0, 8)
    noise = [item_noise(5, item, (4, 6, 6)) for item in batch]
    assert noise[0].shape == (4, 6, 6) and noise[0].dtype == torch.float32
    assert torch.equal(noise[0], item_noise(5, batch[0], (4, 6, 6)))
    assert not any(torch.equal(noise[0], other) for other in noise[1:])
    assert not torch.equal(noise[0], item_noise(6, batch[0], (4, 6, 6)))
    everything = torch.stack(noise)
    assert abs(everything.mean()) < 0.1 and abs(everything.std() - 1) < 0.1
    assert 0 <= item_seed(1, 2, 3, 4, "noise") < 2**63
    assert item_seed(1, 2, 3, 4, "noise") != item_seed(1, 2, 3, 4, "time")
