"""AdamW on low-rank gradients."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from owlore_tune.clock import Clock
from owlore_tune.distributed.world import World, compute_device, local, moved_to, rows_of
from owlore_tune.models.decoder import model_parts
from owlore_tune.optim import low_bits
from owlore_tune.optim.moments import MOMENT_KEYS, adamw_, carry_moments, compute_dtype, restore_moments, zero_moments
from owlore_tune.optim.offload import Offload
from owlore_tune.optim.options import check_group, is_projected
from owlore_tune.optim.projection import (
    is_right,
    project,
    range_finder,
    side_factor,
    sketch_rows,
    svd_basis,
)
from owlore_tune.optim.rounding import noise_for, round_to

T = TypeVar("T")

INACTIVE_STATES = ("drop", "offload", "keep")
# Values that one call of AdamW takes. This bounds float32 temporaries. On a CPU they fit in its cache; on a GPU they
# amortize a kernel launch.
_PIECE = {"cpu": 2**20, "other": 2**24}
# Values of a 16-bit weight that a low-rank direction updates at once.
_MOVED = {"cpu": 2**22, "other": 2**25}


def parameter_groups(
    model: nn.Module,
    *,
    train_embeddings: bool = False,
    train_output: bool = False,
    train_norm: bool = False,
) -> list[dict[str, Any]]:
    """The parameter groups of `OwLoreAdamW` for a decoder of torchtune or transformers.

    All layers form one group, projected to the optimizer's rank. Other trained parameters form a second group at full
    rank. The remaining parameters are not in the optimizer; freeze them (`ActiveLayers` does).
    """
    parts = model_parts(model)
    layers = [parameter for layer in parts.layers for parameter in layer.values()]
    wanted = ((train_embeddings, parts.embeddings), (train_output, parts.output), (train_norm, parts.norm))
    others = [parameter for train, part in wanted if train for parameter in part.values()]
    return [{"params": layers}] + ([{"params": others, "rank": None}] if others else [])


class Refresh(NamedTuple):
    """A basis computed in a step."""

    seconds: float
    energy: float  # share of the gradient's energy in the basis, estimated from a sketch


class _NewBasis(NamedTuple):
    """A basis that no step has used yet."""

    energy: Tensor  # () NaN if the gradient gave no basis
    turn: Tensor | None  # (r, r) old basisᵀ · new basis, if the moments are projected
    replaces_one: bool  # whether there was a basis before


@dataclass(frozen=True)
class _Slot:
    """Fixed properties of a parameter in the optimizer."""

    index: int  # over all groups
    shape: torch.Size  # also while a frozen layer has no values on the device
    group: int
    projected: bool
    right: bool  # projected on the right side


class OwLoreAdamW(Optimizer):
    """AdamW with moments in a low-rank projection of each weight's gradient (OwLore, arXiv 2405.18380, §3.3).

    For a weight (m, n) with gradient G, the optimizer keeps a basis P (n, r), computes AdamW's direction D from the
    low-rank gradient G P (m, r), and updates the weight by −lr · scale · D Pᵀ. Weight decay is decoupled and acts on
    the full weight. Arithmetic is float32 (float64 for float64 weights) for every weight dtype. Moments and bases have
    the same dtype unless ``state_bits`` or ``basis_bits`` is lower. The weight is written once per step. Plain AdamW
    trains weights that a projection would not shrink (1-D parameters, and weights with a shorter side of at most
    ``rank``), and all weights if ``rank`` is None.

    `project_grad` reduces a projected weight's gradient to (m, r). It runs in a backward hook (`ActiveLayers`), after
    each backward (`project_grads`), or in `step`. Reduced gradients accumulate over micro-batches until `step`. If the
    basis is due for a refresh, it is computed from the first micro-batch with a gradient. If that gradient is zero (an
    expert without tokens), a weight with no earlier basis is not updated in this step.

    With side ``right``, the direction D of a wide weight (m < n) has m · r entries of about 1; GaLore's rule gives
    r · n. D is multiplied by √(n/m), which makes ``lr`` and ``scale`` comparable between the sides.

    Args:
        params: parameters or groups, see `parameter_groups`. Every option below except ``seed`` can differ by group.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        rank: r; None for full rank.
        update_gap: optimizer steps between refreshes of a basis.
        scale: factor on the projected direction.
        side: ``right``, or ``shape`` for GaLore's rule (the shorter side).
        moments: at a refresh, ``keep`` them (GaLore's behavior), ``project`` them onto the new basis, or ``reset``.
        basis: ``randomized`` (see `range_finder`) or ``svd`` (exact but slow).
        state_bits: bits of the moments, 32 or 8. A step uses its moments before they are rounded.
        basis_bits: bits of the bases, 32, 16 or 8.
        stochastic_rounding: write bfloat16 weights with stochastic rounding. Without it, updates smaller than half the
            distance between two bfloat16 values are lost.
        seed: seed of the Gaussian sketches.

    Raises:
        ValueError: if a value is out of range, if ``rank`` is too large for every weight of a group, or if a parameter
            is not contiguous in memory.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_gap: int = 100,
        scale: float = 1.0,
        side: str = "right",
        moments: str = "keep",
        basis: str = "randomized",
        state_bits: int = 32,
        basis_bits: int = 32,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"seed={seed!r}; it must be an integer")
        self._seed = seed
        self._slots: dict[Tensor, _Slot] = {}
        self._low_grads: dict[Tensor, Tensor] = {}  # accumulated over micro-batches since the last step
        self._sketches: dict[Tensor, Tensor] = {}  # of the accumulated gradient, for bases computed in this step
        self._refreshed: dict[Tensor, _NewBasis] = {}  # since the last step
        self._clocks: dict[torch.device, Clock] = {}
        self._round_to = round_to
        self._offload = Offload()
        self.last_refreshes: list[Refresh] = []  # from the last call of `step`
        defaults = dict(
            lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, rank=rank, update_gap=update_gap,
            scale=scale, side=side, moments=moments, basis=basis, state_bits=state_bits, basis_bits=basis_bits,
            stochastic_rounding=stochastic_rounding,
        )  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group)
        for parameter in group["params"]:
            if not parameter.is_contiguous():
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not contiguous")
            projected = is_projected(parameter, group["rank"])
            right = projected and is_right(parameter.shape, group["side"])
            slot = _Slot(len(self._slots), parameter.shape, len(self.param_groups) - 1, projected, right)
            self._slots[parameter] = slot
            if World.of(parameter).size > 1 and slot.projected:
                _check_sharded(group, slot.right)

    def group_of(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter group that holds ``parameter``."""
        return self.param_groups[self._slots[parameter].group]

    def is_projected(self, parameter: Tensor) -> bool:
        """Whether gradients of ``parameter`` are reduced to low rank."""
        return self._slots[parameter].projected

    def is_right(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is projected on its right side. False if it is not projected."""
        return self._slots[parameter].right

    def meta_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state tensors of ``parameter`` in training, on the meta device (no data)."""
        group = self.group_of(parameter)
        meta = parameter.to("meta")
        if not self.is_projected(parameter):
            return zero_moments(meta, meta.shape, group, by_column=False)
        m, n = parameter.shape
        right, rank = self.is_right(parameter), group["rank"]
        basis = torch.empty(n if right else m, rank, dtype=compute_dtype(parameter), device="meta")
        moments = zero_moments(meta, (m, rank) if right else (rank, n), group, by_column=right)
        return moments | {"basis": low_bits.store(basis, group["basis_bits"], by_column=True)}

    @torch.no_grad()
    def project_grad(self, parameter: Tensor) -> None:
        """Reduce ``parameter.grad`` (m, n) to low rank, accumulate the result, and free the full gradient.

        Does nothing for a weight that is not projected or has no gradient. Can be passed to
        ``Tensor.register_post_accumulate_grad_hook``.
        """
        if parameter.grad is None or not self.is_projected(parameter):
            return
        group = self.group_of(parameter)
        state = self.state[parameter]
        right = self.is_right(parameter)
        grad, dtype = moved_to(parameter.grad, compute_device(parameter)), compute_dtype(parameter)
        parameter.grad = None
        is_due = state.get("basis_age", math.inf) >= group["update_gap"]
        if is_due:
            self._refresh(parameter, grad, group)
        grad = local(grad)
        low = project(grad, _basis(state, dtype), right)
        refreshed = self._refreshed.get(parameter)
        if parameter not in self._low_grads:
            self._low_grads[parameter] = low
        else:
            if refreshed is not None and not refreshed.replaces_one:  # the first gradient gave no basis
                low = torch.where(refreshed.energy.isnan(), 0, low)
            self._low_grads[parameter].add_(low)
        if refreshed is not None:
            sketch = sketch_rows(grad if right else grad.T, self._generator(parameter, grad.device, "sketch"))
            self._sketches[parameter] = self._sketches.get(parameter, 0) + sketch

    def project_grads(self) -> None:
        """Call `project_grad` on every parameter. Use it after each backward if no hook does."""
        for parameter in self._slots:
            self.project_grad(parameter)

    def _refresh(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Compute a new basis from ``grad`` (m, n).

        A zero or non-finite gradient gives no basis: the old one stays, and `_settle` makes a refresh due again, once
        the values are read.
        """
        state = self.state[parameter]
        right = self.is_right(parameter)
        with self._clock(grad.device)(parameter):
            old = _basis(state, compute_dtype(parameter)) if state.get("basis_age", math.inf) < math.inf else None
            if group["basis"] == "svd":
                new, energy = svd_basis(local(grad), group["rank"], right)
            else:
                generator = self._generator(parameter, grad.device)
                new, energy = range_finder(grad if right else grad.T, group["rank"], generator=generator, start=old)
            turn = None
            if old is not None:
                if grad.is_cuda:  # FSDP2 calls hooks on another stream than the one the old basis was allocated on
                    for part in low_bits.named_parts(state["basis"]).values():
                        part.record_stream(torch.cuda.current_stream(grad.device))
                new = torch.where(energy.isnan(), old, new)
                turn = old.T @ new if group["moments"] == "project" else None
            state["basis"], state["basis_age"] = low_bits.store(new, group["basis_bits"], by_column=True), 0
        self._refreshed[parameter] = _NewBasis(energy, turn, old is not None)

    def _settle(self) -> None:
        """Carry moments over to the new bases, and find the gradients that gave none. Waits for the device once."""
        if not self._refreshed:
            return
        missing = torch.stack([refreshed.energy for refreshed in self._refreshed.values()]).isnan().tolist()
        for (parameter, refreshed), is_missing in zip(list(self._refreshed.items()), missing, strict=True):
            state, group = self.state[parameter], self.group_of(parameter)
            if is_missing:  # an age of `inf` says that there is no basis to start from
                state["basis_age"] = group["update_gap"] if refreshed.replaces_one else math.inf
                del self._refreshed[parameter]
                self._sketches.pop(parameter, None)
            elif refreshed.replaces_one and "step" in state:
                carry_moments(state, refreshed.turn, group["moments"], self.is_right(parameter))

    def _clock(self, device: torch.device) -> Clock:
        return self._clocks.setdefault(device, Clock(device))

    def _generator(self, parameter: Tensor, device: torch.device, purpose: str = "basis") -> torch.Generator:
        """A generator for this weight and step. It needs no saved state, so a resumed run gets the same one."""
        text = f"{self._seed} {self._slots[parameter].index} {self.state[parameter].get('step', 0)} {purpose}"
        return torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]))

    def _refreshes_of_step(self) -> list[Refresh]:
        """The bases computed in this step, with their shares of the accumulated gradient's energy.

        A share is ‖S P‖² / ‖S‖² for a sketch S of the gradient's rows, because the gradient summed over micro-batches
        is never materialized. Each process sketches its own rows of a sharded weight.
        """
        if not self._sketches:
            return []
        energies = []  # (2,) per weight: in the basis, total
        for parameter, sketch in self._sketches.items():
            inside = sketch @ _basis(self.state[parameter], sketch.dtype)
            energies.append(torch.stack([inside.double().square().sum(), sketch.double().square().sum()]))
        sums = World.of(next(iter(self._sketches))).sum_(torch.stack(energies))
        shares = (sums[:, 0] / sums[:, 1]).clamp(0, 1).tolist()
        seconds = {parameter: spent for clock in self._clocks.values() for parameter, spent in clock.read().items()}
        return [Refresh(seconds[parameter], share) for parameter, share in zip(self._sketches, shares, strict=True)]

    def step_grads(self) -> dict[Tensor, Tensor]:
        """The gradients for the next step, by parameter: (m, r) if projected, else in the parameter's shape."""
        self.project_grads()
        # In the optimizer's order, not backward's. A norm over them is then bit-identical in every mode.
        grads = {parameter: self._low_grads.get(parameter, parameter.grad) for parameter in self._slots}
        return {parameter: local(grad) for parameter, grad in grads.items() if grad is not None}

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients for the next step to a total norm of at most ``max_norm``.

        A projected weight contributes the norm of its low-rank gradient, the only part that updates the weight. Full
        gradients are not accumulated over micro-batches, so their norm is not known in every mode.

        Returns:
            The total 2-norm before clipping, (). ``max_norm=inf`` only measures.
        """
        grads = list(self.step_grads().values())
        if not grads:
            return torch.zeros(())
        norm = torch.nn.utils.get_total_norm(grads)
        world = World.of(next(iter(self._slots)))
        if world.size > 1:
            norm = world.sum_(norm.square()).sqrt()
        if math.isfinite(max_norm):
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = torch.where(norm.isfinite(), factor, 1.0)  # else they turn NaN
            for device in {grad.device for grad in grads}:
                torch._foreach_mul_([grad for grad in grads if grad.device == device], factor.to(device))
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.project_grads()
        self._settle()
        for group in self.param_groups:
            projected = [parameter for parameter in group["params"] if parameter in self._low_grads]
            for alike in self._alike(projected, self._low_grads):
                sizes = [self._low_grads[parameter].numel() for parameter in alike]
                for together in _batches(alike, sizes, _limit(_PIECE, self._low_grads[alike[0]].device)):
                    self._step_projected(together, group)
            grads = {p: local(p.grad) for p in group["params"] if p.grad is not None}
            for alike in self._alike(grads, grads):
                self._step_full_rank(alike, grads, group)
        self.last_refreshes = self._refreshes_of_step()
        self._forget_step()
        return loss

    def compile(self, **kwargs: Any) -> None:
        """Compile the elementwise part of the update of 16-bit weights.

        Args:
            kwargs: passed to ``torch.compile``.
        """
        self._round_to = torch.compile(round_to, **kwargs)

    def _alike(self, parameters: Iterable[Tensor], grads: dict[Tensor, Tensor]) -> Iterable[list[Tensor]]:
        """Sort parameters into those that one call of AdamW can take: same device, dtypes and number of steps."""
        found: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter in parameters:
            grad = grads[parameter]
            key = (grad.device, grad.dtype, parameter.dtype, self.state[parameter].get("step", 0))
            found.setdefault(key, []).append(parameter)
        return found.values()

    def _step_projected(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update weights (m, n) from their low-rank gradients: (m, r) on the right, else (r, n)."""
        low_grads = [self._low_grads[parameter] for parameter in parameters]
        dtype, moments, lengths = low_grads[0].dtype, [], []
        for parameter, low_grad in zip(parameters, low_grads, strict=True):
            right = self.is_right(parameter)
            state = self._advance(parameter, low_grad, group, by_column=right)
            state["basis_age"] += 1
            moments.append(restore_moments([state[key] for key in MOMENT_KEYS], dtype, by_column=right))
            lengths.append(-group["lr"] * group["scale"] * (side_factor(parameter.shape) if right else 1.0))
        sizes = [low_grad.numel() for low_grad in low_grads]
        flat = torch.zeros(sum(sizes), dtype=dtype, device=low_grads[0].device)
        directions = [some.view_as(grad) for some, grad in zip(flat.split(sizes), low_grads, strict=True)]
        step = self.state[parameters[0]]["step"]
        adamw_(directions, low_grads, moments, step, group, lr=-1.0, weight_decay=0.0)
        torch._foreach_mul_(directions, lengths)
        for parameter, some_moments, direction in zip(parameters, moments, directions, strict=True):
            right, state = self.is_right(parameter), self.state[parameter]
            for key, moment in zip(MOMENT_KEYS, some_moments, strict=True):
                low_bits.update(state[key], moment, by_column=right)
            basis = _basis(state, dtype)
            self._move(local(parameter), (direction, basis.T) if right else (basis, direction), group)

    def _move(self, own: Tensor, factors: tuple[Tensor, Tensor], group: dict[str, Any]) -> None:
        """Decay a weight (m, n) and add the product of ``factors``, (m, r) and (r, n)."""
        rows, columns = factors
        decay = 1 - group["lr"] * group["weight_decay"]
        if own.dtype == rows.dtype and own.device == rows.device:
            own.addmm_(rows, columns, beta=decay)
            return
        pieces = math.ceil(own.numel() / _limit(_MOVED, own.device)) or 1
        for weight, some_rows in zip(own.tensor_split(pieces), rows.tensor_split(pieces), strict=True):
            on_device = weight.to(rows.device)  # the weight itself, unless FSDP2 keeps it in host memory
            noise = noise_for(on_device, group["stochastic_rounding"])
            self._round_to(on_device, some_rows @ columns, noise, decay)
            if on_device is not weight:
                weight.copy_(on_device)

    def _step_full_rank(self, parameters: list[Tensor], grads: dict[Tensor, Tensor], group: dict[str, Any]) -> None:
        """AdamW on whole weights, in pieces of bounded size. Small weights share one."""
        size = _limit(_PIECE, parameters[0].device)
        pieces = []  # of weight, gradient and moments, (values,) each
        for parameter in parameters:
            state = self._advance(parameter, grads[parameter], group)
            weight, grad = local(parameter).view(-1), grads[parameter].reshape(-1)
            for start in range(0, len(weight), size):
                stop = min(start + size, len(weight))
                stored = [low_bits.piece(state[key], start, stop) for key in MOMENT_KEYS]
                pieces.append((weight[start:stop], grad[start:stop], stored))
        step = self.state[parameters[0]]["step"]
        for together in _batches(pieces, [len(weight) for weight, *_ in pieces], size):
            weights, some_grads, moments = (list(each) for each in zip(*together, strict=True))
            self._step_pieces(weights, some_grads, moments, step, group)

    def _step_pieces(
        self,
        weights: list[Tensor],  # (values,) each
        grads: list[Tensor],
        stored: list[list[Tensor]],  # moments
        step: int,
        group: dict[str, Any],
    ) -> None:
        dtype, sizes = compute_dtype(weights[0]), [len(weight) for weight in weights]
        moments = [restore_moments(some, dtype) for some in stored]
        flat = None if weights[0].dtype == dtype else _joined(weights, dtype)
        targets = weights if flat is None else list(flat.split(sizes))
        if grads[0].dtype != dtype:
            grads = list(_joined(grads, dtype).split(sizes))
        adamw_(targets, grads, moments, step, group, lr=group["lr"], weight_decay=group["weight_decay"])
        for kept, some in zip(stored, moments, strict=True):
            for one, moment in zip(kept, some, strict=True):
                low_bits.update(one, moment)
        if flat is not None:
            rounded = torch.empty_like(flat, dtype=weights[0].dtype)
            self._round_to(rounded, flat, noise_for(rounded, group["stochastic_rounding"]))
            torch._foreach_copy_(weights, list(rounded.split(sizes)))

    def _advance(
        self, parameter: Tensor, grad: Tensor, group: dict[str, Any], by_column: bool = False
    ) -> dict[str, Any]:
        """Increment the step of ``parameter`` and return its state. New moments are zeros in the shape of ``grad``."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = 0
            state |= zero_moments(grad, grad.shape, group, by_column)
        state["step"] += 1
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._settle()  # of a step that was skipped
        self._forget_step()

    def _forget_step(self) -> None:
        for gathered in (self._low_grads, self._sketches, self._refreshed):
            gathered.clear()
        for clock in self._clocks.values():
            clock.read()

    def deactivate(self, parameters: Iterable[Tensor], inactive_state: str = "drop") -> None:
        """Discard the gradients of parameters that stop training, and drop, offload or keep their state."""
        for parameter in parameters:
            parameter.grad = None
            for gathered in (self._low_grads, self._sketches, self._refreshed):
                gathered.pop(parameter, None)
            if inactive_state == "drop":
                self.state.pop(parameter, None)
            elif inactive_state == "offload":
                self._offload.to_host(self.state.get(parameter, {}))

    def activate(self, parameters: Iterable[Tensor]) -> None:
        """Restore the state of parameters that train again. A kept basis is refreshed according to its age."""
        for parameter in parameters:
            parameter.grad = None
            if parameter in self.state:
                self._offload.to_device(self.state[parameter], self._state_device(parameter))

    def _state_device(self, parameter: Tensor) -> torch.device:
        """Low-rank state is where the gradient is projected, even if FSDP2 keeps the weight in host memory."""
        return compute_device(parameter) if self.is_projected(parameter) else parameter.device

    def state_bytes(self, *keys: str) -> int:
        """Bytes of the state's tensors, or only of ``keys``: ``exp_avg``, ``exp_avg_sq``, ``basis``.

        State in host memory, apart from the device that computes, does not count.
        """
        return sum(
            low_bits.num_bytes(value)
            for parameter, state in self.state.items()
            for key, value in state.items()
            if torch.is_tensor(value) and value.device == compute_device(parameter) and (not keys or key in keys)
        )

    def state_dict(self) -> dict[str, Any]:
        self._offload.wait()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # torch would cast float32 moments of a bfloat16 weight to bfloat16.
        super().load_state_dict({**state_dict, "state": {}})
        for parameter, slot in self._slots.items():
            if slot.index in state_dict["state"]:
                # State of a frozen parameter can be offloaded. It stays on its device until the parameter trains again.
                device = self._state_device(parameter) if parameter.requires_grad else None
                self.state[parameter] = {
                    key: self._own(parameter, key, value, device) if torch.is_tensor(value) else value
                    for key, value in state_dict["state"][slot.index].items()
                }

    def _own(self, parameter: Tensor, key: str, value: Tensor, device: torch.device | None) -> Tensor:
        """A copy of a saved state tensor. If moments were saved unsharded, copy only this process's rows."""
        if key not in MOMENT_KEYS:
            return low_bits.copy_to(value, device)
        slot, group, own = self._slots[parameter], self.group_of(parameter), local(parameter)
        is_sharded = World.of(parameter).size > 1
        num_rows = own.shape[0] if is_sharded else slot.shape[0]
        low_shape = (num_rows, group["rank"]) if slot.right else (group["rank"], slot.shape[-1])
        shape, by_column = (low_shape, slot.right) if slot.projected else ((num_rows, *slot.shape[1:]), False)
        wanted = zero_moments(own.to("meta"), shape, group, by_column)[key]
        if type(value) is type(wanted) and value.shape == wanted.shape:
            return low_bits.copy_to(value, device)
        rows = low_bits.restore(value, compute_dtype(parameter), by_column=by_column)
        if is_sharded:
            first, last = rows_of(parameter)
            rows = rows[first:last]
        made = zero_moments(own if device is not None else own.to("cpu"), shape, group, by_column)[key]
        low_bits.update(made, rows.to(made.device), by_column=by_column)
        return made


def _joined(pieces: list[Tensor], dtype: torch.dtype) -> Tensor:
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(dtype)


def _limit(limits: dict[str, int], device: torch.device) -> int:
    return limits["cpu" if device.type == "cpu" else "other"]


def _batches(items: list[T], sizes: list[int], limit: int) -> Iterator[list[T]]:
    """Split ``items`` into lists whose sizes sum to at most ``limit``, or of one item."""
    batch: list[T] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


def _basis(state: dict[str, Any], dtype: torch.dtype) -> Tensor:
    return low_bits.restore(state["basis"], dtype, by_column=True)


def _check_sharded(group: dict[str, Any], right: bool) -> None:
    """Reject a basis on the left or from an SVD: it would have to gather the rows of the weight."""
    if not right:
        raise ValueError(f"side={group['side']} projects sharded weights on their left; set side=right")
    if group["basis"] != "randomized":
        raise ValueError(f"basis={group['basis']} needs whole gradients, but they are sharded; set basis=randomized")
