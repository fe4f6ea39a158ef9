"""AdamW with an exponential moving average of the weights as part of its state. The arithmetic: adamw_ema_triton.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dopsd_kernels.adamw_ema_triton import Hyper, adamw_ema, backend_for, join, split, update_torch

MASTERS = ("fp32", "low_bits")

_LISTS = ("theta", "theta_low", "grads", "exp_avg", "exp_avg_sq", "ema", "ema_low", "students", "teachers")


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101; the formulas of `torch.optim.AdamW`) and an average of its weights.

        g = grad_scale * grad
        theta = theta * (1 - lr * weight_decay)
        m = b1 * m + (1 - b1) * g;   v = b2 * v + (1 - b2) * g^2
        theta = theta - lr / (1 - b1^n) * m / (sqrt(v / (1 - b2^n)) + eps)
        ema = decay * ema + (1 - decay) * theta

    State of a parameter, all fp32 and shaped like it: `exp_avg` (m), `exp_avg_sq` (v), `ema` (only with an `ema_decay`;
    starts as the parameter before its first update), `master` (only for a parameter that is not fp32: theta itself, of
    which the parameter is the rounded copy), and `step` (n, a Python int per tensor: ZeRO-3 calls `step()` once per
    sub-group). fp32 because at decay 0.9999 the update of a bf16 average is below half a unit in its last place: it
    never moves.

    `teachers`: parameter -> tensor of as many elements, into which every step writes the average, rounded to its dtype.

    `masters="low_bits"` stores less, and computes the same: theta of a bf16 parameter is the parameter and `low` (int16, the
    low bits of the fp32 number) instead of `master`; the average of a bf16 parameter with a bf16 teacher is the teacher and
    `ema_low` instead of `ema`. Such a parameter differs from the rounded master only where two bf16 are equally near.
    `read` and `write` give and take fp32 whatever the storage. Bytes per bf16 parameter, teacher included, gradient
    not: a step moves 32 instead of 36, 16 instead of 20 are held.

    `ema_dtype=torch.bfloat16` rounds the average (to nearest, ties to even) after every step, and its beginning: the same
    numbers as an average that is stored in bf16 and updated in fp32, at the cost of a pass and without the saving. It is there
    to be compared with.

    `grad_scale`, 1 unless set: a factor of all gradients that is applied as they are read, so that clipping costs no pass.

    A shard of a parameter is a parameter like any other, so ZeRO shards and offloads the average with the moments.
    `torch.optim.Optimizer.load_state_dict` would round `ema` and `master` of a bf16 parameter; use
    dopsd_fast.storage.checkpoints.

    `ema_backend`: "triton" (CUDA: one launch for all tensors of the same dtypes), "native" (dopsd_kernels._native, CPU; one
    pass over memory, the same bits for any number of threads) or "torch", as used by the last step, or as it would be for
    the first parameter.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
        masters: str = "fp32",
        teachers: Mapping[Any, Tensor] | None = None,
        ema_dtype: torch.dtype = torch.float32,
    ) -> None:
        if ema_decay is not None and not 0.0 <= ema_decay <= 1.0:
            raise ValueError(f"ema_decay is {ema_decay}, must be in [0, 1]")
        if masters not in MASTERS:
            raise ValueError(f"masters is {masters!r}, must be {' or '.join(MASTERS)}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, ema_decay=ema_decay))
        if ema_dtype not in (torch.float32, torch.bfloat16) or (ema_dtype != torch.float32 and masters != "fp32"):
            raise ValueError(f"ema_dtype is {ema_dtype}, must be float32, or bfloat16 with masters='fp32'")
        self.masters = masters
        self.rounds = ema_dtype == torch.bfloat16
        self.grad_scale = 1.0
        self._teachers: dict[Tensor, Tensor] = {}
        for param, teacher in (teachers or {}).items():
            self.set_teacher(param, teacher)
        self.ema_backend = backend_for([torch.empty(0, device=self.param_groups[0]["params"][0].device)], [])

    # ---- the step ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("AdamWEMA takes no closure")
        calls: dict[Any, tuple[dict[str, list[Tensor]], list[Hyper]]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._enqueue(calls, param, group)
        for (_, contiguous, *_), (lists, hyper) in calls.items():
            if contiguous:
                self.ema_backend = backend_for(lists["theta"], lists["grads"], lists["students"], lists["teachers"])
                adamw_ema(**lists, hyper=hyper)  # type: ignore[arg-type]
            else:
                self.ema_backend = "torch"
                update_torch(list(lists.values()), hyper)
            self._round(lists)

    def _enqueue(self, calls: dict[Any, Any], param: Tensor, group: dict[str, Any]) -> None:
        """Adds the update of `param` to the call that takes tensors like its own."""
        number, state = self.begin(param, group), self.state[param]
        decay = group["ema_decay"]
        theta = state.get("master", param).detach()
        contiguous = theta.is_contiguous()
        grad = param.grad.detach()  # type: ignore[union-attr]
        teacher = self._teachers.get(param) if decay is not None else None
        tensors = dict(
            theta=theta,
            theta_low=state.get("low"),
            grads=grad.contiguous() if contiguous else grad,
            exp_avg=state["exp_avg"],
            exp_avg_sq=state["exp_avg_sq"],
            ema=None if decay is None else teacher if "ema_low" in state else state["ema"],
            ema_low=state.get("ema_low"),
            students=param.detach() if "master" in state else None,
            teachers=None if "ema_low" in state else teacher,
        )
        key = (theta.device, contiguous, *(None if t is None else t.dtype for t in tensors.values()))
        if key not in calls:
            calls[key] = {name: [] for name in _LISTS}, []
        lists, hyper = calls[key]
        for name, tensor in tensors.items():
            if tensor is not None:
                lists[name].append(tensor)
        hyper.append(number)

    # ---- the step of one tensor, part by part ---------------------------------------------------------------

    def begin(self, param: Tensor, group: dict[str, Any]) -> Hyper:
        """Counts a step of `param`; the numbers of that step, for `update`."""
        decay = group["ema_decay"]
        state = self.state[param] or self.init_state(param, decay is not None)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        decay = 0.0 if decay is None else decay
        return Hyper(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], decay, state["step"], self.grad_scale)

    @torch.no_grad()
    def update(
        self, param: Tensor, hyper: Hyper, start: int, numel: int, student: Tensor | None = None, teacher: Tensor | None = None
    ) -> None:
        """Elements [start, start + numel) of the step that `begin` counted, for a contiguous fp32 `param` with a gradient.
        `student`, `teacher`: where to write theta and the average too, rounded; `[numel]`, fp32 or bf16. The parts of a step
        together give the bits of `step`."""
        state = self.state[param]
        if param.dtype != torch.float32 or not param.is_contiguous() or param.grad is None:
            raise ValueError("AdamWEMA.update needs a contiguous fp32 parameter with a gradient")
        found = dict(
            theta=param.detach(), grads=param.grad, exp_avg=state["exp_avg"], exp_avg_sq=state["exp_avg_sq"],
            ema=state.get("ema"),
        )  # fmt: skip
        lists = {key: [t.view(-1).narrow(0, start, numel)] for key, t in found.items() if t is not None}
        lists |= {key: [t] for key, t in (("students", student), ("teachers", teacher)) if t is not None}
        self.ema_backend = backend_for(lists["theta"], lists["grads"], lists.get("students", []), lists.get("teachers", []))
        adamw_ema(**lists, hyper=[hyper])
        self._round(lists)

    def _round(self, lists: Mapping[str, Sequence[Tensor]]) -> None:
        """The averages, and the teachers that are their copies, to bf16 and back, where that is asked for."""
        for name in ("ema", "teachers") if self.rounds else ():
            for tensor in lists.get(name, ()):
                tensor.copy_(tensor.bfloat16())

    # ---- state ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_state(self, param: Tensor, ema: bool) -> dict[str, Any]:
        """Creates the state of `param` from its present value, unless it exists."""
        state = self.state[param]
        if not state:
            low_bits = self.masters == "low_bits" and param.dtype != torch.float32
            if low_bits and param.dtype != torch.bfloat16:
                raise ValueError(f"AdamWEMA: masters=low_bits needs bf16 or fp32 parameters, one is {param.dtype}")
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
            if low_bits:
                state["low"] = torch.zeros_like(param, dtype=torch.int16)
            elif param.dtype != torch.float32:
                state["master"] = param.detach().float()
            teacher = self._teachers.get(param) if ema else None
            if teacher is not None:
                teacher.copy_(param.detach())
            if ema and low_bits and teacher is not None and teacher.dtype == torch.bfloat16:
                state["ema_low"] = torch.zeros_like(param, dtype=torch.int16)
            elif ema:
                state["ema"] = param.detach().to(torch.float32, copy=True)
                self._round({"ema": [state["ema"]], "teachers": [] if teacher is None else [teacher]})
        return state

    def set_teacher(self, param: Tensor, teacher: Tensor) -> None:
        """From its first step on, `param` keeps the rounded average in `teacher`, which begins as a copy of `param`. To be
        called before the state of `param` exists. Raises ValueError."""
        if param in self.state:
            raise ValueError("AdamWEMA: a teacher must be set before the first step or init_state of its parameter")
        if teacher.numel() != param.numel() or teacher.device != param.device or not teacher.is_contiguous():
            raise ValueError(
                f"AdamWEMA: a teacher must be contiguous, on {param.device} and have {param.numel()} elements; one is on "
                f"{teacher.device} with {teacher.numel()} elements and strides {teacher.stride()}"
            )
        self._teachers[param] = teacher.detach().view(param.shape)

    @torch.no_grad()
    def read(self, param: Tensor, kind: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Elements [start, start + numel) of "master" (theta), "exp_avg", "exp_avg_sq" or "ema": flat, fp32; a view of the
        state where it is stored as such."""
        high, low, _ = self._stored(param, kind)
        numel = high.numel() - start if numel is None else numel
        part = high.view(-1).narrow(0, start, numel)
        return part if low is None else join(part, low.view(-1).narrow(0, start, numel))

    @torch.no_grad()
    def write(self, param: Tensor, kind: str, values: Tensor, start: int = 0) -> None:
        """The inverse of `read`: sets the elements from `start` on, and the parameter or the teacher that is their rounded
        copy."""
        high, low, copy = self._stored(param, kind)
        parts = [None if t is None else t.view(-1).narrow(0, start, values.numel()) for t in (high, low, copy)]
        values = values.view(-1).to(high.device, torch.float32)
        new = (values, None, values) if low is None else (*split(values), None)
        for part, value in zip(parts, new):
            if part is not None and value is not None:
                part.copy_(value)

    def _stored(self, param: Tensor, kind: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Where `kind` is: (fp32 tensor, None, its rounded copy if any) or (upper half, low bits, None)."""
        state = self.state[param]
        here = param.detach()
        if kind == "master":
            return (here, state["low"], None) if "low" in state else (state.get("master", here), None, here)
        if kind == "ema" and "ema_low" in state:
            return self._teachers[param], state["ema_low"], None
        if kind == "ema":
            return state["ema"], None, self._teachers.get(param)
        return state[kind], None, None
