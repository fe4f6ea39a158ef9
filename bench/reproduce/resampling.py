"""Means over seeds and prompts, and their 95 % bootstrap intervals (Efron and Tibshirani, 1993, percentile method).

A draw takes seeds of each arm and prompts of each domain with replacement. All arms share a draw's prompts (they were given the
same captions and the same noise), so a difference of two arms under one draw is a paired one. A draw of a Frechet distance is
scaled by measured / mean of the draws: drawn pictures repeat each other, which makes the distance larger whoever painted them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DRAWS = 400
Key = tuple[str, str, int]
"""(arm, domain, function evaluations of a picture)."""


@dataclass
class Moments:
    """What a Frechet distance needs of each picture's patches: their number [P], sums [P, D] and sums of outer products
    [P, D, D], float64; and the mean [D] and covariance [D, D] of what it is compared with."""

    count: Tensor
    first: Tensor
    second: Tensor
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, patches: Tensor, real: Tensor) -> Moments:
        """patches [P, n, D] of the pictures, real [M, D] of the others."""
        patches = patches.double()
        return cls(torch.full((len(patches),), float(patches.shape[1]), dtype=torch.float64), patches.sum(1),
                   patches.transpose(1, 2) @ patches, real.double().mean(0), torch.cov(real.double().T))

    def distances(self, weights: Tensor) -> Tensor:
        """Frechet distance [B] for weights [B, P] of the pictures: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))."""
        count = weights @ self.count
        mean = weights @ self.first / count[:, None]
        second = (weights @ self.second.flatten(1)).unflatten(1, self.second.shape[1:])
        covariance = (second - count[:, None, None] * mean[:, :, None] * mean[:, None]) / (count - 1)[:, None, None]
        values, vectors = torch.linalg.eigh(self.covariance)
        root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
        cross = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum(1)
        trace = covariance.diagonal(dim1=1, dim2=2).sum(1) + self.covariance.trace()
        return (mean - self.mean).square().sum(1) + trace - 2 * cross


class Sample(NamedTuple):
    """What one trained model's pictures of one domain measure. `values`: numbers of each picture [P], averaged; `ratios`: pairs
    [P, 2] of which the sums are divided; `frechet`: by name; `fixed`: numbers of the whole set, which prompts do not move."""

    values: Mapping[str, np.ndarray] = {}
    ratios: Mapping[str, np.ndarray] = {}
    frechet: Mapping[str, Moments] = {}
    fixed: Mapping[str, float] = {}

    @property
    def metrics(self) -> list[str]:
        return [*self.frechet, *self.ratios, *self.values, *self.fixed]

    @property
    def pictures(self) -> int:
        """0: all numbers are of the whole set."""
        each: list[Any] = [*self.values.values(), *self.ratios.values(), *(one.count for one in self.frechet.values())]
        return len(each[0]) if each else 0

    def under(self, metric: str, weights: Tensor) -> np.ndarray:
        """The metric [B] for weights [B, P] of the pictures."""
        if metric in self.frechet:
            return self.frechet[metric].distances(weights).numpy()
        if metric in self.ratios:
            above, below = (weights @ torch.from_numpy(self.ratios[metric])).unbind(1)
            return (above / below).numpy()
        if metric in self.values:
            return (weights @ torch.from_numpy(np.asarray(self.values[metric], np.float64)) / weights.sum(1)).numpy()
        return np.full(len(weights), self.fixed[metric])


class Draws:
    """`samples`: for each key one `Sample` a seed, all of a domain with the same pictures' captions in the same order."""

    def __init__(self, samples: Mapping[Key, Sequence[Sample]], count: int = DRAWS, seed: int = 0) -> None:
        self.samples, self.count, self.seed = samples, count, seed
        self._values: dict[tuple[Key, str], np.ndarray] = {}

    def values(self, key: Key, metric: str) -> np.ndarray:
        """[1 + count]: the mean over seeds as measured, then under each draw. KeyError: nothing was measured there."""
        if key not in self.samples:
            raise KeyError("{} on {} at {} steps".format(*key))
        if (key, metric) not in self._values:
            self._values[key, metric] = self._drawn(key, metric)
        return self._values[key, metric]

    def _drawn(self, key: Key, metric: str) -> np.ndarray:
        arm, domain, _ = key
        samples = self.samples[key]
        pictures = samples[0].pictures
        prompts = np.random.default_rng([self.seed, *domain.encode()])
        counts = np.zeros((self.count, 0))
        if pictures:
            counts = prompts.multinomial(pictures, np.full(pictures, 1 / pictures), self.count)
        weights = torch.from_numpy(np.concatenate([np.ones((1, pictures)), counts]).astype(np.float64))
        each = np.stack([one.under(metric, weights) for one in samples])
        if metric in samples[0].frechet:
            each[:, 1:] *= each[:, :1] / each[:, 1:].mean(1, keepdims=True)
        drawn = np.random.default_rng([self.seed, 1, *arm.encode()]).integers(len(samples), size=(self.count, len(samples)))
        rest = np.take_along_axis(each[:, 1:], drawn.T, axis=0).mean(0)
        return np.concatenate([each[:, :1].mean(0), rest])


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """(as measured, 2.5th and 97.5th percentile of the draws)."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(values[0]), float(low), float(high)
