"""Which contexts and latents a run needs, and where each of them is found in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dopsd_fast.conditioning.cache import ContextCache
from dopsd_fast.conditioning.context import Context
from dopsd_fast.data.records import Record


class Contexts:
    """`require` once, then `complete`, then `get` at every step.

    A context is named by what it belongs to: ("student", prompt), ("teacher", index of the record, prompt) or
    ("latents", index of the record). `keys`: the cache's key of each."""

    def __init__(self, cache: ContextCache, device: torch.device) -> None:
        self.cache, self.device = cache, device
        self.keys: dict[tuple, str] = {}

    def require(
        self, records: Sequence[Record], prompt_keys: Sequence[str], prompts: Sequence[str], images: bool, latents: bool
    ) -> None:
        """Asks for every context that a step or a picture can need.

        prompt_keys: the prompt fields that are drawn from; empty: all. prompts: further ones of the student. images: the
        teacher is shown each record's target. latents: the objective reads the target's latent."""
        for record in records:
            target = (record.images[0], record.height, record.width)
            for name, prompt in record.prompts.items():
                if prompt_keys and name not in prompt_keys:
                    continue
                self.keys["student", prompt] = self.cache.request("student", prompt)
                if images:
                    self.keys["teacher", record.index, prompt] = self.cache.request("teacher", prompt, target)
            if latents:
                self.keys["latents", record.index] = self.cache.request("latents", image=target)
        for prompt in prompts:
            self.keys["student", prompt] = self.cache.request("student", prompt)

    def fingerprints(self) -> dict[str, str]:
        """Kind of context -> hash of the encoder that makes it. Known since the first request, so nothing is read."""
        kinds = sorted({key[0] for key in self.keys})
        return {kind: self.cache.family.fingerprint(kind, self.cache.dtype) for kind in kinds}

    def complete(self) -> int:
        """Computes what the cache lacks; how many that were on this rank. Every rank calls it."""
        return self.cache.complete(self.keys.values())

    def get(self, *name: object) -> Context:
        """The context of that name, on the run's device."""
        return {part: tensor.to(self.device) for part, tensor in self.cache.get(self.keys[name]).items()}
