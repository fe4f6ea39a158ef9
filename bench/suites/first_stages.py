"""The stages of bench/first_run.py, in the order of what they decide; each docstring says what that is.

A stage takes the Run, gives its numbers to `Run.say` as soon as it has them, and may raise. Sizes are those of the model's
standard configuration, with QUICK=1 of the small model's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from bench.breakdown import break_down, traced
from bench.clock import synchronize
from bench.harness import relative
from bench.references.reference_eager import STRONGER
from bench.suites import ops as kernels
from bench.suites import roofline
from bench.suites.workload import Cell, OurStep, PeerStep, Workload
from dopsd_kernels import pair_linear
from dopsd_kernels.adamw_ema_triton import Hyper, adamw_ema
from dopsd_kernels.attention import attention_fwd
from dopsd_kernels.attention_libraries import BACKENDS, math_backward, math_forward, usable
from dopsd_kernels.gated_residual_norm import gated_residual_norm_bwd
from dopsd_kernels.pair_linear_accumulate import pair_linear_accumulate
from dopsd_kernels.sequences import Sequences

if TYPE_CHECKING:
    from bench.first_run import Run

LARGEST = 16e6
"""Bytes that a trace may have; one that is larger is left out, its breakdown is in first.jsonl."""
KERNELS = 22
"""Of a trace, the kernels that take longest, a line each."""


# ---- what the machine can do -----------------------------------------------------------------------------------------


def env(run: Run) -> None:
    """Decides whether the machine is as fast as it should be (H200: 4.3 TB/s, 790 TFLOP/s); and what a launch costs."""
    limits, calls = run.limits, 200 if run.options.quick else 2000
    h = torch.empty(8, device=run.device)
    began = time.perf_counter()
    for _ in range(calls):
        h.add_(1)
    taken = time.perf_counter() - began
    run.say("env", copy_TBs=limits.bytes_per_second / 1e12, gemm_TFs=limits.flops_per_second / 1e12,
            launch_us=taken / calls * 1e6)


# ---- products --------------------------------------------------------------------------------------------------------


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
        none = x.new_empty(0)
        call = partial(pair_linear_accumulate, [total], [], [], dy[:1], x, scales[:1], none, none)
        found["dW_fp32_sums"] = run.rate(2 * tokens * n * k, call)
    if len(results) == 2:
        found["triton_against_cublas"] = [relative(*pair) for pair in zip(results["triton"], results["cublas"])]


# ---- attention -------------------------------------------------------------------------------------------------------


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
    more = max(1, quarter // 40)
    lengths = [quarter, quarter + more, quarter - 2 * more, quarter + 2 * more]
    packed = Sequences(lengths, run.device)
    q, k, v = (run.draw(packed.tokens, heads, width) for _ in range(3))
    work = 4 * heads * width * sum(tokens**2 for tokens in lengths)
    for name in ("auto", *fit):
        with run.guard("attend", backend=name, lengths=lengths):
            with torch.no_grad():
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


# ---- elementwise kernels ---------------------------------------------------------------------------------------------

OPS = ("rmsnorm_modulate", "gated_residual_norm", "qk_norm_rope", "swiglu", "layernorm_modulate", "divergence_step")


def ops(run: Run) -> None:
    """Decides which kernels deserve work: the share of the copy's bandwidth that each reaches, for the bytes that it declares,
    and its error beside eager's."""
    for name in OPS:
        with run.guard("ops", op=name):  # a kernel that does not compile hides no other
            run.say("ops", op=name, **speed_and_errors(run, kernels.OPS[name]))
        run.free()
    for name, measure in (("gated_residual_norm_bwd", gated_norm_backward), ("adamw_ema, low bits", optimizer)):
        with run.guard("ops", op=name):
            measure(run)
        run.free()


def speed_and_errors(run: Run, build: Callable[[kernels.Draw], kernels.Op]) -> dict[str, float]:
    op = build(kernels.Draw(run.size, run.device, run.dtype))
    work = roofline.work(build(kernels.Draw(run.size, torch.device("meta"), run.dtype)))
    row: dict[str, float] = {}
    exact = roofline.outcome(op.eager, op.to(torch.float64).tensors)
    for variant, function in (("ours", op.ours), ("eager", op.eager)):
        errors = roofline.relative_errors(roofline.outcome(function, op.tensors), exact)
        row |= {f"{variant}_{metric}": value for metric, value in errors.items()}
    for phase, call in roofline.phases(op.ours, op.tensors).items():
        seconds = run.clock(call)
        row |= {f"{phase}_us": seconds * 1e6, f"{phase}_copy_share": share(run, work[phase].bytes, seconds)}
    return row


def share(run: Run, moved: float, seconds: float) -> float:
    return moved / seconds / run.limits.bytes_per_second


def gated_norm_backward(run: Run) -> None:
    """The kernel of the step, which makes y again, with and without the sums that the gradients of weights and gate need."""
    tokens, width = run.size.length, run.size.width
    packed = Sequences([tokens], run.device)
    weight, gate, ones = run.draw(width), run.draw(1, width), torch.ones(tokens, device=run.device)
    dr, dy, h, r = (run.draw(tokens, width) for _ in range(4))
    for sums in (False, True):
        call = partial(gated_residual_norm_bwd, dr, dy, h, r, weight, gate, weight, gate, ones, ones, packed.row_sequence,
                       packed.chunks, sums, sums, True)
        with torch.no_grad():
            seconds = run.clock(call)
        moved = 7 * h.nbytes  # four read, dx, dh and y written
        run.say("ops", op="gated_residual_norm_bwd", sums=sums, us=seconds * 1e6, copy_share=share(run, moved, seconds))


def optimizer(run: Run) -> None:
    """AdamW + EMA with masters as low bits, the optimizer of full fine-tuning on one GPU."""
    count = 1 << 14 if run.options.quick else 1 << 26
    theta, ema = (torch.zeros(count, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    low, ema_low = (torch.zeros(count, device=run.device, dtype=torch.int16) for _ in range(2))
    m, v, grad = (torch.zeros(count, device=run.device) for _ in range(3))
    hyper = [Hyper(1e-4, 0.9, 0.999, 1e-8, 0.0, 0.9999, 1)]
    call = partial(adamw_ema, [theta], [grad], [m], [v], hyper, ema=[ema], theta_low=[low], ema_low=[ema_low])
    seconds = run.clock(call, 8)
    moved = grad.nbytes + 2 * sum(one.nbytes for one in (theta, ema, low, ema_low, m, v))
    run.say("ops", op="adamw_ema, low bits", us=seconds * 1e6, copy_share=share(run, moved, seconds))


# ---- whole steps -----------------------------------------------------------------------------------------------------


def cell_of(run: Run, pixels: int | None = None, batch: int | None = None) -> Cell:
    """A configuration; QUICK's is as small as the model allows."""
    return Cell(layers=1, pixels=32, batch=1 if batch is None else 2) if run.options.quick else Cell(pixels=pixels, batch=batch)


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
    run: Run, name: str, kind: str, cell: Cell, activations: str = "keep", backend: str = "auto", rounds: int = 6,
    trace: bool = False,
) -> None:
    """A row of our training step, and with `trace` the rows of where its time goes."""
    masters = "low_bits" if kind == "full" and run.dtype == torch.bfloat16 else "fp32"
    began = time.perf_counter()
    with products_by(backend):
        one = OurStep(kind, Workload(run.options, cell), activations, masters)
        try:
            built = time.perf_counter() - began
            row = timed(run, name, one, rounds)
            run.say(name, kind=kind, cell=cell.name, activations=activations, masters=masters, backend=backend,
                    built_seconds=built, **row, loss=one.report.loss, attention=one.pair.describe().get("attention"),
                    fell_back=one.fell_back())
            if trace:
                where_time_goes(run, name, one)
        finally:
            one.close()


def where_time_goes(run: Run, name: str, one: OurStep) -> None:
    """A row of the step's parts, a row of each of the longest kernels (on a CPU: operators), and the trace itself."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of every start and stop on the terminal
    file = run.out / f"trace-{name}.json"
    events = traced(one.step, [(one.engine, "step")], file, run.device)
    for written in run.out.glob(f"{file.name}*"):
        if written.stat().st_size > LARGEST:
            run.say(name, left_out=f"{written.name}: {written.stat().st_size / 1e6:.0f} MB")
            written.unlink()
    with run.guard(name, part="breakdown"):  # a trace without the step's range still has its kernels
        found = break_down(events)
        seconds = {f"{part}_s": s for part, s in found.seconds.items()}
        run.say(name, kernels=found.kernels, launch_seconds=found.launch, **seconds)
    sums: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == ("kernel" if run.cuda else "cpu_op"):
            sums.setdefault(event["name"][:70], []).append(event["dur"] / 1e3)
    for kernel, milliseconds in sorted(sums.items(), key=lambda item: -sum(item[1]))[:KERNELS]:
        run.say(name, kernel=kernel, count=len(milliseconds), ms=sum(milliseconds))


def peer_step(run: Run, name: str, rounds: int = 4) -> None:
    """A row of a peer's LoRA step, and the ratio to ours if that has been measured in this process."""
    torch._dynamo.config.recompile_limit = 64  # one graph per length, branch and mode; all blocks share the code
    compiled = {"compile_blocks": "eager"} if run.options.quick and "compile_blocks" in STRONGER[name] else {}
    began = time.perf_counter()
    with mock.patch.dict(STRONGER[name], compiled):
        one = PeerStep(name, "lora", Workload(run.options, cell_of(run)))
        built = time.perf_counter() - began
        run.say(name.lower(), kind="lora", built_seconds=built, **timed(run, name, one, rounds))
    if "lora" in run.seconds:
        run.say(name.lower(), speedup=run.seconds[name] / run.seconds["lora"], unit=f"{name} over ours, LoRA")


def lora(run: Run) -> None:
    """The headline's half that is ours, and where its time goes: which part is furthest from its plan."""
    our_step(run, "lora", "lora", cell_of(run), trace=True)


def lora_cublas(run: Run) -> None:
    """Decides in the step what `gemm` decides by kernels: pair_linear's default."""
    our_step(run, "lora_cublas", "lora", cell_of(run), backend="cublas", trace=True)


def r1(run: Run) -> None:
    """The headline's other half: the published step."""
    peer_step(run, "R1")


def lora_512(run: Run) -> None:
    """Decides whether the host's launches are the limit at 512^2 (batch 1), and what a batch of four regains."""
    for name, batch in (("lora_512", None), ("lora_512_batch4", 4)):
        with run.guard(name):
            our_step(run, name, "lora", cell_of(run, 512, batch))
        run.free()


def full(run: Run) -> None:
    """Decides whether full fine-tuning fits one GPU with all activations kept (planned: 140.5 to 144.6 GB reserved)."""
    our_step(run, "full", "full", cell_of(run), rounds=4, trace=True)


def full_recompute(run: Run) -> None:
    """Decides what recomputation costs where it does not fit: the recipe's setting."""
    our_step(run, "full_recompute", "full", cell_of(run), "recompute", rounds=3)


def r4(run: Run) -> None:
    """The strongest peer, compiled: the ratio that must not be hidden."""
    peer_step(run, "R4")


def r2(run: Run) -> None:
    """What of the published step its encoders are: R1 without them, eager."""
    peer_step(run, "R2")
