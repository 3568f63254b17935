"""Names of the packaged recipes and configs. Imports nothing heavy, so that the command line can list them at once."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

RECIPES = ("owlore_full_finetune", "owlore_eval")


def packaged_configs() -> Iterator[tuple[str, Path]]:
    """(name, file) of every packaged config, by name; a name is the path without its ending."""
    spec = importlib.util.find_spec("owlore_configs")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    for file in sorted(root.rglob("*.yaml")):
        yield file.relative_to(root).with_suffix("").as_posix(), file


def find_config(name: str) -> Path:
    """The file of a config: a path that exists wins, else a packaged name.

    Raises:
        SystemExit: if it is neither; the message lists near names.
    """
    if Path(name).is_file():
        return Path(name)
    configs = dict(packaged_configs())
    if name not in configs:
        import difflib

        near = difflib.get_close_matches(name, configs, n=3, cutoff=0.4) or list(configs)
        raise SystemExit(f"error: no file and no packaged config named {name}; there is {', '.join(near)}")
    return configs[name]
