"""AdamW on low-rank gradients."""

import math
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.optim.quant_utils import _fp32_to_bf16_sr

from owlore_tune.layers import model_parts
from owlore_tune.projection import BASES, SIDES, is_right, project, range_finder, svd_basis

MOMENTS = ("keep", "project", "reset")
INACTIVE_STATES = ("drop", "offload", "keep")


def parameter_groups(
    model: nn.Module,
    *,
    train_embeddings: bool = False,
    train_output: bool = False,
    train_norm: bool = False,
) -> list[dict[str, Any]]:
    """The parameter groups of `OwLoreAdamW` for a torchtune ``TransformerDecoder``.

    All layers form one group, projected to the optimizer's rank where active. What is trained besides them forms a
    second one at full rank. The rest of the model is not in the optimizer: freeze it (`ActiveLayers` does).
    """
    parts = model_parts(model)
    layers = [parameter for layer in parts.layers for parameter in layer.values()]
    wanted = ((train_embeddings, parts.embeddings), (train_output, parts.output), (train_norm, parts.norm))
    others = [parameter for train, part in wanted if train for parameter in part.values()]
    return [{"params": layers}] + ([{"params": others, "rank": None}] if others else [])


class OwLoreAdamW(Optimizer):
    """AdamW whose moments live in a low-rank projection of each weight's gradient (OwLore, arXiv 2405.18380, §3.3).

    For a weight (m, n) with gradient G the optimizer keeps a basis P (n, r), takes AdamW's direction D from the low
    gradient G P (m, r), and moves the weight by −lr · scale · D Pᵀ. Weight decay is decoupled and acts on the full
    weight. Moments and arithmetic are float32 (float64 for float64 weights) whatever the weight's dtype, with one
    write-back per step. Weights that a projection would not make smaller (1-D ones, and those whose shorter side is
    not above ``rank``) are trained by plain AdamW, as is everything where ``rank`` is None.

    A projected weight's gradient is reduced to (m, r) by `project_grad`, called by a hook in backward
    (`ActiveLayers`), after each backward (`project_grads`), or by `step` itself. Reduced gradients add up over
    micro-batches until `step`. On a step that refreshes the basis, the first micro-batch makes it.

    Args:
        params: parameters or groups, see `parameter_groups`. Every option below can differ by group.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        rank: r; None for full rank.
        update_gap: optimizer steps between refreshes of a basis.
        scale: factor on the projected direction.
        side: ``right``, or ``shape`` for GaLore's rule (the shorter side).
        moments: at a refresh, ``keep`` them (GaLore's behaviour), ``project`` them onto the new basis, or ``reset``.
        basis: ``randomized`` (see `range_finder`) or ``svd``, exact and slow.
        stochastic_rounding: write bfloat16 weights back with stochastic rounding.
        seed: of the Gaussian sketches.

    Raises:
        ValueError: if a value is out of its range, or if ``rank`` is too large for every weight of a group.
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
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        self._seed = seed
        self._slots: dict[Tensor, tuple[int, int]] = {}  # parameter → (its group, its index over all groups)
        self._low_grads: dict[Tensor, Tensor] = {}  # what micro-batches have added up to since the last step
        self.refreshes: list[tuple[float, Tensor]] = []  # (seconds, share of the gradient's energy) of each refresh
        defaults = dict(
            lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, rank=rank, update_gap=update_gap,
            scale=scale, side=side, moments=moments, basis=basis, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_group(group)
        for parameter in group["params"]:
            self._slots[parameter] = (len(self.param_groups) - 1, len(self._slots))

    def is_projected(self, parameter: Tensor) -> bool:
        """Whether gradients of ``parameter`` are reduced to low rank."""
        group_index, _ = self._slots[parameter]
        return _is_projected(parameter, self.param_groups[group_index]["rank"])

    @torch.no_grad()
    def project_grad(self, parameter: Tensor) -> None:
        """Reduce ``parameter.grad`` (m, n) to low rank, add it to what the step has gathered, and free it.

        Does nothing for a weight that is not projected or has no gradient. Fits
        ``Tensor.register_post_accumulate_grad_hook``.
        """
        if parameter.grad is None or not self.is_projected(parameter):
            return
        group = self.param_groups[self._slots[parameter][0]]
        state = self.state[parameter]
        right = is_right(parameter.shape, group["side"])
        grad = parameter.grad.to(_compute_dtype(parameter))
        parameter.grad = None
        gathered = self._low_grads.get(parameter)
        if gathered is None and state.get("basis_age", math.inf) >= group["update_gap"]:
            self._refresh(parameter, grad, group)
        low = project(grad, state["basis"], right)
        self._low_grads[parameter] = low if gathered is None else gathered.add_(low)

    def project_grads(self) -> None:
        """`project_grad` for every parameter: after each backward, where no hook does it."""
        for parameter in self._slots:
            self.project_grad(parameter)

    def _refresh(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Make a new basis from ``grad`` (m, n) and carry the moments over to it."""
        started = time.perf_counter()
        state = self.state[parameter]
        right = is_right(parameter.shape, group["side"])
        old = state.get("basis")
        if group["basis"] == "svd":
            new, energy = svd_basis(grad, group["rank"], right)
        else:
            # Not from the global generator, and from nothing that a resumed run would have to replay.
            seed = hash((self._seed, self._slots[parameter][1], state.get("step", 0))) & 0xFFFF_FFFF
            generator = torch.Generator(grad.device).manual_seed(seed)
            rows = grad if right else grad.T
            new, energy = range_finder(rows, group["rank"], generator=generator, start=old)
        if energy.isnan():  # a step that will be skipped; the basis stays due
            state.setdefault("basis", new)
            state["basis_age"] = group["update_gap"]
            return
        if old is not None and "step" in state:
            _carry_moments(state, old.T @ new, group["moments"], right)
        state["basis"], state["basis_age"] = new, 0
        self.refreshes.append((time.perf_counter() - started, energy))

    def step_grads(self) -> dict[Tensor, Tensor]:
        """The gradients that the next step will use, by parameter: (m, r) for projected ones, else of its shape."""
        self.project_grads()
        # In the optimizer's order, not in backward's: a norm over them is then the same bits in every mode.
        grads = {parameter: self._low_grads.get(parameter, parameter.grad) for parameter in self._slots}
        return {parameter: grad for parameter, grad in grads.items() if grad is not None}

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients that the next step will use to a total norm of at most ``max_norm``.

        A projected weight counts with the norm of its low gradient, which is the part of the gradient that moves it.
        That part alone is known in every mode: with several micro-batches the rest is never added up.

        Returns:
            Their total 2-norm before clipping, (). ``max_norm=inf`` only measures.
        """
        grads = list(self.step_grads().values())
        if not grads:
            return torch.zeros(())
        norm = torch.nn.utils.get_total_norm(grads)
        if math.isfinite(max_norm):
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(grads, torch.where(norm.isfinite(), factor, 1.0))  # else all of them turn NaN
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.project_grads()
        for group in self.param_groups:
            for parameter in group["params"]:
                low_grad = self._low_grads.get(parameter)
                if low_grad is not None:
                    self._step_parameter(parameter, low_grad, group)
                elif parameter.grad is not None:
                    self._step_parameter(parameter, parameter.grad.to(_compute_dtype(parameter)), group)
        self._low_grads.clear()
        return loss

    def _step_parameter(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(grad)
            state["exp_avg_sq"] = torch.zeros_like(grad)
        state["step"] += 1
        direction = adamw_direction(
            grad, state["exp_avg"], state["exp_avg_sq"], state["step"], *group["betas"], group["eps"]
        )
        weight = parameter.to(grad.dtype)  # the parameter itself where the dtypes agree
        decay = 1 - group["lr"] * group["weight_decay"]
        if "basis" not in state:
            weight.mul_(decay).add_(direction, alpha=-group["lr"])
        else:
            state["basis_age"] += 1
            right = is_right(parameter.shape, group["side"])
            factors = (direction, state["basis"].T) if right else (state["basis"], direction)
            weight.addmm_(*factors, beta=decay, alpha=-group["lr"] * group["scale"])
        if weight is not parameter:
            stochastic = group["stochastic_rounding"] and parameter.dtype == torch.bfloat16
            parameter.copy_(_fp32_to_bf16_sr(weight) if stochastic else weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._low_grads.clear()

    def deactivate(self, parameters: Iterable[Tensor], inactive_state: str = "drop") -> None:
        """Forget the gradients of parameters that stop training, and drop, offload or keep their state."""
        for parameter in parameters:
            parameter.grad = None
            self._low_grads.pop(parameter, None)
            if inactive_state == "drop":
                self.state.pop(parameter, None)
            elif inactive_state == "offload":
                self._move_state(parameter, torch.device("cpu"))

    def activate(self, parameters: Iterable[Tensor]) -> None:
        """Bring back the state of parameters that train again, their bases due for a refresh."""
        for parameter in parameters:
            parameter.grad = None
            if parameter in self.state:
                self._move_state(parameter, parameter.device)
                if "basis_age" in self.state[parameter]:
                    self.state[parameter]["basis_age"] = self.param_groups[self._slots[parameter][0]]["update_gap"]

    def _move_state(self, parameter: Tensor, device: torch.device) -> None:
        state = self.state.get(parameter, {})
        state.update({key: value.to(device) for key, value in state.items() if torch.is_tensor(value)})

    def state_bytes(self) -> int:
        """Bytes of all optimizer state, bases included."""
        tensors = (value for state in self.state.values() for value in state.values() if torch.is_tensor(value))
        return sum(tensor.nbytes for tensor in tensors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # torch casts state to the parameter's dtype, which would turn float32 moments of a bfloat16 weight to bfloat16.
        super().load_state_dict({**state_dict, "state": {}})
        for parameter, (_, index) in self._slots.items():
            if index in state_dict["state"]:
                # What is frozen may be offloaded: its state stays where it is until it trains again.
                device = parameter.device if parameter.requires_grad else None
                self.state[parameter] = {
                    key: value.to(device=device, copy=True) if torch.is_tensor(value) else value
                    for key, value in state_dict["state"][index].items()
                }


def adamw_direction(
    grad: Tensor,
    exp_avg: Tensor,  # of grad's shape, updated in place
    exp_avg_sq: Tensor,  # of grad's shape, updated in place
    step: int,  # from 1
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """The direction that AdamW moves against: bias-corrected mean over root of bias-corrected mean square."""
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    return torch.div(exp_avg, denominator, out=denominator).div_(1 - beta1**step)


def _carry_moments(state: dict[str, Any], turn: Tensor, moments: str, right: bool) -> None:
    """Take the moments of a weight over a refresh; ``turn`` (r, r) is old basisᵀ · new basis."""
    if moments == "reset":
        state["step"] = 0
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    elif moments == "project":
        for key, matrix in (("exp_avg", turn), ("exp_avg_sq", turn.square())):
            state[key] = state[key] @ matrix if right else matrix.T @ state[key]


def _compute_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _is_projected(parameter: Tensor, rank: int | None) -> bool:
    return rank is not None and parameter.ndim == 2 and rank < min(parameter.shape)


def _check_group(group: dict[str, Any]) -> None:
    for key, choices in (("side", SIDES), ("moments", MOMENTS), ("basis", BASES)):
        if group[key] not in choices:
            raise ValueError(f"{key}={group[key]!r}; choose one of {', '.join(choices)}")
    for key in ("lr", "eps", "weight_decay"):
        if not group[key] >= 0:
            raise ValueError(f"{key}={group[key]}; it must not be negative")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']}; each must be at least 0 and below 1")
    if not isinstance(group["update_gap"], int) or not group["update_gap"] >= 1:
        raise ValueError(f"update_gap={group['update_gap']}; it must be a whole number of optimizer steps from 1")
    rank = group["rank"]
    if rank is None:
        return
    if not isinstance(rank, int) or not rank >= 1:
        raise ValueError(f"rank={rank}; it must be a whole number from 1, or null for full rank")
    matrices = [parameter for parameter in group["params"] if parameter.ndim == 2]
    unprojected = [tuple(p.shape) for p in matrices if not _is_projected(p, rank)]
    if not unprojected:
        return
    sides = sorted({min(shape) for shape in unprojected})
    if len(unprojected) == len(matrices):
        raise ValueError(
            f"rank={rank}; no weight's shorter side is above it (they are {sides}): lower it, or set rank=null"
        )
    warnings.warn(
        f"rank={rank} is not below the shorter side ({', '.join(map(str, sides))}) of {len(unprojected)} of "
        f"{len(matrices)} weights; these are trained at full rank",
        stacklevel=3,
    )
