"""A user's directory, in which files and commands are wrong."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def refused(main: Callable[[], None], arguments: list[str], capsys, monkeypatch) -> str:
    """Return the last line that ``main`` prints."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    printed = captured.err
    sys.stdout.write(captured.out)
    if stop.value.code == 2:  # argparse prints the usage and one line
        return printed.strip().splitlines()[-1]
    line = str(stop.value.code)
    assert line.startswith("error: ") and "\n" not in line
    assert "Traceback" not in printed
    sys.stderr.write(printed)  # for a test that looks for more in it
    return line


def rewrite(file: str, change: Callable[[str], str]) -> None:
    Path(file).write_text(change(Path(file).read_text()))


def with_json(file: str, **changes) -> None:
    rewrite(file, lambda text: json.dumps({k: v for k, v in (json.loads(text) | changes).items() if v is not None}))


def nonempty(name: str) -> None:
    Path(name).mkdir()
    Path(name, "mine.txt").write_text("mine")
