"""The conditioning cache: what is found again, what is computed again, and what kills, damage and ranks do to it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dopsd_fast.conditioning import encoders
from dopsd_fast.conditioning.cache import ContextCache
from dopsd_fast.conditioning.fingerprint import hash_folder
from dopsd_fast.errors import UserError
from dopsd_fast.families.registry import open_family
from dopsd_fast.settings.schema import ConditioningSettings
from tests.tiny import make_zimage, shared

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a cat", "a dog", "a red house"]


def conditioning(**fields):
    return ConditioningSettings(**({"max_text_tokens": 32, "max_vlm_tokens": 64} | fields))


def write_image(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "image.png", 0)


def spied(kind, original, calls):
    def spy(self, *arguments):
        calls.append(kind)
        return original(self, *arguments)

    return spy


@pytest.fixture
def computed(monkeypatch):
    """Counts what the encoders are asked for."""
    calls = []
    for kind in ("student", "teacher", "latents"):
        monkeypatch.setattr(encoders.Encoders, kind, spied(kind, getattr(encoders.Encoders, kind), calls))
    return calls


def make(folder, policy="disk", model=None, log=None, settings=None, **options):
    family = open_family(model or shared("zimage"), settings or conditioning())
    return ContextCache(policy, folder, family, log=log if log is not None else lambda _: None, **options)


def request_all(cache, image, size=(32, 32)):
    crop = (image, *size)
    keys = [cache.request("student", prompt) for prompt in PROMPTS]
    return [*keys, cache.request("teacher", PROMPTS[0], crop), cache.request("latents", image=crop)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("policy", ["off", "memory", "disk"])
def test_policies_give_the_same_values(tmp_path, image, computed, policy):
    cache = make(tmp_path / "cache", policy)
    keys = request_all(cache, image)
    cache.complete(keys)
    found = [cache.get(key) for key in keys]
    reference = make(None, "off")
    for value, key in zip(found, request_all(reference, image), strict=True):
        assert same(value, reference.get(key))
    computed.clear()
    [cache.get(key) for key in keys]
    assert len(computed) == (5 if policy == "off" else 0)
    assert (tmp_path / "cache").exists() == (policy == "disk")


def test_found_again_by_content(tmp_path, image, computed):
    first = make(tmp_path / "cache")
    keys = request_all(first, image)
    assert first.complete(keys + keys) == 5
    moved = image.rename(tmp_path / "other.png")
    computed.clear()
    second = make(tmp_path / "cache")
    again = request_all(second, moved)
    assert again == keys and second.complete(again) == 0
    assert all(same(first.get(key), second.get(key)) for key in keys) and not computed
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert sorted(key for shard in index["shards"].values() for key in shard["keys"]) == sorted(keys)


def test_whatever_changed_is_computed_again(tmp_path, image, computed):
    cache = make(tmp_path / "cache")
    before = request_all(cache, image)
    cache.complete(before)

    def new_kinds(cache, keys):
        computed.clear()
        cache.complete(keys)
        return sorted(computed)

    other = make(tmp_path / "cache")
    assert new_kinds(other, [other.request("student", "a cat!")]) == ["student"]
    cropped = make(tmp_path / "cache")
    assert new_kinds(cropped, request_all(cropped, image, (24, 40))) == ["latents", "teacher"]
    write_image(image, 1)
    changed = make(tmp_path / "cache")
    assert new_kinds(changed, request_all(changed, image)) == ["latents", "teacher"]
    limits = make(tmp_path / "cache", settings=conditioning(max_pixels=32 * 32))
    assert new_kinds(limits, request_all(limits, image)) == ["teacher"]
    shorter = make(tmp_path / "cache", settings=conditioning(max_text_tokens=16))
    assert new_kinds(shorter, request_all(shorter, image)) == ["student"] * 3 + ["teacher"]


@pytest.mark.parametrize(
    "part, kinds",
    [
        ("text_encoder", ["student"] * 3 + ["teacher"]),
        ("vlm", ["teacher"]),
        ("vae", ["latents"]),
        ("transformer", []),
    ],
)
def test_changed_weights_are_noticed(tmp_path, image, computed, part, kinds):
    model = make_zimage(tmp_path / "model")
    cache = make(tmp_path / "cache", model=model)
    cache.complete(request_all(cache, image))
    file = next((model / part).glob("*.safetensors"))
    times = file.stat().st_atime, file.stat().st_mtime
    tensors = load_file(file)
    name = max(tensors, key=lambda n: tensors[n].numel())
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, times)  # the content decides, not the date
    computed.clear()
    cache = make(tmp_path / "cache", model=model)
    cache.complete(request_all(cache, image))
    assert sorted(computed) == kinds


def test_fingerprint_ignores_what_is_never_read(tmp_path):
    model = make_zimage(tmp_path / "model")
    before = hash_folder(model / "text_encoder")
    (model / "text_encoder" / "README.md").write_text("hello")
    (model / "text_encoder" / ".cache").mkdir()
    (model / "text_encoder" / ".cache" / "x").write_text("hello")
    assert hash_folder(model / "text_encoder") == before
    (model / "text_encoder" / "config.json").write_text("{}")
    assert hash_folder(model / "text_encoder") != before


def test_precision_is_part_of_the_key(image):
    full, half = make(None, "off"), make(None, "off", dtype=torch.bfloat16)
    assert full.request("student", "a cat") != half.request("student", "a cat")
    assert full.request("latents", image=(image, 32, 32)) == half.request("latents", image=(image, 32, 32))
    assert half.get(half.request("student", "a cat"))["text"].dtype == torch.bfloat16


def shards(folder):
    return sorted(folder.glob("contexts-*.safetensors"))


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "flipped", "index", "index gone"])
def test_damage_is_computed_again_with_a_notice(tmp_path, image, computed, damage):
    folder = tmp_path / "cache"
    first = make(folder, shard_bytes=1)  # one shard a value
    keys = request_all(first, image)
    first.complete(keys)
    good = [{name: t.clone() for name, t in first.get(key).items()} for key in keys]
    shard, data = shards(folder)[2], shards(folder)[2].read_bytes()
    assert len(shards(folder)) == 5
    flipped = bytearray(data)
    flipped[-3] ^= 0x40
    if damage == "index":
        (folder / "index.json").write_text('{"shards": ')
    elif damage == "index gone":
        (folder / "index.json").unlink()
    else:
        content = {"truncated": data[:-7], "empty": b"", "header": b"\xff" * 40 + data[40:], "flipped": bytes(flipped)}
        shard.unlink()
        shard.write_bytes(content[damage])
    computed.clear()
    notices = []
    cache = make(folder, log=notices.append)
    cache.complete(request_all(cache, image))
    expected = 0 if damage.startswith("index") else 1
    assert len(computed) == len(notices) == expected
    assert all(str(shard) in notice and "again" in notice for notice in notices)
    assert all(same(cache.get(key), value) for key, value in zip(keys, good, strict=True))
    assert len(computed) == expected
    third = make(folder)
    third.complete(request_all(third, image))
    assert len(computed) == expected


def test_damage_after_completion_is_noticed_at_get(tmp_path, image, computed):
    folder = tmp_path / "cache"
    first = make(folder, shard_bytes=1)
    keys = request_all(first, image)
    first.complete(keys)
    good = [{name: t.clone() for name, t in first.get(key).items()} for key in keys]
    notices = []
    cache = make(folder, log=notices.append)
    cache.complete(request_all(cache, image))
    for shard in shards(folder):
        shard.unlink()
    computed.clear()
    assert all(same(cache.get(key), value) for key, value in zip(keys, good, strict=True))
    assert len(computed) == len(notices) == 5


def test_encoders_leave_memory(tmp_path, image, monkeypatch):
    alive = []
    original = encoders.Encoders.teacher

    def spy(self, prompts, images):
        result = original(self, prompts, images)
        alive.extend(weakref.ref(part) for part in (self, self.text_encoder, self.vlm, self.vlm.model))
        return result

    monkeypatch.setattr(encoders.Encoders, "teacher", spy)
    for policy in ("memory", "disk"):
        alive.clear()
        cache = make(tmp_path / policy, policy)
        keys = request_all(cache, image)
        cache.complete(keys)
        assert len(alive) == 4 and [reference() for reference in alive] == [None] * 4
        assert cache.get(keys[3])["text"].shape[1] == 32


def test_ranks_share_the_work(tmp_path, image, computed, monkeypatch):
    barrier = threading.Barrier(2, timeout=20)
    caches = [make(tmp_path / "cache", rank=rank, world=2, barrier=barrier.wait) for rank in range(2)]
    keys = [request_all(cache, image) for cache in caches]
    assert keys[0] == keys[1]
    one_at_a_time = threading.Lock()  # ranks are processes; transformers does not load models in two threads at once
    for cache in caches:

        def compute(request, original=cache._compute):
            with one_at_a_time:
                return original(request)

        monkeypatch.setattr(cache, "_compute", compute)
    counts = {}
    threads = [
        threading.Thread(target=lambda rank=rank: counts.update({rank: caches[rank].complete(keys[rank])})) for rank in range(2)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(counts.values()) == [2, 3] and len(computed) == 5
    alone = make(None, "off")
    for key in request_all(alone, image):
        expected = alone.get(key)
        assert same(caches[0].get(key), expected) and same(caches[1].get(key), expected)
    assert len(computed) == 10  # the five of `alone` only


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dopsd_fast.conditioning.cache import ContextCache
from dopsd_fast.families.registry import open_family
from dopsd_fast.settings.schema import ConditioningSettings

family = open_family(sys.argv[2], ConditioningSettings(max_text_tokens=32, max_vlm_tokens=64))
cache = ContextCache("disk", Path(sys.argv[3]), family, shard_bytes=1)
original = cache._compute
def slow(request):
    time.sleep(0.1)
    return original(request)
cache._compute = slow
cache.complete([cache.request("student", f"prompt {i}") for i in range(200)])
"""


def test_a_killed_run_continues(tmp_path, computed):
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(ROOT), str(shared("zimage")), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(shards(folder)) < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(shards(folder))
    assert 4 <= done < 200 and not (folder / "index.json").exists()
    (folder / "contexts-0.tmp").write_bytes(b"half")
    os.utime(folder / "contexts-0.tmp", (0, 0))
    cache = make(folder)
    keys = [cache.request("student", f"prompt {i}") for i in range(done + 6)]
    cache.complete(keys)
    assert len(computed) == 6
    assert not list(folder.glob("*.tmp"))
    alone = make(None, "off")
    for i in range(3):
        assert same(cache.get(keys[i]), alone.get(alone.request("student", f"prompt {i}")))


def test_an_error_keeps_what_was_computed(tmp_path, computed):
    cache = make(tmp_path / "cache")
    missing = cache.request("student", "a cat")
    bad = write_image(tmp_path / "bad.png", 2)
    teacher = cache.request("teacher", "a cat", (bad, 32, 32))
    bad.write_bytes(b"")
    with pytest.raises(UserError):
        cache.complete([missing, teacher])
    computed.clear()
    again = make(tmp_path / "cache")
    assert again.complete([again.request("student", "a cat")]) == 0


def test_unusable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="conditioning.folder="):
        make(tmp_path / "file" / "cache")
    cache = make(tmp_path / "cache")
    cache._shards.folder = Path("/proc")
    with pytest.raises(UserError, match="cannot write the conditioning cache") as error:
        cache._shards.add("key", {"text": torch.zeros(1)})
        cache._shards.flush()
    assert "\n" not in str(error.value)


def test_several_images_per_request(tmp_path, image):
    second = write_image(tmp_path / "second.png", 5)
    cache = make(None, "memory")
    one = cache.request("teacher", "a cat", (image, 32, 32))
    both = cache.request("teacher", "a cat", [(image, 32, 32), (second, 32, 32)])
    swapped = cache.request("teacher", "a cat", [(second, 32, 32), (image, 32, 32)])
    assert len({one, both, swapped}) == 3
    cache.complete([one, both, swapped])
    assert len(cache.get(both)["text"]) == len(cache.get(one)["text"]) + 4 + 2  # four image tokens, start and end
    with pytest.raises(KeyError):
        cache.get("unknown")
