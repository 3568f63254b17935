"""Names of the packaged recipes and configs. Imports nothing heavy, so the command line can list them at once."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from owlore_tune.errors import ConfigError
from owlore_tune.paths import user_path

RECIPES = {
    "owlore_full_finetune": "fine-tune all weights, a few layers at a time, on one device or several",
    "owlore_eval": "evaluate a torchtune model with lm-evaluation-harness, local files and MT-Bench",
}


def packaged_configs() -> Iterator[tuple[str, Path]]:
    """(name, file) of every packaged config, by name; a name is the path without its extension."""
    root = _origin("owlore_configs").parent
    for file in sorted(root.rglob("*.yaml")):
        yield file.relative_to(root).with_suffix("").as_posix(), file


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
    return path if path.is_file() else _find(name, dict(packaged_configs()), "packaged config")


def find_packaged(name: str) -> Path:
    """The file of a packaged recipe or config.

    Raises:
        ConfigError: if there is none; the message lists similar names.
    """
    recipes = {recipe: _origin(recipe) for recipe in RECIPES}
    return _find(name, recipes | dict(packaged_configs()), "packaged recipe or config")


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
