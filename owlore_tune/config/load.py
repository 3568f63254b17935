"""Configs by name: the packaged ones, their bases and overrides, and copies with comments. Imports nothing heavy."""

import argparse
import importlib.util
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from owlore_tune.config.schema import check_type, plain
from owlore_tune.errors import ConfigError
from owlore_tune.files import user_path

SHARED_CONFIGS = ("base", "owlore")  # configs that others name as their base, without a model
RECIPES = {
    "owlore_full_finetune": "fine-tune all weights, a few layers at a time, on one device or several",
    "owlore_eval": "evaluate a torchtune model with lm-evaluation-harness, local files and MT-Bench",
}


def packaged_configs() -> Iterator[tuple[str, Path]]:
    """(name, file) of every packaged config but `SHARED_CONFIGS`, by name; a name is the path without its extension."""
    root = _origin("owlore_configs").parent
    for file in sorted(root.rglob("*.yaml")):
        if (name := file.relative_to(root).with_suffix("").as_posix()) not in SHARED_CONFIGS:
            yield name, file


def title(config: Path) -> str:
    """The title of a packaged config, from its first line."""
    with config.open() as file:
        return file.readline().removeprefix("#").strip().rstrip(".:")


def find_config(name: str) -> Path:
    """The file of a config: an existing path, else a packaged name.

    Raises:
        ConfigError: if it is neither; the message lists similar names.
    """
    path = user_path(name)
    return path if path.is_file() else _find(name, _configs(), "packaged config")


def find_packaged(name: str) -> Path:
    """The file of a packaged recipe or config.

    Raises:
        ConfigError: if there is none; the message lists similar names.
    """
    recipes = {recipe: _origin(recipe) for recipe in RECIPES}
    return _find(name, recipes | _configs(), "packaged recipe or config")


def _configs() -> dict[str, Path]:
    root = _origin("owlore_configs").parent
    return {name: root / f"{name}.yaml" for name in SHARED_CONFIGS} | dict(packaged_configs())


def _find(name: str, files: dict[str, Path], kind: str) -> Path:
    if name not in files:
        import difflib

        near = difflib.get_close_matches(name, files, n=3, cutoff=0.4) or list(files)
        raise ConfigError(f"no file and no {kind} named {name}; available: {', '.join(near)}")
    return files[name]


def _origin(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def load_config(name: str, overrides: Iterable[str] = ()) -> DictConfig:
    """Load a packaged config by name, or a file, and apply ``field=value`` overrides.

    The field ``base`` names a config with the fields that the file does not have; see `merge`. It is a packaged name,
    or a file relative to this one.

    Raises:
        ConfigError: if a file is not a YAML mapping, a base does not exist or leads back to its file, or an override is
            malformed or cannot be applied.
    """
    merged = reduce(merge, (plain(fields) for _, fields in reversed(with_bases(name))))
    merged.pop("base", None)
    return override(OmegaConf.create(merged), overrides)


def with_bases(name: str) -> list[tuple[Path, DictConfig]]:
    """The file of a config with its fields, that of its base, and so on.

    Raises:
        ConfigError: if a file is not a YAML mapping, or a base does not exist or leads back to its file.
    """
    file = find_config(name)
    found = [(file, _read(file))]
    while (base := found[-1][1].get("base")) is not None:
        here = found[-1][0]
        check_type(f"{here}: base", base, str)
        beside = here.parent / user_path(base)
        try:
            file = beside if beside.is_file() else find_config(base)
        except ConfigError as error:
            raise ConfigError(f"{here}: base={base}; {error}") from None
        if any(file.samefile(known) for known, _ in found):
            raise ConfigError(f"{here}: base={base} leads back to {file}; remove one of these bases")
        found.append((file, _read(file)))
    return found


def merge(base: Any, changes: Any) -> Any:
    """``base`` with ``changes``. Blocks are merged, but one with another ``_component_`` replaces that of ``base``."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    if changes.get("_component_", base.get("_component_")) != base.get("_component_"):
        return changes
    return base | {key: merge(base[key], value) if key in base else value for key, value in changes.items()}


def _read(file: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(file)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(loaded, DictConfig) or not loaded:
        raise ConfigError(f"{file} is {'not a mapping of fields' if loaded else 'empty'}")
    if bad := [key for key in loaded if not isinstance(key, str)]:
        raise ConfigError(f"{file}: the key {bad[0]!r} is not text")
    return loaded


def override(cfg: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """``cfg`` with ``field=value`` overrides, or ``~field`` to remove one, as torchtune's recipes take them.

    Raises:
        ConfigError: if an override is malformed or cannot be applied.
    """
    from torchtune.config._utils import _merge_yaml_and_cli_args  # takes seconds

    overrides = list(overrides)
    for text in overrides:
        if not text.startswith("~") and (text.count("=") != 1 or text.endswith("=???")):
            raise ConfigError(f"override {text!r} is not of the form field=value")
    try:
        return _merge_yaml_and_cli_args(argparse.Namespace(**plain(cfg)), overrides)
    except (ValueError, TypeError, AttributeError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"overrides {' '.join(overrides)}: {error}") from error


COMMENT_COLUMN = 34


@dataclass
class Block:
    """A top-level field: the lines above it, its own line, and those of its fields by name."""

    above: list[str]
    line: str
    fields: dict[str, str] = field(default_factory=dict)

    def component(self) -> str | None:
        line = self.fields.get("_component_")
        return None if line is None else line.partition("#")[0].strip()

    def update(self, other: "Block") -> None:
        if not (self.fields and other.fields) or other.component() not in (None, self.component()):
            self.line, self.fields = _with_comment(other.line, self.line), other.fields
            return
        self.fields |= {key: _with_comment(line, self.fields.get(key, "")) for key, line in other.fields.items()}


def expanded(files: list[Path]) -> str:
    """The text of a config with the fields of its bases. It loads to the same fields as the config.

    Args:
        files: that of the config, that of its base, and so on, in the form of the packaged ones: fields at most two
            levels deep, each in one line.
    """
    texts = [file.read_text() for file in files]
    merged = _blocks(texts[-1])
    for text in reversed(texts[:-1]):
        for key, block in _blocks(text).items():
            if key in merged:
                merged[key].update(block)
            elif key != "base":
                merged[key] = block
    title = texts[0][: len(texts[0]) - len(_body(texts[0]))]
    lines = [line for block in merged.values() for line in (*block.above, block.line, *block.fields.values())]
    return title + "\n".join(lines) + "\n"


def _body(text: str) -> str:
    return re.sub(r"\A(#.*\n)*", "", text)


def _blocks(text: str) -> dict[str, Block]:
    blocks: dict[str, Block] = {}
    above: list[str] = []
    for line in _body(text).splitlines():
        key = line.partition(":")[0].strip()
        if not line or line.startswith("#"):
            above.append(line)
        elif line.startswith(" "):
            list(blocks.values())[-1].fields[key] = line
        else:
            blocks[key] = Block(above, line)
            above = []
    return blocks


def _with_comment(line: str, described: str) -> str:
    """``line`` with the comment of ``described``, if it has none of its own."""
    _, mark, comment = described.partition("  #")
    return f"{line.ljust(COMMENT_COLUMN - 2)}  #{comment}" if mark and "  #" not in line else line
