"""The stages of bench/first_run.py, in the order of what they decide; each docstring says what that is.

A stage takes the Run, gives its numbers to `Run.say` as soon as it has them, and may raise. Sizes are those of the model's
standard configuration, with QUICK=1 of the small model's.
"""

from __future__ import annotations

import json
import math
import time
import timeit
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import harness
from bench.breakdown import PARTS, break_down, traced
from bench.clock import interleaved, kernel_clock, synchronize
from bench.harness import exact_dtype, exactly, relative
from bench.machine import ceilings
from bench.models import Model
from bench.references.reference_eager import STRONGER
from bench.results import Options
from bench.suites import ops as kernels
from bench.suites import roofline
from bench.suites.workload import Cell, OurStep, PeerStep, Workload
from dopsd_kernels import pair_linear
from dopsd_kernels.attention import attention_fwd
from dopsd_kernels.attention_libraries import BACKENDS, math_backward, math_forward, usable
from dopsd_kernels.pair_linear_accumulate import pair_linear_accumulate
from dopsd_kernels.sequences import Sequences

OPS = ("rmsnorm_modulate", "gated_residual_norm", "qk_norm_rope", "swiglu", "layernorm_modulate", "divergence_step")
LARGEST = 16e6  # bytes that a trace may have; one that is larger is left out, its breakdown is in first.jsonl
KERNELS = 22  # of a trace, the kernels that take longest, a line each


class Run:
    """What the stages share: where they write, what they run on, and the seconds of the steps so far, by name."""

    def __init__(self, out: Path, options: Options, began: float) -> None:
        self.began, self.out, self.options, self.device = began, out, options, options.device
        self.model = Model(options.model, options.device)
        self.dtype, self.size, self.cuda = self.model.dtype, kernels.Size.of(self.model), self.device.type == "cuda"
        self.seconds, self.failures = dict[str, float](), 0
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "first.jsonl").open("a", encoding="utf-8")

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def say(self, stage: str, **row: Any) -> None:
        """One line, on the disk and on the terminal before the next thing is done. Numbers have five digits."""
        line = json.dumps({"t": round(self.elapsed, 1), "stage": stage} | {key: plain(value) for key, value in row.items()})
        self.file.write(line + "\n")
        self.file.flush()
        print(line, flush=True)

    def fail(self, stage: str, error: BaseException, **row: Any) -> None:
        """The line of something that raised, of a whole stage or, with `row`, of one thing that it measures."""
        traceback.print_exception(error)
        self.failures += 1
        self.say(stage, **row, failed=one_line(error))

    @contextmanager
    def guard(self, stage: str, **row: Any) -> Iterator[None]:
        """What raises inside is a line of its own, and the stage goes on behind it."""
        try:
            yield
        except Exception as error:
            self.fail(stage, error, **row)

    def rate(self, operations: float, call: Callable[[], Any]) -> float:
        """TFLOP/s of a call that lasts microseconds, by the median of its seconds: by events behind a fill on a GPU."""
        rounds, warmup = (2, 1) if self.options.quick else (20, 3)
        seconds = interleaved({"": call}, rounds, warmup, self.device, kernel_clock(self.device))[""]
        return operations / median(seconds) / 1e12

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * scale

    def free(self) -> None:
        harness.free(self.device)

    def dead(self) -> str:
        """Why nothing runs on the device any more; empty: it does. An illegal access makes all later calls raise, a lack of
        memory does not."""
        try:
            self.free()
            torch.zeros(8, device=self.device).add_(1).sum().item()
        except torch.OutOfMemoryError:
            return ""
        except Exception as error:
            return one_line(error)
        return ""


def plain(value: Any) -> Any:
    """As JSON has it: floats short, what is not finite and what JSON does not know by its name."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if isinstance(value, str | int | None) else str(value)


def one_line(error: BaseException) -> str:
    """The type's name alone where the error cannot say more: the text of another library's error may itself raise."""
    name = type(error).__name__
    try:
        return " ".join(f"{name}: {error}".split())[:400]
    except Exception:
        return name


# ---- parts of a step -------------------------------------------------------------------------------------------------


def env(run: Run) -> None:
    """Decides whether the machine is as fast as it should be (H200: 4.3 TB/s, 790 TFLOP/s); and what a launch costs."""
    limits, calls = ceilings(run.device, run.dtype, run.options.quick), 200 if run.options.quick else 2000
    h = torch.empty(8, device=run.device)
    taken = timeit.timeit(lambda: h.add_(1), number=calls) / calls
    run.say("env", copy_TBs=limits.bytes_per_second / 1e12, gemm_TFs=limits.flops_per_second / 1e12, launch_us=taken * 1e6)


@contextmanager
def products_by(backend: str) -> Iterator[None]:
    """Inside, pair_linear runs this backend."""
    pair_linear.set_backend(backend)
    try:
        yield
    finally:
        pair_linear.set_backend("auto")


def gemm(run: Run) -> None:
    """Decides pair_linear's default: the Triton kernel that folds the adapter in, cuBLAS with beta = 1, or cuBLAS over the
    folded [x | x A^T] [W | s B]^T. All in TFLOP/s of the base product, so a row's numbers compare."""
    size = run.size
    for name, n, k, members in (("qkv", size.width, size.width, 3), ("out", size.width, size.width, 1),
                                ("up", size.hidden, size.width, 2), ("down", size.width, size.hidden, 1)):
        found: dict[str, Any] = {}
        with run.guard("gemm", group=name):
            product_rates(run, name, n, k, members, found)
        run.say("gemm", group=name, n=n, k=k, members=members, unit="TFLOP/s", **found)
        run.free()


def product_rates(run: Run, group: str, n: int, k: int, members: int, found: dict[str, Any]) -> None:
    """Each rate goes to `found` as soon as it is measured, so that what raises takes only what comes after it; a backend takes
    no other."""
    size = run.size
    r, tokens, teacher_tokens = size.rank, size.sequences * size.length, size.sequences * size.teacher_length
    x, x_t = run.draw(tokens, k), run.draw(teacher_tokens, k)
    w = [run.draw(n, k, scale=k**-0.5) for _ in range(members)]
    (a, b), (a_t, b_t) = (([run.draw(r, k, scale=1 / r) for _ in w], [run.draw(n, r, scale=0.01) for _ in w]) for _ in range(2))
    scales, dy = [2.0] * members, [run.draw(tokens, n) for _ in w]
    wide, both, total = torch.cat(w), torch.cat([x, x_t]), torch.zeros(n, k, device=run.device)
    folded_w, folded_x = run.draw(n * members, k + r * members), run.draw(len(both), k + r * members)
    forward, backward = 2 * len(both) * n * k * members, 2 * tokens * n * k * members
    found["base"] = run.rate(forward, lambda: both @ wide.t())
    found["base_one_by_one"] = run.rate(forward, lambda: [one @ matrix.t() for matrix in w for one in (x, x_t)])
    found["folded"] = run.rate(forward, lambda: folded_x @ folded_w.t())
    found["dx_base"] = run.rate(backward, lambda: torch.cat(dy, 1) @ wide)
    forward_call = partial(pair_linear.run_forward, x, x_t, w, w, [], [], a, b, a_t, b_t, scales, scales)
    results = {}
    with torch.no_grad():
        for backend in ("cublas", "triton"):
            with run.guard("gemm", group=group, backend=backend), products_by(backend):
                out = forward_call()
                results[backend] = out[:2]
                found[f"lora_{backend}"] = run.rate(forward, forward_call)
                call = partial(pair_linear.run_backward, dy, x, w, a, b, scales, out[2], True, False, False, True)
                found[f"lora_backward_{backend}"] = run.rate(backward, call)
        call = partial(pair_linear_accumulate, [total], [], [], dy[:1], x, scales[:1], x.new_empty(0), x.new_empty(0))
        found["dW_fp32_sums"] = run.rate(2 * tokens * n * k, call)
    if len(results) == 2:
        found["triton_against_cublas"] = [relative(*pair) for pair in zip(results["triton"], results["cublas"])]


def attend(run: Run) -> None:
    """Decides `choose_attention`'s order: speed and error of every library that is usable, and which of them is fastest where
    four pictures of four lengths are one batch."""
    heads, width = run.size.heads, run.size.head_dim
    fit = [name for name in BACKENDS if name != "math" and usable(name, run.device, run.dtype, width)]
    length = 33 if run.options.quick else 273  # no multiple of a block
    q, k, v, dout = (run.draw(2, length, heads, width) for _ in range(4))
    out, lse = math_forward(q, k, v, None, length)
    exact = (out, *math_backward(dout, q, k, v, out, lse, None, length))
    for name in (name for name in fit if name != "varlen"):  # varlen is flash with packed sequences
        with run.guard("attend", backend=name):  # a library that cannot do it hides no other
            out, grads, _ = attended(name, q, k, v, dout)
            apart = [relative(*pair) for pair in zip((out, *grads), exact)]
            run.say("attend", backend=name, unit="TFLOP/s", error=apart, **dense_rates(run, name))
    quarter = run.size.length * 5 // 17
    lengths = [quarter + step * max(1, quarter // 40) for step in (0, 1, -2, 2)]
    packed = Sequences(lengths, run.device)
    q, k, v = (run.draw(packed.tokens, heads, width) for _ in range(3))
    work = 4 * heads * width * sum(tokens**2 for tokens in lengths)
    for name in ("auto", *fit):
        with run.guard("attend", backend=name, lengths=lengths), torch.no_grad():
            rate = run.rate(work, partial(attention_fwd, q, k, v, packed.starts, lengths, name))
            run.say("attend", backend=name, lengths=lengths, unit="TFLOP/s", forward=rate)


def dense_rates(run: Run, name: str) -> dict[str, float]:
    """Of one picture at the student's and at the teacher's length; backward is 2.5 forwards' products."""
    heads, width, library, found = run.size.heads, run.size.head_dim, BACKENDS[name], {}
    for tokens in (run.size.length, run.size.teacher_length):
        q, k, v, dout = (run.draw(1, tokens, heads, width) for _ in range(4))
        out, _, lse = attended(name, q, k, v, dout)
        work = 4 * tokens**2 * heads * width
        found[f"forward_{tokens}"] = run.rate(work, partial(library.forward, q, k, v, None, tokens))
        call = partial(library.backward, dout, q, k, v, out, lse, None, tokens)
        found[f"backward_{tokens}"] = run.rate(2.5 * work, call)
    return found


def attended(name: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """(out, (dq, dk, dv), lse) of a dense batch by one library."""
    library, length = BACKENDS[name], q.shape[1]
    out, lse = library.forward(q, k, v, None, length)
    out, lse = out.contiguous(), lse.reshape(-1)
    return out, library.backward(dout, q, k, v, out, lse, None, length), lse


def ops(run: Run) -> None:
    """Decides which kernels deserve work: the share that each reaches of what the machine can do, and its error beside eager's,
    as suite `kernels` has them."""
    limits, devices = ceilings(run.device, run.dtype, run.options.quick), (run.device, torch.device("meta"))
    for name in OPS:
        with run.guard("ops", op=name):  # a kernel that does not compile hides no other
            op, shape = (kernels.OPS[name](kernels.Draw(run.size, device, run.dtype)) for device in devices)
            rows = {f"{row.variant}_{row.metric}": row
                    for row in roofline.measure(op, roofline.work(shape), limits, run.options, compiles=False)}
            run.say("ops", op=name, **{key: row.note if row.value is None else row.value for key, row in rows.items()})
        run.free()


# ---- whole steps -----------------------------------------------------------------------------------------------------


def cell_of(run: Run, layers: int | None = None) -> Cell:
    """A configuration; QUICK's is as small as the model allows."""
    return Cell(layers=1, pixels=32, batch=1) if run.options.quick else Cell(layers=layers)


def timed(run: Run, name: str, one: OurStep | PeerStep, rounds: int) -> dict[str, Any]:
    """Seconds of the first step, of the median of `rounds` after a second one, and this process's least CPU time of them."""
    walls, processor = [], []
    for number in range(2 + (2 if run.options.quick else rounds)):
        if number == 2 and run.cuda:
            torch.cuda.reset_peak_memory_stats(run.device)
        synchronize(run.device)
        wall, cpu = time.perf_counter(), time.process_time()
        one.step()
        synchronize(run.device)
        walls.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
    run.seconds[name] = median(walls[2:])
    row: dict[str, Any] = {"first_seconds": walls[0], "seconds": run.seconds[name], "cpu_seconds": min(processor[2:])}
    if run.cuda:
        row |= {"peak_GB": torch.cuda.max_memory_allocated(run.device) / 1e9,
                "reserved_GB": torch.cuda.max_memory_reserved(run.device) / 1e9}
    return row


def our_step(
    run: Run, name: str, kind: str = "lora", activations: str = "keep", backend: str = "auto", rounds: int = 6
) -> None:
    """A row of our training step, and where activations are kept the rows of where its time goes."""
    masters = "low_bits" if kind == "full" and run.dtype == torch.bfloat16 else "fp32"
    began = time.perf_counter()
    with products_by(backend):
        one = OurStep(kind, Workload(run.options, cell_of(run)), activations, masters)
        try:
            built = time.perf_counter() - began
            row = timed(run, name, one, rounds)
            run.say(name, kind=kind, activations=activations, masters=masters, backend=backend, built_seconds=built, **row,
                    loss=one.report.loss, attention=one.pair.describe().get("attention"), fell_back=one.fell_back())
            if activations == "keep":
                where_time_goes(run, name, one)
        finally:
            one.close()


def where_time_goes(run: Run, name: str, one: OurStep) -> None:
    """A row of the step's parts, a row of each of the longest kernels (on a CPU: operators), and the trace itself."""
    file = run.out / f"trace-{name}.json.gz"
    events = traced(one, file, run.device)
    if file.exists() and (size := file.stat().st_size) > LARGEST:
        file.unlink()
        run.say(name, left_out=f"{file.name}: {size / 1e6:.0f} MB")
    with run.guard(name, part="breakdown"):  # a trace without the step's range still has its kernels
        found = break_down(events)
        run.say(name, kernels=found.get("launches_per_step"), launch_seconds=found.get("seconds_launch"),
                **{f"{part}_s": found[f"seconds_{part}"] for part in PARTS})
    sums: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == ("kernel" if run.cuda else "cpu_op"):
            sums.setdefault(event["name"][:70], []).append(event["dur"] / 1e3)
    for kernel, milliseconds in sorted(sums.items(), key=lambda item: -sum(item[1]))[:KERNELS]:
        run.say(name, kernel=kernel, count=len(milliseconds), ms=sum(milliseconds))


def peer_step(run: Run, name: str, rounds: int = 4) -> None:
    """A row of a peer's LoRA step, by QUICK not compiled, and the ratio to ours if that has been measured in this process."""
    torch._dynamo.config.recompile_limit = 64  # one graph per length, branch and mode; all blocks share the code
    began = time.perf_counter()
    with mock.patch.dict(STRONGER[name], {"compile_blocks": None} if run.options.quick else {}):
        one = PeerStep(name, "lora", Workload(run.options, cell_of(run)))
        built = time.perf_counter() - began
        run.say(name.lower(), kind="lora", built_seconds=built, **timed(run, name, one, rounds))
    if ours := run.seconds.get("lora"):
        run.say(name.lower(), speedup=run.seconds[name] / ours, unit=f"{name} over ours, LoRA")


def lora(run: Run) -> None:
    """The headline's half that is ours, and where its time goes: which part is furthest from its plan."""
    our_step(run, "lora")


def lora_cublas(run: Run) -> None:
    """Decides in the step what `gemm` decides by kernels: pair_linear's default."""
    our_step(run, "lora_cublas", backend="cublas")


def r1(run: Run) -> None:
    """The headline's other half: the published step."""
    peer_step(run, "R1")


def velocities(run: Run) -> None:
    """Decides whether the pair as a whole computes what it should: the relative errors of the student's and the teacher's
    velocity, two layers deep, ours and eager's, against fp32's without TF32 (QUICK's in fp32: float64's)."""
    work = Workload(run.options, cell_of(run, layers=2))
    work.forget_encoders()
    ours, eager, time_ = OurStep("lora", work), PeerStep("R2", "lora", work).reference, work.grid[1]
    found = {}
    with torch.no_grad():
        found["ours"] = ours.open()(work.noise, work.noise.new_full((work.batch,), time_))
        for name, dtype in (("eager", run.dtype), ("exact", exact_dtype(run.dtype))):
            torch.nn.Module.to(eager.model, dtype)  # with its adapters
            with exactly(dtype):
                noise = work.noise.to(torch.promote_types(dtype, work.noise.dtype))
                found[name] = (-eager.student_prediction(noise, 1.0 - time_, work.student),
                               -eager.teacher_prediction(noise, 1.0 - time_, work.teacher))
    ours.close()
    errors = {name: [relative(*pair) for pair in zip(found[name], found["exact"])] for name in ("ours", "eager")}
    run.say("velocities", **errors, unit="relative error of v_s, v_t")


def full(run: Run) -> None:
    """Decides whether full fine-tuning fits one GPU with all activations kept (planned: 140.5 to 144.6 GB reserved)."""
    our_step(run, "full", "full", rounds=4)


def full_recompute(run: Run) -> None:
    """Decides what recomputation costs where it does not fit: the recipe's setting."""
    our_step(run, "full_recompute", "full", "recompute", rounds=3)


def r4(run: Run) -> None:
    """The strongest peer, compiled: the ratio that must not be hidden."""
    peer_step(run, "R4")
