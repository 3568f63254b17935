"""The reports of the accuracy studies: from their committed rows, and from rows whose tables are known."""

import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from owlore_evals.jsonl import read_lines

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
README = (BENCHMARKS.parent / "README.md").read_text().split("## Speed and accuracy\n")[1].split("\n## ")[0]


@pytest.fixture
def quality_report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality_report

    yield quality_report
    for name in ("quality", "quality_report", "equal_time"):
        sys.modules.pop(name, None)


@pytest.fixture
def equal_time(quality_report):
    import equal_time

    return equal_time


def test_the_committed_report_is_made_from_the_committed_rows(quality_report):
    rows = read_lines(BENCHMARKS / "quality.jsonl")
    measured = quality_report.read_table(BENCHMARKS / "methods.md")
    assert rows and quality_report.report(rows, measured) == (BENCHMARKS / "quality.md").read_text().splitlines()


def test_the_committed_report_of_equal_times_is_made_from_the_committed_rows(equal_time):
    rows = list(read_lines(BENCHMARKS / "equal_time.jsonl"))
    assert equal_time.report(rows) == (BENCHMARKS / "equal_time.md").read_text().splitlines()


def test_the_readme_has_the_rows_of_the_report_of_equal_times():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert len(rows) == 6 and set(rows) <= set((BENCHMARKS / "equal_time.md").read_text().splitlines())


def test_losses_in_the_documentation_are_those_of_the_reports():
    text = README + (BENCHMARKS.parent / "docs" / "settings.md").read_text()
    losses = set(re.findall(r"0\.[45]\d{3}(?: ± 0\.\d{4})?", text))
    reports = "".join((BENCHMARKS / f"{name}.md").read_text() for name in ("quality", "equal_time"))
    assert len(losses) >= 6 and [loss for loss in losses if loss not in reports] == []


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


def test_no_problem_is_in_two_sets_or_in_the_training_data(equal_time):
    rows = [{"instruction": f"problem {i % 700}", "output": str(i)} for i in range(900)]
    train, sets = equal_time.split(rows, seed=1)
    problems = [{row["instruction"] for row in some} for some in (train, *sets.values())]
    assert [len(some) for some in problems] == [200, 100, 100, 300] and len(set.union(*problems)) == 700
    assert len(train) > 200 and train != equal_time.split(rows, seed=2)[0]
    assert sets == equal_time.split(rows, seed=2)[1]


def test_a_method_gets_the_steps_of_the_time_of_full_fine_tuning(equal_time):
    costs = {equal_time.REFERENCE: {"ratio": 1.02}, equal_time.OURS: {"ratio": 0.4}}
    assert equal_time.steps_in(100, equal_time.OURS, costs) == 250
    assert equal_time.steps_in(100, equal_time.REFERENCE, costs) == 100


def test_the_committed_rows_have_what_a_reader_needs_to_repeat_them(equal_time):
    rows = list(read_lines(BENCHMARKS / "equal_time.jsonl"))
    costs = equal_time.costs_of(rows)
    assert {equal_time.REFERENCE, equal_time.OURS} <= costs.keys() <= equal_time.METHODS.keys()
    assert len({(row["machine"], row["cores"]) for row in costs.values()}) == 1
    for row in rows:
        assert row["code"] and row["versions"]["torch"] and ("losses" not in row or row["config"])


def test_rows_of_earlier_code_and_of_methods_that_are_not_tuned_do_not_count(equal_time):
    def row(method, lr, seed, loss, steps, code="new"):
        losses = {"tuning": loss + 1, "choosing": 0.0, "reported": loss}
        return {
            "key": f"{method} {lr} {seed} {steps}", "method": method, "lr": lr, "seed": seed, "steps": steps,
            "code": code, "losses": losses,
        }  # fmt: skip

    def cost(method, ratio):
        return {"key": "cost", "method": method, "ratio": ratio, "memory": 1.0, "machine": "a CPU", "cores": 2}

    ours, full, lora = equal_time.OURS, equal_time.REFERENCE, "torchtune LoRA, r=16, bf16"
    rows = [
        row(ours, 1e-4, 0, 0.10, 200, "old"), row(ours, 3e-4, 0, 0.50, 200), row(ours, 1e-3, 0, 0.60, 200),
        row(ours, 1e-4, 0, 0.65, 200), row(ours, 3e-4, 1, 0.48, 200), row(full, 1e-4, 0, 0.54, 100),
        row(full, 1e-4, 1, 0.53, 100), row(full, 1e-5, 0, 0.58, 100), row(full, 1e-3, 0, 0.58, 100),
        row(ours, 3e-4, 0, 0.55, 100), row(ours, 1e-4, 0, 0.56, 100), row(ours, 1e-3, 0, 0.56, 100),
        row(lora, 1e-3, 0, 0.40, 100), row(lora, 3e-4, 0, 0.41, 100),  # at the edge: a higher rate may be better
        cost(ours, 9.0), cost(ours, 0.5), cost(full, 1.02), cost(lora, 1.0),
    ]  # fmt: skip
    lines = equal_time.report(rows)
    in_time, after = (
        next(i for i, line in enumerate(lines) if title in line) for title in ("## In the time", "## Aft")
    )
    assert lines[in_time + 4 : after - 1] == [
        f"| {full} | 1.02 | 100 | 0.0001 | 2 | 0.5350 ± 0.0071 | +0.0450 ± 0.0050 | 1.00 |",
        f"| {ours} | 0.50 | 200 | 0.0003 | 2 | 0.4900 ± 0.0141 |  | 1.00 |",
    ]
    assert lines[after + 4 : after + 6] == [
        f"| {full} | 1.02 | 100 | 0.0001 | 2 | 0.5350 ± 0.0071 | -0.0100 | 1.00 |",
        f"| {ours} | 0.50 | 100 | 0.0003 | 1 | 0.5500 |  | 1.00 |",
    ]
    assert f"| {ours} | 200 | 0.0001: 1.6500, 0.0003: 1.5000, 0.001: 1.6000 |" in lines


def test_the_time_of_a_step_is_that_in_which_its_process_ran(equal_time):
    from lib.turns import run_for, run_in_turn, step_times

    counting = "import time\nfor _ in range(40): print(time.perf_counter(), flush=True); time.sleep(0.05)"
    one, other = (subprocess.Popen([sys.executable, "-c", counting], stdout=subprocess.PIPE) for _ in range(2))
    run_for(0.2, other)
    turns = run_in_turn(one, other, 0.4)
    assert len(turns.of_other) >= 3  # one ends after more than 2 seconds of its own
    other.kill()
    for process, own in ((one, turns.of_process), (other, turns.of_other)):
        ends = [float(line) for line in process.communicate()[0].splitlines()]
        seconds = step_times([end for end in ends if end > own[0][0]], own)
        assert 0.04 < statistics.median(seconds) < 0.1
        assert sum(seconds) <= sum(stopped - started for started, stopped in own)


def test_a_step_over_two_turns_has_their_time(equal_time):
    from lib.turns import step_times

    assert step_times([0.0, 2.0, 11.0, 23.0], [(0.0, 5.0), (10.0, 12.0), (20.0, 30.0)]) == [2.0, 4.0, 4.0]


def test_a_grid_grows_until_its_best_value_is_inside(equal_time):
    from quality import best_of_grid

    for best in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3):
        tried = []

        def loss_of(lr, best=best, tried=tried):
            tried.append(lr)
            return abs(math.log(lr / best))

        assert best_of_grid((1e-4, 3e-4), loss_of) == best
        assert min(tried) < best < max(tried) and len(tried) == len(set(tried))


def test_a_digest_of_code_ignores_comments_and_docstrings(equal_time, tmp_path):
    from lib.code import digest_of_code

    file = tmp_path / "a.py"
    digests = []
    for text in ('"""One."""\nx = 1\n', '"""Two."""\n\nx = 1  # as\n', "x = 2\n"):
        file.write_text(text)
        digests.append(digest_of_code([file]))
    assert digests[0] == digests[1] != digests[2]
