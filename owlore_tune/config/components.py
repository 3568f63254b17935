"""Reject invalid configs before any weights load, and build their components."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune import config, training, utils
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from owlore_tune.config.schema import check_block, check_type, plain
from owlore_tune.errors import ConfigError
from owlore_tune.files import user_path

COMPONENTS = {  # the blocks that are built
    "model", "tokenizer", "checkpointer", "dataset", "dataset_val", "optimizer", "lr_scheduler", "loss",
    "metric_logger", "profiler",
}  # fmt: skip


class UnknownKeyError(ConfigError):
    """A key that the config or one of its components does not take.

    Attributes:
        key: with its path.
    """

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


def printable(cfg: DictConfig) -> DictConfig:
    """A copy of ``cfg`` with escaped interpolations, which resolving does not change."""
    return OmegaConf.create(_with_texts(plain(cfg), lambda text: text.replace("${", "\\${")))


def expand_home(cfg: DictConfig) -> DictConfig:
    """A copy of ``cfg`` with a leading ``~`` of any text, such as ``~/runs``, replaced by the home directory.

    Paths that interpolate it, such as the directory of a metric logger, are then expanded too.
    """
    return OmegaConf.create(
        _with_texts(plain(cfg), lambda text: str(user_path(text)) if text.startswith("~") else text)
    )


def _with_texts(node: Any, change: Callable[[str], str]) -> Any:
    """A copy of a config's plain form with all texts changed."""
    if isinstance(node, dict):
        return {key: _with_texts(value, change) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_texts(value, change) for value in node]
    return change(node) if isinstance(node, str) else node


def check_config(
    cfg: DictConfig,
    required: Iterable[str],
    defaults: Mapping[str, Any],
    supplied: Mapping[str, tuple[str, ...]] | None = None,
) -> DictConfig:
    """Check the keys of ``cfg`` against the recipe and its components' signatures; returns it with defaults filled in.

    Args:
        required: keys that must be set.
        defaults: the other keys, with their default values.
        supplied: arguments that the recipe passes to the component under a key: ``*`` for a positional argument, else
            the argument's name.

    Raises:
        ConfigError: if a key is missing or unknown (naming the nearest known one), or a component lacks a required
            argument or does not take one.
    """
    required = list(required)
    cfg = expand_home(cfg)
    check_keys(cfg, [*required, *defaults], "")
    _fill_in(cfg, defaults)
    if open_keys := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"Missing mandatory value: {open_keys[0]}; give it as {open_keys[0]}=VALUE")
    try:
        resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error)) from error
    check_values(resolved, "")
    if isinstance(cfg.get("output_dir"), str) and cfg.output_dir.startswith("~"):  # from an interpolation
        cfg.output_dir = str(user_path(cfg.output_dir))
    for key, node in cfg.items():
        # torchtune parses `dataset_val=null` on the command line as the component's name.
        if isinstance(node, DictConfig) and "_component_" in node and node["_component_"] is None:
            cfg[key] = None
    if missing := [key for key in required if cfg.get(key) is None]:
        raise ConfigError(f"missing in the config: {', '.join(missing)}")
    check_type("output_dir", cfg.output_dir, str)
    if not cfg.output_dir.strip():
        raise ConfigError("output_dir is empty; name a directory")
    for key in COMPONENTS & cfg.keys():
        is_list = key in ("dataset", "dataset_val") and isinstance(cfg[key], ListConfig) and len(cfg[key]) > 0
        for node in cfg[key] if is_list else [cfg[key]]:
            if node is not None or is_list:
                check_block(key, node)
    check_components(cfg, supplied or {})
    return cfg


def _fill_in(cfg: DictConfig, defaults: Mapping[str, Any]) -> None:
    """Add missing defaults to ``cfg``. A block without ``_component_`` changes fields of the default block."""
    for key, default in defaults.items():
        node = cfg._get_node(key)
        if key not in cfg.keys():  # noqa: SIM118  (a key whose value is ??? is in keys(), and not in the config itself)
            cfg[key] = default
        elif isinstance(default, Mapping) and isinstance(node, DictConfig) and "_component_" not in node:
            cfg[key] = OmegaConf.merge(default, node)


def check_values(node: Any, path: str) -> None:
    """Raise ConfigError for a field that is NaN, with which comparisons are always false, or has a NUL character."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        where = f"{path}.{key}" if path else str(key)
        if isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{where}=nan; it must be a number")
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{where}={value!r} has a NUL character, which no path or name can have")
        check_values(value, where)


def check_components(cfg: DictConfig, supplied: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ConfigError if a component of ``cfg`` does not fit its signature; see `check_config`."""
    for path, node in _component_nodes(cfg, ""):
        component = find_component(f"{path}._component_", node["_component_"])
        try:
            parameters = inspect.signature(component).parameters
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}._component_={node['_component_']} has no signature to check: {error}") from error
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            try:
                check_keys(node, [*parameters, "_component_"], path)
            except UnknownKeyError as error:
                raise ConfigError(f"{error}; or remove it with ~{error.key}") from error
        _check_arguments(path, component, node, supplied.get(path.split(".")[0], ()))


def find_component(path: str, name: Any) -> Any:
    """The class or function that a config names.

    Raises:
        ConfigError: if there is none, or it cannot be called.
    """
    check_type(path, name, str)
    try:
        component = _get_component_from_path(name)
    except (InstantiationError, ValueError) as error:
        raise ConfigError(f"{path}={name}: {error}") from error
    if not callable(component):
        raise ConfigError(f"{path}={name} is a {type(component).__name__}, which cannot be called")
    return component


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
            hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(sorted(known))}"
            name = f"{path}.{key}" if path else str(key)
            raise UnknownKeyError(f"unknown key {name}; {hint}", name)


def build(
    path: str, node: Any, *args: Any, kind: type | None = None, attributes: Iterable[str] = (), **kwargs: Any
) -> Any:
    """``config.instantiate`` of the node at ``path``, with arguments of the recipe.

    Args:
        kind: class that the component must be an instance of.
        attributes: that it must have.

    Raises:
        ConfigError: if its constructor raises any error, or the component is not such a one.
    """
    check_block(path, node)
    try:
        built = config.instantiate(node, *args, **kwargs)
    except Exception as error:  # a component can raise anything
        message = str(error) if not isinstance(error, KeyError) else f"missing key {error}"
        if not isinstance(error, ValueError | OSError):  # others come from Python or torch, and name no field
            fields_given = (f"{key}={value!r}" for key, value in plain(node).items() if key != "_component_")
            message += f" (with {', '.join(fields_given) or 'no fields'})"
        raise ConfigError(message if message.startswith(path) else f"{path}: {message}") from error
    if kind is not None and not isinstance(built, kind):
        needed = f"{kind.__module__.rpartition('.')[0]}.{kind.__qualname__}"  # the name that its folder exports
        raise ConfigError(f"{path}._component_={node._component_}; this recipe needs {needed}")
    _require(path, node, built, attributes)
    return built


def _require(path: str, node: DictConfig, component: Any, attributes: Iterable[str]) -> None:
    if missing := [name for name in attributes if not hasattr(component, name)]:
        raise ConfigError(f"{path}._component_={node._component_} is not a valid {path}: it has no {missing[0]}")


def check_attributes(path: str, node: DictConfig, attributes: Iterable[str]) -> None:
    """The check of ``attributes`` in `build` on a class, because creating an instance writes files."""
    component = find_component(f"{path}._component_", node._component_)
    if isinstance(component, type):
        _require(path, node, component, attributes)


def device_and_dtype(cfg: DictConfig) -> tuple[torch.device, torch.dtype]:
    """``device`` and ``dtype`` of a config, as torchtune parses them; without a dtype fp32 on a CPU, else bf16.

    Raises:
        ConfigError: if they are unknown or not available on this machine.
    """
    check_type("device", cfg.device, str | None)
    check_type("dtype", cfg.dtype, str | None)
    dtype = cfg.dtype
    try:
        if cfg.device is not None:
            wanted = torch.device(cfg.device).type
            if wanted == "meta":
                raise ValueError("it has no memory")
            if wanted != "cpu" and not _is_available(wanted):  # torchtune takes another one
                raise ValueError(f"torch finds no {wanted} device on this machine; see owlore doctor")
        device = utils.get_device(cfg.device)
        if dtype is None:
            dtype = "fp32" if device.type == "cpu" else "bf16"
        return device, training.get_dtype(dtype, device=device)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={cfg.device}, dtype={dtype}: {error}") from error


def _is_available(kind: str) -> bool:
    try:
        return bool(getattr(torch, kind).is_available())
    except (AttributeError, ImportError):  # torch has no such module, or it needs another package
        return False


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
