"""The report of the accuracy study: from its committed rows, and from rows whose tables are known."""

import re
import sys
from pathlib import Path

import pytest

from owlore_evals.jsonl import read_lines

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
README = (BENCHMARKS.parent / "README.md").read_text()


@pytest.fixture
def quality_report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality_report

    yield quality_report
    for name in ("quality", "quality_report"):
        sys.modules.pop(name, None)


def test_the_committed_report_is_made_from_the_committed_rows(quality_report):
    rows = read_lines(BENCHMARKS / "quality.jsonl")
    measured = quality_report.read_table(BENCHMARKS / "methods.md")
    assert rows and quality_report.report(rows, measured) == (BENCHMARKS / "quality.md").read_text().splitlines()


def test_the_readme_has_the_rows_of_the_report():
    section = README.split("## Speed and accuracy\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 8 and set(rows) <= set((BENCHMARKS / "quality.md").read_text().splitlines())


def test_losses_in_the_documentation_are_those_of_the_report():
    text = README + (BENCHMARKS.parent / "docs" / "settings.md").read_text()
    losses = set(re.findall(r"0\.5\d{3}(?: ± 0\.\d{4})?", text))
    report = (BENCHMARKS / "quality.md").read_text()
    assert len(losses) >= 6 and [loss for loss in losses if loss not in report] == []


def row(method, lr, seed, loss, correct, steps=100):
    return {
        "key": f"{method}{lr}{seed}{steps}", "method": method, "lr": lr, "seed": seed, "steps": steps,
        "held_out_loss": loss, "correct": {"one": [correct, 60], "two": [0, 40]},
    }  # fmt: skip


def test_rows_become_means_errors_and_counts(quality_report):
    rows = [
        row("BAdam", 1e-4, 0, 0.50, 10), row("BAdam", 1e-4, 1, 0.52, 30), row("torchtune full", 1e-3, 0, 0.48, 40),
        row("torchtune full", 1e-3, 1, 0.47, 40), row("torchtune full", 3e-3, 0, 0.55, 0, steps=40),
        row("torchtune full", 1e-3, 0, 0.51, 0, steps=40), row("torchtune full", 3e-4, 0, 0.53, 0, steps=40),
        row("BAdam", 3e-4, 0, 0.6, 0, steps=40),
    ]  # fmt: skip
    lines = quality_report.report(rows, {"BAdam": {"mean step, s": "2.23", "peak memory, GB": "3.15"}})
    # 40 of 200 are 20 %, with a standard error of √(0.2 · 0.8 / 200) = 2.8 %.
    assert "| BAdam | 0.0001 | 2 | 0.5100 ± 0.0141 | 40 of 200: 20.0 ± 2.8 % | 2.23 | 3.15 |" in lines
    assert "| torchtune full | 0.001 | 2 | 0.4750 ± 0.0071 | 80 of 200: 40.0 ± 3.5 % |  |  |" in lines
    assert lines[-2:] == ["| torchtune full | 0.5300 | **0.5100** | 0.5500 |", "| BAdam | 0.6000 |  |  |"]


def test_the_front_has_every_point_that_no_other_beats(quality_report):
    points = {"slow": (3.0, 1.0), "fast": (1.0, 2.0), "beaten": (3.0, 1.5), "middle": (2.0, 1.2)}
    assert quality_report.pareto(points) == ["fast", "middle", "slow"]
