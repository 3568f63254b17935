"""The accuracy study: its report, from the committed rows and from rows whose tables are known, and its runs."""

import math
import re
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from owlore_evals.jsonl import read_lines

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
README = (BENCHMARKS.parent / "README.md").read_text().split("## Speed and accuracy\n")[1].split("\n## ")[0]


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quality

    yield quality
    for name in ("quality", "quality_report"):
        sys.modules.pop(name, None)


@pytest.fixture
def quality_report(quality):
    import quality_report

    return quality_report


def test_the_committed_report_is_made_from_the_committed_rows(quality_report):
    rows = list(read_lines(BENCHMARKS / "quality.jsonl"))
    assert quality_report.report(rows) == (BENCHMARKS / "quality.md").read_text().splitlines()


def test_the_readme_has_the_rows_of_the_report():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert len(rows) == 7 and set(rows) <= set((BENCHMARKS / "quality.md").read_text().splitlines())


def test_losses_in_the_documentation_are_those_of_the_report():
    text = README + (BENCHMARKS.parent / "docs" / "settings.md").read_text()
    losses = set(re.findall(r"0\.[45]\d{3}(?: ± 0\.\d{4})?", text))
    report = (BENCHMARKS / "quality.md").read_text()
    assert len(losses) >= 6 and [loss for loss in losses if loss not in report] == []


def test_no_problem_is_in_two_sets_or_in_the_training_data(quality):
    rows = [{"instruction": f"problem {i % 700}", "output": str(i)} for i in range(900)]
    train, sets = quality.split(rows, seed=1)
    problems = [{row["instruction"] for row in some} for some in (train, *sets.values())]
    assert [len(some) for some in problems] == [200, 100, 100, 300] and len(set.union(*problems)) == 700
    assert len(train) > 200 and train != quality.split(rows, seed=2)[0]
    assert sets == quality.split(rows, seed=2)[1]


def test_a_method_gets_the_steps_of_the_time_of_full_fine_tuning(quality):
    costs = {quality.REFERENCE: {"ratio": 1.02}, quality.OURS: {"ratio": 0.4}}
    assert quality.steps_in(100, quality.OURS, costs) == 250
    assert quality.steps_in(100, quality.REFERENCE, costs) == 100


def test_the_committed_rows_have_what_a_reader_needs_to_repeat_them(quality):
    rows = list(read_lines(BENCHMARKS / "quality.jsonl"))
    costs = quality.costs_of(rows)
    assert {quality.REFERENCE, quality.OURS} <= costs.keys() <= quality.METHODS.keys()
    assert len({(row["machine"], row["cores"]) for row in costs.values()}) == 1
    for row in rows:
        assert row["versions"]["torch"] and ("losses" not in row or row["config"])


def row(method, lr, seed, loss, steps, code="new"):
    losses = {"tuning": loss + 1, "choosing": 0.0, "reported": loss}
    return {
        "key": f"{method} {lr} {seed} {steps}", "method": method, "lr": lr, "seed": seed, "steps": steps,
        "code": code, "losses": losses, "machine": f"the CPU of {code} rows",
    }  # fmt: skip


def cost(method, ratio, memory=1.0, code="new", **more):
    found = {"key": "cost", "method": method, "ratio": ratio, "memory": memory, "code": code}
    return found | {"machine": "a CPU", "cores": 2} | more


def test_earlier_rows_of_a_run_and_methods_that_are_not_tuned_do_not_count(quality, quality_report):
    ours, full, lora = quality.OURS, quality.REFERENCE, "torchtune LoRA, r=16, bf16"
    rows = [
        row(ours, 1e-4, 0, 0.10, 200), row(ours, 3e-4, 0, 0.50, 200), row(ours, 1e-3, 0, 0.60, 200),
        row(ours, 1e-4, 0, 0.65, 200), row(ours, 3e-4, 1, 0.48, 200), row(full, 1e-4, 0, 0.54, 100),
        row(full, 1e-4, 1, 0.53, 100), row(full, 1e-5, 0, 0.58, 100), row(full, 1e-3, 0, 0.58, 100),
        row(ours, 3e-4, 0, 0.55, 100), row(ours, 1e-4, 0, 0.56, 100), row(ours, 1e-3, 0, 0.56, 100),
        row(lora, 1e-3, 0, 0.40, 100), row(lora, 3e-4, 0, 0.41, 100),  # at the edge: a higher rate may be better
        cost(ours, 9.0), cost(ours, 0.5, 2.5), cost(full, 1.02), cost(lora, 1.0, code="old"),
    ]  # fmt: skip
    lines = quality_report.report(rows)
    assert "The runs used these CPUs: the CPU of new rows. " in lines[2]
    assert f" Step time and memory were measured with earlier code for: {lora}. " in lines[2]
    in_time, after = (
        next(i for i, line in enumerate(lines) if title in line) for title in ("## In the time", "## Aft")
    )
    assert lines[in_time + 4 : after - 1] == [
        f"| {full} | 1.02 | 100 | 0.0001 | 2 | 0.5350 ± 0.0071 | +0.0450 ± 0.0050 | 1.00 |",
        f"| {ours} | 0.50 | 200 | 0.0003 | 2 | 0.4900 ± 0.0141 |  | 2.50 |",
        "",
        "Seeds by CPU: the CPU of new rows: 0, 1.",
    ]
    lines_with_lora = quality_report.report([*rows, row(lora, 3e-3, 0, 0.52, 100), row(lora, 1e-3, 0, 0.405, 100)])
    first = lines_with_lora.index("| whole process, GB | held-out loss of the methods that fit |")
    assert lines_with_lora[first + 2 : first + 6] == [
        f"| 2.3 | {lora}: 0.4050; {full}: 0.5350 |",
        f"| 2.7 | {lora}: 0.4050; {ours}: 0.4900; {full}: 0.5350 |",
        f"| 3.2 | {lora}: 0.4050; {ours}: 0.4900; {full}: 0.5350 |",
        f"| 4.0 | {lora}: 0.4050; {ours}: 0.4900; {full}: 0.5350 |",
    ]
    assert lines[after + 4 : after + 6] == [
        f"| {full} | 1.02 | 100 | 0.0001 | 2 | 0.5350 ± 0.0071 | -0.0100 | 1.00 |",
        f"| {ours} | 0.50 | 100 | 0.0003 | 1 | 0.5500 |  | 2.50 |",
    ]
    assert f"| {ours} | 200 | 0.0001: 1.6500, 0.0003: 1.5000, 0.001: 1.6000 |" in lines
    assert quality_report.points(rows) == {full: [(100, 100.0, 0.535)], ours: [(100, 50.0, 0.55), (200, 100.0, 0.49)]}
    by_time = quality_report.draw(rows).axes[1]
    assert {line.get_label(): list(line.get_xdata()) for line in by_time.lines} == {full: [100], ours: [50, 100]}


def test_other_settings_of_owlore_have_a_table_of_their_own(quality, quality_report):
    """Their steps are measured in turn with those of its first setting, which stays in the tables beside the peers."""
    ours, full, other = quality.OURS, quality.REFERENCE, "OwLore, γ=5, r=128, K=10"
    finals = {(full, 100): 0.54, (ours, 200): 0.5, (other, 250): 0.52}
    rows = [
        row(method, lr, 0, loss + worse, steps)
        for (method, steps), loss in finals.items()
        for lr, worse in ((1e-4, 0.1), (3e-4, 0), (1e-3, 0.1))
    ]
    costs = [cost(full, 1.0), cost(ours, 0.5)]
    relative = [cost(other, 0.4, 0.8, against=ours), cost(full, 2.0, against=ours)]
    lines = quality_report.report(rows + costs + relative)
    first = lines.index("## OwLore with other settings, in the time of 100 steps of torchtune's full fine-tuning")
    assert lines[first + 2].endswith(f"on a CPU, 2 cores. There, its step takes 0.25 of that of {full}.")
    assert lines[first + 6 : first + 8] == [
        f"| {ours} | 0.50 | 200 | 0.0003 | 1 | 0.5000 |  | 1.00 |",
        f"| {other} | 0.40 | 250 | 0.0003 | 1 | 0.5200 | +0.0200 | 0.80 |",
    ]
    assert [line for line in lines[:first] if other in line] == []
    assert lines[:first] == quality_report.report(rows + costs)[:first]


def test_a_grid_grows_until_its_best_value_is_inside(quality):
    for best in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3):
        tried = []

        def loss_of(lr, best=best, tried=tried):
            tried.append(lr)
            return abs(math.log(lr / best))

        assert quality.best_of_grid((1e-4, 3e-4), loss_of) == best
        assert min(tried) < best < max(tried) and len(tried) == len(set(tried))


def test_a_model_before_training_has_forgotten_nothing(quality, smollm2_dir, tmp_path, monkeypatch):
    """And one with other weights has; answers do not count."""
    from lib import study
    from lib.study import divergence, general_loss

    rows = [{"instruction": f"What is {i} plus {i}?", "input": "", "output": f"It is {2 * i}."} for i in (3, 40)]
    shutil.copytree(smollm2_dir, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] *= 0.9
    save_file(weights, file, {"format": "pt"})
    assert divergence(smollm2_dir, rows) == 0
    moved = divergence(tmp_path / "other", rows)
    assert moved > 1e-3
    assert divergence(tmp_path / "other", [row | {"output": "No."} for row in rows]) == pytest.approx(moved)
    monkeypatch.setattr(study, "mmlu_dev_rows", lambda split: rows)
    assert general_loss(tmp_path / "other") != general_loss(smollm2_dir)


def test_a_run_with_a_line_is_not_repeated(quality, tmp_path, monkeypatch):
    from lib.study import Run

    class Finished(quality.Study):
        def __init__(self, rows):
            self.rows = rows

        def execute(self, run):
            return {"key": run.key, "losses": {"reported": 0.5}}

    monkeypatch.setattr(quality, "ROWS", tmp_path / "rows.jsonl")
    run = Run(quality.OURS, 1e-4, 0, 100)
    known = {"key": run.key, "losses": {"reported": 0.75}}
    assert Finished({run.key: known}).row(run) == known
    assert not quality.ROWS.exists()
    Finished({}).row(run)
    assert [row["key"] for row in read_lines(quality.ROWS)] == [run.key]


def test_a_run_of_an_unknown_method_is_refused(quality, monkeypatch, capsys):
    """Before any data is read."""
    arguments = ["quality.py", "--data", "missing", "--row", "LoRa", "1e-4", "0", "100"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="2"):
        quality.main()
    assert "'LoRa' is not one of torchtune full, fp32, " in capsys.readouterr().err
