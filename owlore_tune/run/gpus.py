"""The largest packaged models that fit on a card."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from tqdm import tqdm

from owlore_tune.catalog import packaged_configs
from owlore_tune.config_files import load_config
from owlore_tune.quantized.formats import FORMATS
from owlore_tune.run.build import build_model
from owlore_tune.run.planning import formats, plan_run
from owlore_tune.run.settings import TrainingSettings

SEQ_LEN = 512
FREE_SHARE = 0.9  # of a card's memory; the rest is for the CUDA context and fragmentation


def savings() -> list[tuple[tuple[str, ...], float]]:
    """Overrides, from the most exact to the smallest, with the least bytes per weight."""
    sizes = [kind.empty(torch.Size((1, 2**16)), torch.device("meta")).nbytes / 2**16 for kind in FORMATS.values()]
    smallest = (*formats()[-1], "owlore.num_active_layers=2")
    return [((), 2.0), *zip(formats(), sizes, strict=True), (smallest, sizes[-1])]


class Fit(NamedTuple):
    """A config that fits."""

    config: str
    overrides: tuple[str, ...]
    memory: int  # planned bytes


def largest_that_fit(card_bytes: float) -> Iterator[Fit]:
    """For each of `savings`, the OwLore config of the largest model that one card of ``card_bytes`` can train.

    Rows have `SEQ_LEN` tokens. A saving that fits no larger model than the one before it is left out.
    """
    names = [name for name, _ in packaged_configs() if name.endswith("_owlore")]
    sizes = {name: sum(p.numel() for p in build_model(_settings(name))[1].parameters()) for name in names}
    largest = 0
    for overrides, least in savings():
        # The others need no plan. A plan takes seconds, and longer with many experts.
        possible = [name for name in sizes if sizes[name] > largest and least * sizes[name] <= FREE_SHARE * card_bytes]
        for name in tqdm(sorted(possible, key=lambda name: -sizes[name]), desc="Planning", unit="model", leave=False):
            plan = plan_run(_settings(name, overrides), SEQ_LEN, gpu=True)
            if plan.total <= FREE_SHARE * card_bytes:
                yield Fit(name, overrides, plan.total)
                largest = sizes[name]
                break


def _settings(name: str, overrides: tuple[str, ...] = ()) -> TrainingSettings:
    return TrainingSettings.from_config(load_config(name, ["device=cpu", "dtype=bf16", *overrides]))
