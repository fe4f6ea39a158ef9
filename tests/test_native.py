"""dopsd_kernels._native.ema_update: ema = decay * ema + (1 - decay) * param."""

import threading

import numpy as np
import pytest
import torch

from dopsd_kernels import _native


def reference(ema: np.ndarray, param: np.ndarray, decay: float) -> np.ndarray:
    return (decay * ema.astype(np.float64) + (1.0 - decay) * param.astype(np.float64)).astype(np.float32)


def pair(size: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(size)
    return draw.standard_normal(size).astype(np.float32), draw.standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("size", [0, 1, 5, 123, 4099, 200_003])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 1.0])
def test_equals_float64_rounded_once(size, decay):
    ema, param = pair(size)
    kept = param.copy()
    expected = reference(ema, param, decay)
    assert _native.ema_update(ema, param, decay) is None
    np.testing.assert_array_equal(ema, expected)
    np.testing.assert_array_equal(param, kept)


def test_same_bits_for_any_thread_count():
    start, param = pair(1_000_003)
    results = []
    for threads in (1, 2, 3, 7):
        ema = start.copy()
        _native.ema_update(ema, param, 0.999, threads=threads)
        results.append(ema)
    for other in results[1:]:
        assert results[0].tobytes() == other.tobytes()


def test_a_constant_is_a_fixed_point():
    """float32 weights 0.9999 and 0.0001 do not sum to 1: an average formed with them drifts towards 0."""
    param = np.full(1000, 0.7, np.float32)
    ema = param.copy()
    for _ in range(1000):
        _native.ema_update(ema, param, 0.9999)
    np.testing.assert_array_equal(ema, param)


def test_torch_tensors_in_place():
    ema, param = torch.zeros(10), torch.ones(10)
    _native.ema_update(ema, param, 0.75)
    assert torch.equal(ema, torch.full((10,), 0.25))


@pytest.mark.parametrize(
    "ema, param, decay, words",
    [
        (np.zeros(3), np.zeros(3, np.float32), 0.5, "ema must be float32"),
        (np.zeros(3, np.float32), np.zeros(3, np.float16), 0.5, "param must be float32"),
        (np.zeros(3, np.float32), np.zeros(4, np.float32), 0.5, "4 elements, ema has 3"),
        (np.zeros((3, 1), np.float32), np.zeros(3, np.float32), 0.5, "one dimension, not 2"),
        (np.zeros(6, np.float32)[::2], np.zeros(3, np.float32), 0.5, "ema must be contiguous"),
        (np.zeros(3, np.float32), np.zeros(3, np.float32), 1.5, "0..1"),
        (np.zeros(3, np.float32), np.zeros(3, np.float32), float("nan"), "0..1"),
    ],
)
def test_rejects(ema, param, decay, words):
    before = ema.copy()
    with pytest.raises(ValueError, match=words):
        _native.ema_update(ema, param, decay)
    np.testing.assert_array_equal(ema, before)


def test_refuses_to_write_into_a_read_only_array():
    ema = np.zeros(3, np.float32)
    ema.flags.writeable = False
    with pytest.raises(TypeError):
        _native.ema_update(ema, np.ones(3, np.float32), 0.5)
    assert not ema.any()


def test_releases_the_gil():
    """Another Python thread sees an update half done: the first element changed, the last one not yet."""
    for _ in range(20):
        ema, param = np.zeros(10_000_000, np.float32), np.ones(10_000_000, np.float32)
        worker = threading.Thread(target=_native.ema_update, args=(ema, param, 0.5, 1))
        worker.start()
        half_done = False
        while worker.is_alive():
            last, first = ema[-1], ema[0]
            half_done |= bool(first == 0.5 and last == 0.0)
        if half_done:
            return
    pytest.fail("no update was ever seen half done: ema_update holds the GIL")
