"""The classes on the page for developers, run as they are there: training uses them without other changes."""

import re
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest

from owlore_tune.layers.sampler import DRAWS
from owlore_tune.layers.scores import SCORES
from owlore_tune.quantized.formats import FORMATS
from owlore_tune.training.plan import savings
from runs import finetune, variant

PAGE = (Path(__file__).parents[2] / "docs" / "development.md").read_text()
# The file that a text names, and its diff.
ADDITION = re.compile(r"`(\S+)\.py`(?:(?!```).)+```diff\n(.+?)```", re.DOTALL)


@pytest.fixture
def additions(tmp_path, monkeypatch):
    """Run each addition with the names of the file that it is for, which is the package's or a user's."""
    monkeypatch.syspath_prepend(tmp_path)
    with patch.dict(SCORES), patch.dict(DRAWS), patch.dict(FORMATS):
        for section in PAGE.split("\n## ")[1:]:
            if not section.startswith("A new "):
                continue
            file, diff = ADDITION.search(section).groups()
            code = "".join(line.removeprefix("+") for line in diff.splitlines(keepends=True))
            if file.startswith("owlore_tune/"):
                exec(code, vars(import_module(file.replace("/", "."))).copy())
            else:
                (tmp_path / f"{file}.py").write_text(code)
        yield


@pytest.mark.parametrize(("weights", "optimizer"), [("full", "signs.SignDescent"), ("fp8", "torch.optim.RAdam")])
def test_a_score_a_draw_a_format_and_an_optimizer_are_added(weights, optimizer, additions, tiny_config):
    changes = {"optimizer": {"_component_": optimizer, "lr": 3e-4}, "owlore__weights": weights}
    recipe = finetune(variant(tiny_config, "run", owlore__score="input_size", owlore__draw="highest", **changes))
    scores, records = recipe.scores, recipe.report.records
    assert scores.data is not None and len(set(scores.scores)) == 4
    highest = sorted(sorted(range(4), key=lambda layer: -scores.scores[layer])[:2])
    assert [draw["active"] for draw in records.draws] == [highest] * len(records.draws)
    assert type(recipe.optimizer).__name__ in optimizer
    measured = recipe.report.measure_memory()
    assert measured["weights"] == recipe.plan.weights
    assert measured["moments"] == pytest.approx(recipe.plan.moments, rel=0.01)
    assert ("owlore.weights=fp8", "owlore.products=full") in savings(recipe.settings, None)
    assert records.losses["after"] < records.losses["before"]
