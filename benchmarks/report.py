"""What every benchmark's report says about where its numbers come from."""

import argparse
import os
import platform
from datetime import date
from pathlib import Path

import torch
import torchtune


def machine() -> str:
    """One line: processor, versions, date."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}){gpu}; torch {torch.__version__.split('+')[0]}, "
        f"torchtune {torchtune.__version__.split('+')[0]}; {date.today()}"
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help="Markdown file to write the report to as well")
    return made


def publish(lines: list[str], output: Path | None) -> None:
    print("\n" + "\n".join(lines))
    if output:
        output.write_text("\n".join(lines) + "\n")
