"""Helpers for the benchmark reports."""

import argparse
import os
import platform
import shlex
import sys
from datetime import date
from pathlib import Path

import torch
import torchtune


def machine() -> str:
    """Return one line with the processor, versions and date."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}){gpu}; torch {torch.__version__.split('+')[0]}, "
        f"torchtune {torchtune.__version__.split('+')[0]}; {date.today()}"
    )


def command() -> str:
    """Return the command of this process as Markdown, without output files and with DIR for directories of the user."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}"]
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word in ("--output", "--picture"):
            next(arguments)
        else:
            words.append(word)
            if word in ("--data", "--models"):
                words.append("DIR")
                next(arguments)
    return f"`python {shlex.join(words)}`"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head = " | ".join(columns).removeprefix(" ")
    return [f"| {head} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help="also write the report to this Markdown file")
    return made


def publish(lines: list[str], output: Path | None) -> None:
    print("\n" + "\n".join(lines))
    if output:
        output.write_text("\n".join(lines) + "\n")
