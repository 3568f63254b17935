"""Inclusion probabilities from layer scores, and ways to draw layers. A new way is one subclass of `Draw`.

OwLore (arXiv 2405.18380, section 3.2): layers with more outlier weights are sampled more often.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

HOST = torch.device("cpu")
DRAWS: dict[str, type["Draw"]] = {}


def inclusion_probabilities(scores: Sequence[float], num_active: int) -> list[float]:
    """The probability p_l that layer l is active: γ · score_l / Σ score, capped at 1.

    The excess over the cap is spread over the other layers in proportion to their scores, which keeps Σ p = γ.
    A layer with score 0 gets probability 0.

    Args:
        scores: one finite number ≥ 0 per layer.
        num_active: γ, the expected number of active layers.

    Raises:
        ValueError: if a score is negative or not finite, or if fewer than γ layers have a score above 0.
    """
    for layer, score in enumerate(scores):
        if not math.isfinite(score) or score < 0:
            raise ValueError(f"score of layer {layer} is {score}; scores must be finite and not negative")
    if not 0 < num_active <= len(scores):
        raise ValueError(
            f"num_active_layers={num_active}; the model has {len(scores)} layers, choose 1 to {len(scores)}"
        )
    drawable = sum(score > 0 for score in scores)
    if drawable < num_active:
        raise ValueError(
            f"num_active_layers={num_active}, but only {drawable} layers have a score above 0; choose fewer, another "
            "score, or a lower outlier threshold"
        )

    certain: set[int] = set()
    while True:
        free = [layer for layer in range(len(scores)) if layer not in certain]
        total = math.fsum(scores[layer] for layer in free)
        left = num_active - len(certain)
        over = {layer for layer in free if left > 0 and left * scores[layer] >= total}
        if not over:
            break
        certain |= over
    return [1.0 if layer in certain else (left * score / total if left else 0.0) for layer, score in enumerate(scores)]


class Draw:
    """A way to draw sets of layers. A subclass with a ``name`` can be asked for by it, as ``owlore.draw``.

    Args:
        probabilities: (layers,) float64, of each layer to be in a set.
        scores: (layers,) float64.
        num_active: γ.
    """

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        DRAWS[cls.name] = cls

    def __init__(self, probabilities: Tensor, scores: Tensor, num_active: int) -> None:
        self.probabilities, self.scores, self.num_active = probabilities, scores, num_active

    def draw(self, generator: torch.Generator) -> Tensor:
        """The indices of the drawn layers, in any order."""
        raise NotImplementedError


class Systematic(Draw):
    """Exactly γ layers, each with exactly its inclusion probability."""

    name = "systematic"

    def draw(self, generator: torch.Generator) -> Tensor:
        # Layers of probability 1 are handled separately, because rounding could skip one or count it twice.
        certain = (self.probabilities > 1 - 1e-12).nonzero().flatten()
        uncertain = (self.probabilities <= 1 - 1e-12).nonzero().flatten()
        num_left = self.num_active - len(certain)
        if num_left == 0:
            return certain
        # Shuffle at each draw. In a fixed order, neighbors would never be active together.
        order = uncertain[torch.randperm(len(uncertain), generator=generator)]
        marks = self.probabilities[order].cumsum(0)
        marks[-1] = num_left  # without the rounding error of the sum
        crossed = torch.floor(marks + _rand(1, generator))
        picked = torch.diff(crossed, prepend=torch.zeros(1, dtype=torch.float64)) > 0
        return torch.cat([certain, order[picked]])


class Bernoulli(Draw):
    """Each layer independently, as in the paper's algorithm.

    The number of layers varies. An empty set is never drawn, and the inclusion probabilities still hold.
    """

    name = "bernoulli"

    def __init__(self, probabilities: Tensor, scores: Tensor, num_active: int) -> None:
        super().__init__(probabilities, scores, num_active)
        self._given_nonempty = self._nonempty_share()

    def draw(self, generator: torch.Generator) -> Tensor:
        if self._given_nonempty == 0:  # γ = 1: in the limit, a non-empty set has a single layer
            return torch.multinomial(self.probabilities, 1, generator=generator)
        while True:
            on = _rand(len(self.probabilities), generator) < self._given_nonempty * self.probabilities
            if on.any():
                return on.nonzero().flatten()

    def _nonempty_share(self) -> float:
        """The c with c = P(a set drawn with c · p_l is not empty).

        Redrawing empty sets multiplies every inclusion probability by 1/P(not empty). Drawing with c · p_l cancels
        this factor exactly.
        """
        if self.num_active == 1:
            return 0.0
        share = 1.0
        for _ in range(10_000):
            following = 1 - torch.prod(1 - share * self.probabilities).item()
            if abs(following - share) < 1e-15:
                break
            share = following
        return share


class Sequential(Draw):
    """γ draws without replacement weighted by score, as in the authors' code.

    The inclusion probabilities are then not exactly p_l.
    """

    name = "sequential"

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.scores, self.num_active, generator=generator)


def _rand(size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(size, generator=generator, dtype=torch.float64)


class LayerSampler:
    """Draws sets of layers with a private generator. Other random operations do not change the schedule.

    Args:
        scores: one per layer, see `inclusion_probabilities`.
        num_active: γ.
        draw: the name of a `Draw`.
        seed: seed of the private generator.

    Attributes:
        kind: the name of the `Draw`.
        probabilities: (layers,) float64, the inclusion probabilities.

    Raises:
        ValueError: if ``draw`` is unknown, or if γ layers cannot be drawn with these scores.
    """

    def __init__(self, scores: Sequence[float], num_active: int, draw: str = "systematic", seed: int = 0) -> None:
        if draw not in DRAWS:
            raise ValueError(f"draw={draw!r}; choose one of {', '.join(DRAWS)}")
        self.num_active = num_active
        self.kind = draw
        with HOST:
            self.probabilities = torch.tensor(inclusion_probabilities(scores, num_active), dtype=torch.float64)
            self._draw = DRAWS[draw](self.probabilities, torch.tensor(scores, dtype=torch.float64), num_active)
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> list[int]:
        """The indices of the next active layers, ascending."""
        with HOST:
            return sorted(self._draw.draw(self._generator).tolist())

    def peek(self) -> list[int]:
        """The layers that the next `draw` returns."""
        state = self.state_dict()
        drawn = self.draw()
        self.load_state_dict(state)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._generator.set_state(state_dict["generator"].clone())
