"""ZeRO stages 1 to 3: DeepSpeed shards the optimizer (1), the gradients (2) and the weights (3). Each rank averages the EMA on
its own shard, so that the teacher costs no further reduction."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dopsd_fast.distributed.engine import Engine
from dopsd_fast.distributed.fetching import Fetcher, Holder, Reducer, give_zeros, sharded_parameters
from dopsd_fast.distributed.fragments import Fragment
from dopsd_fast.distributed.offload import Offload, offloads, take_pinning
from dopsd_fast.distributed.process_group import Ranks
from dopsd_fast.errors import UserError
from dopsd_fast.pair.passes import Turns
from dopsd_fast.pair.student_teacher import Pair
from dopsd_fast.settings.schema import DeepSpeedSettings, TeacherSettings, TrainSettings


class ZeroEngine(Engine):
    """The engine of ZeRO stages 1, 2 and 3, on CUDA (NCCL) and on CPU (gloo). It keeps the EMA on the shard.

    The constructor's order is fixed. DeepSpeed must see the optimizer before it has state, because DeepSpeed replaces the
    parameters that the optimizer knows by flat shards, and our optimizer begins its state on those. Every rank goes through
    the same order, because taking over the shards and gathering the teacher are collective calls.

    config: DeepSpeed's dict (`settings.deepspeed_dict`). Raises UserError for what DeepSpeed refuses in it."""

    def __init__(
        self,
        pair: Pair,
        train: TrainSettings,
        teacher: TeacherSettings,
        deepspeed: DeepSpeedSettings,
        config: dict[str, Any],
        ranks: Ranks,
    ) -> None:
        super().__init__(pair, train, teacher, ranks)
        self.stage = int(deepspeed.stage)
        self.gather = _gather_of(deepspeed)
        pinned = take_pinning(config)
        held = Holder(sharded_parameters(pair)) if self.gather in ("step", "sweep") else pair
        self._engine = _initialize(held, self.optimizer, config, bool(deepspeed.config))
        self._zero: Any = self._engine.optimizer  # DeepSpeed's ZeRO optimizer around ours
        pair.gather, self.fetcher = self.gather, None
        if pair.fused is not None:
            pair.fused.hooked = self.gather == "unit"
        if self.gather in ("step", "sweep"):
            self.fetcher = Fetcher(pair, bool(config["zero_optimization"].get("zero_quantized_weights")))
            self.reducer = Reducer(self._zero, [trained.student for trained in self._trained])
            pair.sweep = self._sweep
        if self.stage < 3 and self._trained[0].student.dtype != torch.float32:
            _reduce_fp32(self._zero)
        self._fragments = list(self._find_fragments())
        for flat in self._flats():
            self.optimizer.init_state(flat, self.keeps_ema)
        self._teacher_flats = self._flatten_teacher() if self.stage < 3 and self.keeps_ema else []
        self.offload: Offload | None = None
        if offloads(self._zero):
            averaged = self._fragments if self.keeps_ema else []
            flats = list(self._flats())
            self.offload = Offload(self._zero, self.optimizer, flats, averaged, self._teacher_flats, ranks, pinned)
        if self.optimizer.rounds:
            self._refresh_teacher()

    # ---- one step ------------------------------------------------------------------------------------------

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Reduces on leaving: through our `Reducer` where the fetcher gathers (`own`), else through DeepSpeed, whose
        `coalesce_grad_reduction` holds back its reductions until then."""
        own = self.fetcher is not None
        with (nullcontext if own else self._engine.coalesce_grad_reduction)():
            try:
                yield
            except BaseException:
                self._drop_gradients()
                raise
            if not own:
                self._fill_gradients()
        if own:
            self.reducer.finish()

    def backward(self, loss: Tensor) -> None:
        if self.fetcher is not None:
            loss.backward()
        else:
            self._engine.backward(loss)

    def _sweep(self, turns: Turns) -> None:
        """Takes the turns of a sweep and reduces each unit's gradients when its last turn is over."""
        assert self.fetcher is not None
        self.fetcher.sweep(turns, self.reducer.reduce)
        self.reducer.reduce_rest()

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.fetcher is not None:
            self.fetcher.release()
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied():
            return norm if not math.isfinite(norm) else math.inf
        self._refresh_teacher(written=self.offload is not None)
        return norm

    def _fill_gradients(self) -> None:
        """Gives zeros to each parameter that got no gradient on this rank. Without them DeepSpeed would reduce the parameter on
        the other ranks alone, and at stage 3 would step it with the gradient of an earlier step."""
        for trained in self._trained:
            param = trained.student
            if param.grad is None and getattr(param, "grad_accum", None) is None:
                if self.stage == 3:
                    give_zeros(param)
                elif self._zero.use_grad_accum_attribute:
                    param.grad_accum = torch.zeros_like(param, dtype=torch.float32)
                else:
                    param.grad = torch.zeros_like(param, dtype=torch.float32)

    def _drop_gradients(self) -> None:
        if self.fetcher is not None:
            self.reducer.forget()
        for trained in self._trained:
            trained.student.grad = None
            trained.student.grad_accum = None

    # ---- where the optimizer's tensors are -----------------------------------------------------------------

    def _flats(self) -> list[Tensor]:
        """Lists the flat tensors that the optimizer steps on this rank. One may consist of padding alone."""
        return self._zero.fp32_partitioned_groups_flat if self.stage == 3 else self._zero.single_partition_of_fp32_groups

    def _find_fragments(self) -> Iterator[Fragment]:
        """Yields the elements of each trained tensor that lie on this rank. Stages 1 and 2 divide a flat tensor of many
        parameters among the ranks, stage 3 each parameter by itself."""
        for trained in self._trained:
            param = trained.student
            if self.stage < 3:
                # param._hp_mapping does not serve: with round_robin_gradients it follows another order than the flat tensor.
                for group, whole in enumerate(self._zero.bit16_groups_flat):
                    if param.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                        size = whole.numel() // self.world
                        start = param.storage_offset() - whole.storage_offset() - size * self.rank
                        first, last = max(start, 0), min(start + param.numel(), size)
                        if first < last:  # otherwise no element of it is on this rank
                            flat = self._zero.single_partition_of_fp32_groups[group]
                            yield Fragment(trained, first - start, last - first, flat, first)
            else:
                group, start, size = self._zero.grad_position[self._zero.get_param_id(param)]
                offset = size * self.rank
                numel = min(size, param.ds_numel - offset)  # the last ranks hold padding
                if numel > 0:
                    flat = self._zero.fp32_partitioned_groups_flat[group]
                    yield Fragment(trained, offset, numel, flat, start)

    # ---- the teacher's weights -----------------------------------------------------------------------------

    @torch.no_grad()
    def _refresh_teacher(self, written: bool = False) -> None:
        """Casts the EMA into the teacher's parameters, on every rank. `written` says that the step itself has already written
        this rank's shards, so that they need only be gathered."""
        if not self.keeps_ema:
            return
        if self.stage == 3:
            fragments = () if written else self._fragments
            self._write_partitions((f.trained.teacher, self._state(f, "ema")) for f in fragments)
        else:
            for group, whole in enumerate(self._teacher_flats):
                parts = list(whole.chunk(self.world))
                if not written:
                    parts[self.rank].copy_(self.optimizer.read(self._flats()[group], "ema"))
                torch.distributed.all_gather(parts, parts[self.rank].clone())

    def _flatten_teacher(self) -> list[Tensor]:
        """Lays the teacher's parameters out as DeepSpeed laid out the student's (stages 1 and 2), so that one gather per group
        distributes the EMA to all ranks. Returns the flat tensors, which the teacher's parameters are views of."""
        flats = [flat.clone() for flat in self._zero.bit16_groups_flat]
        for trained in self._trained:
            student, teacher = trained.student, trained.teacher
            for source, flat in zip(self._zero.bit16_groups_flat, flats):
                if student.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
                    start = student.storage_offset() - source.storage_offset()
                    view = flat.narrow(0, start, student.numel()).view(student.shape)
                    view.copy_(teacher)
                    teacher.data = view
        return flats

    def _write_partitions(self, values: Iterator[tuple[Any, Tensor]]) -> None:
        """Overwrites this rank's partitions with `values` (stage 3). Parameters that DeepSpeed keeps gathered are gathered
        again, because their gathered copies are old."""
        if self.fetcher is not None:
            self.fetcher.release()
        gathered = [t for trained in self._trained for t in (trained.teacher, trained.student) if t is not None]
        gathered = [param for param in gathered if param.ds_status.name == "AVAILABLE"]
        if gathered:
            gathered[0].partition(gathered)
        for param, value in values:
            param.ds_tensor.data.view(-1).narrow(0, 0, value.numel()).copy_(value)
        for trained in self._trained:  # drop hpZ's copies, which are old now, also where this rank's part is only padding
            for param in (trained.student, trained.teacher):
                if param is not None:
                    param.ds_secondary_tensor = None
        if gathered:
            gathered[0].all_gather(gathered)

    # ---- state in and out ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.stage == 3:
            self._write_partitions((f.trained.student, self._state(f, "master")) for f in self._fragments)
        else:
            self._zero.update_lp_params()
        self._refresh_teacher()

    def _frozen(self, fragment: Fragment, teacher: Any) -> Tensor:
        if self.stage == 3:
            return teacher.ds_tensor.view(-1).narrow(0, 0, fragment.numel)
        return super()._frozen(fragment, teacher)

    def describe(self) -> dict[str, Any]:
        return super().describe() | (self.offload.describe() if self.offload is not None else {})

    def close(self) -> None:
        """Removes DeepSpeed's hooks from the pair, and ours; the process group stays."""
        if self.fetcher is not None:
            self.fetcher.close()
        if self.offload is not None:
            self.offload.close()
        self._engine.destroy()
        import deepspeed

        deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # a later engine would go on using hpZ's group


def _gather_of(deepspeed: DeepSpeedSettings) -> str | None:
    """Returns how stage 3 gathers, and None for the other stages. The memory plan usually resolves "auto"; where it has not,
    "auto" means "step"."""
    if deepspeed.stage != 3:
        return None
    return "step" if deepspeed.gather == "auto" else deepspeed.gather


def _initialize(pair: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], given: bool = False) -> Any:
    """Calls `deepspeed.initialize` and returns its engine. `given` says that part of `config` comes from the user: then an
    objection of DeepSpeed is taken to concern that part and becomes a UserError."""
    import deepspeed
    from pydantic import ValidationError

    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    if isinstance(pair, Pair) and pair.fused is not None and config["zero_optimization"]["stage"] == 3:
        deepspeed.utils.set_z3_leaf_modules(pair, list(pair.fused.gather_units()), raise_if_not_found=False)
    logger.setLevel(logging.ERROR)  # DeepSpeed warns of every optimizer that is not its own
    try:
        return deepspeed.initialize(model=pair, optimizer=optimizer, config=config)[0]
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"deepspeed.config: {error.title}, {field}: {first['msg']}") from error
    except (AssertionError, NotImplementedError, ValueError) as error:
        if not given:
            raise
        raise UserError(f"deepspeed.config: DeepSpeed refuses it: {' '.join(str(error).split())[:300]}") from error
    finally:
        logger.setLevel(level)


def _reduce_fp32(zero: Any) -> None:
    """Makes DeepSpeed's optimizer of stages 1 and 2 sum bf16 gradients in fp32 (`param.grad_accum`) and reduce that sum.

    As configured, stage 2 would round the sum to bf16 before it reduces. DeepSpeed has the fp32 path at stage 1, but its
    configuration chooses that path only together with an optimizer that cannot reduce once per step; so the attributes are set
    here."""
    zero.gradient_accumulation_dtype = torch.float32
    zero.use_separate_grad_accum = True
    zero.use_grad_accum_attribute = True
