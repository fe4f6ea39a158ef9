"""Caches contexts and latents, so that each is computed once and the frozen encoders need no memory while the model trains.

A key is the hash of everything that decides the value: its kind, the encoders' fingerprint, the prompt, and the digests of the
cropped images. So a changed input has another key, and no old value is ever taken for it. On the disk each value is a file of
its own (see conditioning/store.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dopsd_fast.conditioning.context import Context, ContextMaker
from dopsd_fast.conditioning.encoders import Encoders
from dopsd_fast.conditioning.store import ContextStore
from dopsd_fast.data.images import image_digest, load_image
from dopsd_fast.errors import UserError
from dopsd_fast.storage.digests import digest

FORMAT = 1
Kind = Literal["student", "teacher", "latents"]
Crop = tuple[Path, int, int]
"""(image file, height, width): the file is cropped to this size in pixels."""


@dataclass(frozen=True)
class Request:
    """The inputs of one value: its kind, the prompt (empty for latents), and the images."""
    kind: Kind
    prompt: str
    crops: tuple[Crop, ...]


class ContextCache:
    """Gives the context or latent of each key. A run first calls `request` for every value that it will need, then `complete`,
    which computes those that are missing, and then `get` for each value, which is on the CPU.

    policy: "disk" keeps files in `folder`, which ranks and runs share. "memory" keeps values in this process, so each rank
        computes its own. "off" keeps nothing: `get` computes each value, and the encoders stay loaded.
    family: makes the contexts and names their fingerprint.
    barrier: waits for all ranks. All ranks must pass the same keys to `complete`, because they share the work.
    progress: wraps the keys that are being computed, to show how many are done.
    device, dtype: where and in which precision the encoders run.
    batch_bytes, batch_seconds: how much, or for how long, values are collected before they are flushed to the disk.

    A value does not depend on which rank computes it, nor on the order.
    """

    def __init__(
        self,
        policy: Literal["off", "memory", "disk"],
        folder: Path | None,
        family: ContextMaker,
        rank: int = 0,
        world: int = 1,
        log: Callable[[str], None] = print,
        *,
        barrier: Callable[[], None] = lambda: None,
        progress: Callable[[Sequence[str]], Iterable[str]] = iter,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_bytes: int = 256 * 2**20,
        batch_seconds: float = 20.0,
    ):
        if policy == "disk" and folder is None:
            raise UserError("conditioning.cache=disk needs conditioning.folder")
        self.policy, self.family, self.rank, self.world = policy, family, rank, world
        self.log, self.barrier, self.device, self.dtype = log, barrier, device, dtype
        self.progress = progress
        self._requests: dict[str, Request] = {}
        self._digests: dict[Crop, str] = {}
        self._encoders: Encoders | None = None
        self._memory: dict[str, Context] = {}
        self._store: ContextStore | None = None
        if policy == "disk" and folder is not None:
            self._store = ContextStore(Path(folder), batch_bytes, batch_seconds, log)

    def request(self, kind: Kind, prompt: str = "", image: Crop | Sequence[Crop] | None = None) -> str:
        """Returns the key of a value and remembers how to compute it. A "student" context needs a prompt, a "teacher" context a
        prompt and images, "latents" one image."""
        crops: Any = () if image is None else image
        if crops and isinstance(crops[0], str | Path):
            crops = (crops,)
        request = Request(kind, prompt, tuple((Path(path), int(h), int(w)) for path, h, w in crops))
        images = [self._image_digest(crop) for crop in request.crops]
        key = digest([FORMAT, kind, self.family.fingerprint(kind, self.dtype), prompt, images])[:40]
        self._requests[key] = request
        return key

    def complete(self, keys: Iterable[str]) -> int:
        """Checks the values that are there, computes those that are missing or damaged, and frees the encoders. With the policy
        "disk" the ranks share the work, and every rank must call this.

        Returns how many values this rank computed. After a kill at any moment, the next call goes on where this one was.
        """
        wanted = list(dict.fromkeys(keys))
        if self.policy == "off":
            return 0
        if self._store is None:
            missing = [key for key in wanted if key not in self._memory]
            for key, context in self._compute_all(missing):
                self._memory[key] = context
        else:
            self.barrier()
            self._store.scan()
            present = [key for key in wanted if key in self._store]
            absent = [key for key in wanted if key not in self._store]
            self.barrier()
            if self.rank == 0:
                self._store.clean()
            missing = absent[self.rank :: self.world]
            missing += [key for key in present[self.rank :: self.world] if self._store.read(key) is None]
            try:
                for key, context in self._compute_all(missing):
                    self._store.add(key, context)
            finally:
                self._store.flush()
            self.barrier()
            self._store.scan()
        self.release()
        return len(missing)

    def get(self, key: str) -> Context:
        """Returns the value of a requested key. It is computed now if the policy is "off", or if its file is damaged. Raises
        KeyError for a key that was never requested."""
        if key in self._memory:
            return self._memory[key]
        if self._store is not None:
            found = self._store.read(key)
            if found is not None:
                return found
        if key not in self._requests:
            raise KeyError(f"{key} was never requested")
        context = self._compute(self._requests[key])
        if self._store is not None:
            self._store.add(key, context)
            self._store.flush()
        if self.policy != "off":
            self.release()
        return context

    def release(self) -> None:
        """Frees the encoders. They are loaded again if a value must be computed later."""
        if self._encoders is not None:
            self._encoders.release()
            self._encoders = None

    def _compute_all(self, keys: list[str]):
        """Yields (key, value), kind by kind, because each kind needs other encoders."""
        for key in self.progress(sorted(keys, key=lambda k: self._requests[k].kind)) if keys else ():
            yield key, self._compute(self._requests[key])

    def _compute(self, request: Request) -> Context:
        if self._encoders is None:
            self._encoders = self.family.load_encoders(self.device, self.dtype)
        pictures = [load_image(*crop) for crop in request.crops]
        if request.kind == "student":
            return self._encoders.student([request.prompt])[0]
        if request.kind == "teacher":
            return self._encoders.teacher([request.prompt], [pictures])[0]
        return {"latent": self._encoders.latents(pictures)[0]}

    def _image_digest(self, crop: Crop) -> str:
        if crop not in self._digests:
            self._digests[crop] = image_digest(*crop)
        return self._digests[crop]
