"""Configs by name, and checks that refuse a bad one before any weights load."""

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, get_args
from uuid import uuid4

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune import config, training, utils
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from owlore_tune.names import find_config
from owlore_tune.optim import INACTIVE_STATES
from owlore_tune.sampling import DRAWS
from owlore_tune.scores import SCORES
from owlore_tune.world import ALONE, World


class ConfigError(ValueError):
    """A config that cannot run; the message names the value and the way out, in one line."""


class RunError(RuntimeError):
    """A run that had to stop; the message says where it stands and the way on, in one line."""


@dataclass(frozen=True)
class OwLoreConfig:
    """The ``owlore:`` block of a training config, checked on construction.

    Raises:
        ConfigError: if a value has the wrong type or is out of its range.
    """

    num_active_layers: int | None = 5  # γ; null for all layers
    resample_every: int = 50  # K, optimizer steps
    score: str = "outlier"
    outlier_threshold: float = 13.0  # τ
    calibration_batches: int = 8
    scores_file: str | None = None
    draw: str = "systematic"
    inactive_state: str = "drop"
    train_embeddings: bool = False
    train_output: bool = False
    train_norm: bool = False
    project_in_backward: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            check_type(f"owlore.{field.name}", getattr(self, field.name), field.type)
        for key, choices in (("score", SCORES), ("draw", DRAWS), ("inactive_state", INACTIVE_STATES)):
            if getattr(self, key) not in choices:
                raise ConfigError(f"owlore.{key}={getattr(self, key)}; choose one of {', '.join(choices)}")
        for key in ("num_active_layers", "resample_every", "outlier_threshold", "calibration_batches"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(f"owlore.{key}={value}; it must be above 0")

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "OwLoreConfig":
        check_keys(cfg, [field.name for field in fields(cls)], "owlore")
        return cls(**plain(cfg))

    def check_model(self, num_layers: int) -> None:
        """Raise ConfigError if the model has too few layers for γ."""
        if self.num_active_layers is not None and self.num_active_layers > num_layers:
            raise ConfigError(f"owlore.num_active_layers={self.num_active_layers}; the model has {num_layers} layers")


def parse(recipe_main: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """torchtune's ``config.parse`` that also takes a packaged name, and reports a ConfigError in one line."""

    @functools.wraps(recipe_main)
    def main() -> None:
        for i, argument in enumerate(sys.argv[:-1]):
            if argument == "--config":
                sys.argv[i + 1] = str(find_config(sys.argv[i + 1]))
        try:
            config.parse(recipe_main)()
        except (ConfigError, RunError, InstantiationError) as error:
            sys.exit(f"error: {' '.join(str(error).split())}")

    return main


def load_config(name: str, overrides: Iterable[str] = ()) -> DictConfig:
    """A packaged config by name, or a file, with ``field=value`` overrides as on the command line."""
    from argparse import Namespace

    from torchtune.config._utils import _merge_yaml_and_cli_args

    loaded = plain(OmegaConf.load(find_config(name)), resolve=False)
    return _merge_yaml_and_cli_args(Namespace(**loaded), list(overrides))


def plain(cfg: Any, resolve: bool = True) -> Any:
    """``cfg`` in dicts, lists, text and numbers."""
    return OmegaConf.to_container(cfg, resolve=resolve)


def check_config(
    cfg: DictConfig,
    required: Iterable[str],
    defaults: Mapping[str, Any],
    supplied: Mapping[str, tuple[str, ...]] | None = None,
) -> DictConfig:
    """``cfg`` with defaults filled in, once its keys fit the recipe and the signatures of its components.

    Args:
        required: keys that the recipe cannot do without.
        defaults: its other keys, with their values where left out.
        supplied: what the recipe itself passes to the component under a key: ``*`` for a positional argument, else the
            argument's name.

    Raises:
        ConfigError: if a key is missing or unknown (naming the nearest known one), or an option is not in the
            signature of its component, or one is missing that it needs.
    """
    required = list(required)
    check_keys(cfg, [*required, *defaults], "")
    for key, node in cfg.items():
        # What `dataset_val=null` on the command line arrives as, since torchtune takes it for the component's name.
        if isinstance(node, DictConfig) and "_component_" in node and node["_component_"] is None:
            cfg[key] = None
    if missing := [key for key in required if cfg.get(key) is None]:
        raise ConfigError(f"missing in the config: {', '.join(missing)}")
    check_components(cfg, supplied or {})
    return DictConfig(OmegaConf.merge(dict(defaults), cfg))


def check_components(cfg: DictConfig, supplied: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ConfigError if a component of ``cfg`` does not fit its signature; see `check_config`."""
    for path, node in _component_nodes(cfg, ""):
        component = _get_component_from_path(node["_component_"])
        parameters = inspect.signature(component).parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            check_keys(node, [*parameters, "_component_"], path)
        _check_arguments(path, component, node, supplied.get(path.split(".")[0], ()))


def _check_arguments(path: str, component: Any, node: DictConfig, supplied: tuple[str, ...]) -> None:
    positional = [None for name in supplied if name == "*"]
    named = {str(name): None for name in (*node, *supplied) if name not in ("_component_", "*")}
    try:
        inspect.signature(component).bind(*positional, **named)
    except TypeError as error:
        raise ConfigError(f"{path}: {error} of {node['_component_']}") from error


def check_keys(node: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    known = list(known)
    for key in node:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {path + '.' if path else ''}{key}; {hint}")


def build(path: str, node: DictConfig, *args: Any, **kwargs: Any) -> Any:
    """``config.instantiate`` of the node at ``path``, with what its constructor refuses as a ConfigError."""
    try:
        return config.instantiate(node, *args, **kwargs)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        message = str(error)
        raise ConfigError(message if message.startswith(path) else f"{path}: {message}") from error


def build_ours(path: str, node: DictConfig, wanted: type, *args: Any) -> Any:
    """`build`, for a component that must be ``wanted`` or derive from it.

    Raises:
        ConfigError: if it is another one.
    """
    built = build(path, node, *args)
    if not isinstance(built, wanted):
        needed = f"{wanted.__module__}.{wanted.__qualname__}"
        raise ConfigError(f"{path}._component_={node._component_}; this recipe needs {needed}")
    return built


def device_and_dtype(cfg: DictConfig) -> tuple[torch.device, torch.dtype]:
    """What ``device`` and ``dtype`` of a config stand for, as torchtune reads them.

    Raises:
        ConfigError: if they are unknown or not to be had on this machine.
    """
    try:
        device = utils.get_device(cfg.device)
        return device, training.get_dtype(cfg.dtype, device=device)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"device={cfg.device}, dtype={cfg.dtype}: {error}") from error


def changed_fields(old: Any, new: Any, path: str = "") -> list[str]:
    """The fields in which two configs differ, as ``path=old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            change
            for key in keys
            for change in changed_fields(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path}={old} -> {new}"]


def _component_nodes(node: Any, path: str) -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_component_" in node:
            yield path, node
        keys: Iterable[Any] = node
    elif isinstance(node, ListConfig):
        keys = range(len(node))
    else:
        return
    for key in keys:
        yield from _component_nodes(node._get_node(key), f"{path}.{key}" if path else str(key))


def check_counts(cfg: DictConfig, required: Iterable[str], optional: Iterable[str]) -> None:
    """Raise ConfigError for a field that is not a whole number from 1 (or null, where ``optional``)."""
    for keys, wanted in ((required, int), (optional, int | None)):
        for key in keys:
            check_type(key, cfg[key], wanted)
            if cfg[key] is not None and not cfg[key] >= 1:
                raise ConfigError(f"{key}={cfg[key]}; it must be at least 1{'' if wanted is int else ', or null'}")


def check_positive(path: str, value: Any) -> float:
    """``value`` as a number above 0; infinity for null.

    Raises:
        ConfigError: if it is neither.
    """
    try:
        number = float("inf") if value is None else float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not number > 0:
        raise ConfigError(f"{path}={value}; it must be a number above 0, or null")
    return number


def check_type(path: str, value: Any, wanted: Any) -> None:
    """Raise ConfigError if ``value`` is not of type ``wanted``; a bool is no number."""
    allowed = wanted | int if wanted is float else wanted
    takes_bool = bool in (get_args(wanted) or (wanted,))
    if not isinstance(value, allowed) or (isinstance(value, bool) and not takes_bool):
        name = getattr(wanted, "__name__", str(wanted)).replace("None", "null")
        raise ConfigError(f"{path}={value!r}; it must be {name}")


def writable_directory(path: str) -> Path:
    """``path`` as an existing directory that files can be made in; made if need be.

    Raises:
        ConfigError: if it cannot be made or written to.
    """
    directory = Path(path).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"output_dir={path} is not writable: {error.strerror}") from error
    return directory


def shared_directory(path: str, world: World = ALONE) -> Path:
    """`writable_directory`, once it is known to be the same one on all processes of ``world``.

    Raises:
        ConfigError: if it cannot be made or written to, or this process does not see what the first one writes.
        RankError: if it is so on another process.
    """
    directory = world.attempt(lambda: writable_directory(path))
    assert directory is not None
    if world.size == 1:
        return directory
    probe = directory / world.share(f".shared_{uuid4().hex}")  # a new name, or a network disk may remember the old one

    def look() -> None:
        if not probe.exists():
            raise ConfigError(f"output_dir={path} is not the directory that rank 0 has; choose one on a shared disk")

    world.attempt(probe.touch, first_alone=True)
    try:
        world.attempt(look)
    finally:
        if world.rank == 0:
            probe.unlink()
    return directory
