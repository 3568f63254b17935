"""What to evaluate, from the suite fields of a config, and the run of it on any model of the harness."""

from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from omegaconf import DictConfig, ListConfig, OmegaConf

from owlore_evals.harness import evaluate, load_tasks
from owlore_evals.judge import JudgeConfig
from owlore_evals.mt_bench import MT_BENCH, MTBench
from owlore_tune.config import ConfigError, check_keys, check_type, load_config

SUITE = {
    "tasks": [],  # of the harness, ours in eval/tasks, and mt_bench
    "data_files": None,  # name to JSON file, each one more task
    "scoring": "loglikelihood",  # of data_files
    "data_root": None,  # copies of hub datasets
    "num_fewshot": None,  # the tasks' own
    "limit": None,  # documents of each task
    "apply_chat_template": False,
    "fewshot_as_multiturn": True,
    "data_dir": None,  # MT-Bench: FastChat's files
    "max_new_tokens": 1024,  # MT-Bench
    "min_coverage": 0.95,  # MT-Bench
    "judge": None,  # MT-Bench
}


class Suite:
    """The tasks of a config, their documents loaded.

    Args:
        cfg: a config with all fields of SUITE.

    Raises:
        ConfigError: if a value cannot work, a task is unknown or its documents cannot be had.
    """

    def __init__(self, cfg: DictConfig) -> None:
        _check(cfg)
        names = list(cfg.tasks) if isinstance(cfg.tasks, ListConfig) else str(cfg.tasks).split(",")
        data_files = dict(cfg.data_files or {})
        if not names and not data_files:
            raise ConfigError("nothing to evaluate; set tasks or data_files")
        self._options = {
            key: cfg[key] for key in ("num_fewshot", "limit", "apply_chat_template", "fewshot_as_multiturn")
        }
        self._mt_bench = None
        if MT_BENCH in names:
            self._mt_bench = MTBench(
                cfg.data_dir,
                judge=None if cfg.judge is None else JudgeConfig.from_config(cfg.judge),
                max_new_tokens=cfg.max_new_tokens,
                min_coverage=cfg.min_coverage,
                limit=cfg.limit,
            )
        self._tasks = load_tasks(
            [name for name in names if name != MT_BENCH],
            data_root=cfg.data_root,
            data_files=data_files,
            scoring=cfg.scoring,
        )

    @classmethod
    def from_training_config(cls, cfg: DictConfig) -> "Suite":
        """The suite of a training config's ``eval:`` block: an eval config, by name or file, with fields changed."""
        check_keys(cfg, ["config", *SUITE], "eval")
        if not isinstance(cfg.get("config"), str):
            raise ConfigError("missing in the config: eval.config, the name or file of an eval config")
        base = load_config(cfg.config)
        fields = {key: value for key, value in [*base.items(), *cfg.items()] if key in SUITE}
        return cls(OmegaConf.merge(SUITE, fields))

    def run(
        self, lm: LM, model_id: str, directory: Path, *, use_cache: bool = False, log_samples: bool = True
    ) -> dict[str, Any]:
        """Results in the harness's form, of all tasks together.

        Args:
            model_id: tells this model and its settings from all others: answers and the request cache go by it.
            directory: for what is kept while it runs: answers, judgments, cached requests.
            use_cache: keep the model's answers in a file, so that an interrupted run goes on where it was.

        Raises:
            RunError: if MT-Bench's judge gave too few ratings.
        """
        results: dict[str, Any] = {}
        if self._tasks:
            cache = str(directory / f"requests_{model_id}") if use_cache else None
            results = evaluate(lm, self._tasks, use_cache=cache, log_samples=log_samples, **self._options)
        if self._mt_bench is not None:
            for key, values in self._mt_bench.run(lm, model_id, directory).items():
                results[key] = {**results.get(key, {}), **values}
        return results


def _check(cfg: DictConfig) -> None:
    for key, lowest in (("num_fewshot", 0), ("limit", 1), ("max_new_tokens", 1)):
        optional = key != "max_new_tokens"
        check_type(key, cfg[key], int | None if optional else int)
        if cfg[key] is not None and cfg[key] < lowest:
            raise ConfigError(f"{key}={cfg[key]}; it must be at least {lowest}{', or null' if optional else ''}")
    for key in ("apply_chat_template", "fewshot_as_multiturn"):
        check_type(key, cfg[key], bool)
    check_type("min_coverage", cfg.min_coverage, float)
    if not 0 <= cfg.min_coverage <= 1:
        raise ConfigError(f"min_coverage={cfg.min_coverage}; it must be from 0 to 1")
    if cfg.data_files is not None and not isinstance(cfg.data_files, DictConfig):
        raise ConfigError(f"data_files={cfg.data_files}; it must map names to files, as data_files.NAME=FILE")
