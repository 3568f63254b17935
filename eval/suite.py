"""The tasks selected by the suite fields of a config, and their evaluation on any harness model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from omegaconf import DictConfig, ListConfig

from owlore_evals.generation import generation_options
from owlore_evals.harness import averages, check_fewshot, leaf_tasks, load_tasks
from owlore_evals.judge import JudgeConfig, check_url
from owlore_evals.mt_bench import MT_BENCH, MTBench
from owlore_evals.torchtune_lm import TorchtuneLM
from owlore_tune.config.schema import COUNT, LARGEST_COUNT, Range, check_fields, check_type, config_field
from owlore_tune.data.tokenizer import HFChatTokenizer
from owlore_tune.errors import ConfigError
from owlore_tune.models.decoder import Decoder

SHORTEST = 16  # tokens


@dataclass(frozen=True)
class EvalConfig:
    """All fields of an evaluation's config. Those of type Any are blocks, or have checks of their own."""

    model: Any
    tokenizer: Any
    checkpointer: Any
    output_dir: str
    tasks: Any = config_field([])  # harness tasks, ours in eval/tasks, and mt_bench
    data_files: Any = None  # maps additional task names to JSON files
    scoring: str = "loglikelihood"  # for data_files
    data_root: str | None = None  # directory with copies of hub datasets
    num_fewshot: int | None = config_field(None, Range(0, LARGEST_COUNT))  # null: each task's default
    limit: int | None = config_field(None, COUNT)  # documents per task
    apply_chat_template: bool | None = None  # null: if the model has one and tokenizer.chat_template is not plain
    fewshot_as_multiturn: bool = True
    data_dir: str | None = None  # MT-Bench: FastChat's files
    max_new_tokens: int = config_field(1024, COUNT)  # MT-Bench
    min_coverage: float = config_field(0.95, Range(0, 1))  # MT-Bench
    judge: Any = None  # MT-Bench
    add_bos: bool | None = None  # null: as the model's tokenizer does
    max_length: int | None = config_field(None, COUNT)  # null: the model's limit
    batch_tokens: int | None = config_field(None, COUNT)  # null: depends on the device
    batch_size: int | None = config_field(None, COUNT)  # null: depends on the device
    seed: int = 0
    use_cache: bool = False
    log_samples: bool = True
    device: str | None = None  # null: the best available
    dtype: str | None = None  # null: fp32 on a CPU, else bf16


class Suite:
    """The tasks of a config with their documents, and the settings to run a model on them.

    Args:
        cfg: a config with all fields of `EvalConfig`, checked by `check_suite`.
        tokenizer: the model's tokenizer.
        max_seq_len: the model's limit, in tokens.

    Raises:
        ConfigError: if a value is invalid, a task is unknown, its documents are not available, or the tokenizer or the
            model does not support a setting.
    """

    def __init__(self, cfg: DictConfig, tokenizer: HFChatTokenizer, max_seq_len: int) -> None:
        self.cfg = cfg
        self.apply_chat_template = tokenizer.is_chat if cfg.apply_chat_template is None else cfg.apply_chat_template
        tasks = [] if cfg.tasks is None else cfg.tasks
        names = list(tasks) if isinstance(tasks, list | ListConfig) else str(tasks).split(",")
        for name in names:
            check_type("tasks", name, str)
        data_files = dict(cfg.data_files or {})
        if not names and not data_files:
            raise ConfigError("nothing to evaluate; set tasks or data_files")
        if tokenizer.eos_id is None and tokenizer.bos_id is None:
            raise ConfigError(
                f"tokenizer.path={tokenizer.directory} names no eos_token; add it to tokenizer_config.json"
            )
        self._mt_bench = None
        if MT_BENCH in names:
            if MT_BENCH in data_files:
                raise ConfigError(f"data_files.{MT_BENCH}: the task of this name runs too; choose another name")
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
            plain_prompts=not self.apply_chat_template,
        )
        check_fewshot(self._tasks, cfg.num_fewshot)
        if not tokenizer.is_chat and (self.apply_chat_template or self._mt_bench):
            raise ConfigError(
                "this model has no chat template, or tokenizer.chat_template=plain; set apply_chat_template=null and "
                "remove mt_bench"
            )
        self._check_thinking(tokenizer)
        self._check_generation(min(cfg.max_length or max_seq_len, max_seq_len), tokenizer.generation_config)

    def _check_thinking(self, tokenizer: HFChatTokenizer) -> None:
        scored = [task.task_name for task in leaf_tasks(self._tasks) if task.OUTPUT_TYPE != "generate_until"]
        if tokenizer.enable_thinking and self.apply_chat_template and scored:
            raise ConfigError(
                f"tokenizer.enable_thinking=true: {scored[0]} is scored by log-likelihood, where the reasoning would "
                "begin; set it to false, or choose tasks that generate"
            )

    def _check_generation(self, length: int, defaults: dict[str, float]) -> None:
        if self._mt_bench is not None and self.cfg.max_new_tokens >= length:
            raise ConfigError(
                f"max_new_tokens={self.cfg.max_new_tokens} leaves no room in {length} tokens for a prompt"
            )
        tasks = [task for task in leaf_tasks(self._tasks) if task.OUTPUT_TYPE == "generate_until"]
        options = {task.task_name: task.config.generation_kwargs for task in tasks}
        if self._mt_bench is not None:
            options[MT_BENCH] = {"do_sample": True, "max_gen_toks": self.cfg.max_new_tokens}
        for name, kwargs in options.items():
            try:
                generation_options(kwargs, length, defaults=defaults)
            except ValueError as error:
                raise ConfigError(f"tasks: {name}: {error}") from error

    def check_saved(self, model_id: str, directory: Path) -> None:
        """Raise ConfigError if ``directory`` has answers or judgments of MT-Bench that `run_mt_bench` would refuse."""
        if self._mt_bench is not None:
            self._mt_bench.check_saved(model_id, directory)

    def run_tasks(self, lm: LM, model_id: str, directory: Path) -> dict[str, Any]:
        """Return the results of the harness's tasks and local files in the harness's format, with the harness's seeds,
        and ``averages`` of each metric over the named tasks.

        Args:
            model_id: identifies the model and its settings; key of the request cache.
            directory: for cached requests, with ``use_cache``.
        """
        if not self._tasks:
            return {"averages": {}}
        results = lm_eval.simple_evaluate(
            lm,
            tasks=list(self._tasks),
            task_manager=TaskManager(include_defaults=False),  # the tasks are already loaded
            num_fewshot=self.cfg.num_fewshot,
            limit=self.cfg.limit,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.cfg.fewshot_as_multiturn,
            use_cache=str(directory / f"requests_{model_id}") if self.cfg.use_cache else None,
            log_samples=self.cfg.log_samples,
        )
        assert results is not None
        named = [task.name if isinstance(task, Group) else task.task_name for task in self._tasks]
        results["averages"] = averages({name: results["results"][name] for name in named})
        return results

    def run_mt_bench(self, lm: LM, model_id: str, directory: Path) -> dict[str, Any]:
        """Return the results of MT-Bench in the harness's format; empty if it is not one of the tasks.

        Args:
            model_id: identifies the model and its settings; key of saved answers.
            directory: for answers and judgments.

        Raises:
            RunError: if the judge gave too few ratings.
        """
        return {} if self._mt_bench is None else self._mt_bench.run(lm, model_id, directory)


def build_lm(cfg: DictConfig, model: Decoder, tokenizer: HFChatTokenizer) -> TorchtuneLM:
    """Build the adapter from a config."""
    settings = ("add_bos", "max_length", "batch_tokens", "batch_size", "seed")
    return TorchtuneLM(model, tokenizer, **{key: cfg[key] for key in settings})


def check_suite(cfg: DictConfig) -> None:
    """Raise ConfigError if a value has the wrong type or is out of range."""
    check_fields(EvalConfig, cfg)
    if cfg.max_length is not None and cfg.max_length < SHORTEST:
        raise ConfigError(f"max_length={cfg.max_length}; it must be at least {SHORTEST}, or no question would be read")
    if cfg.judge is not None:
        if not isinstance(cfg.judge, DictConfig):
            raise ConfigError(f"judge={cfg.judge}; it must be a block of fields, or null")
        check_url(cfg.judge.get("base_url"))  # before the config is logged
    if isinstance(cfg.data_files, DictConfig):
        for name in cfg.data_files:
            check_type(f"data_files.{name!s}", cfg.data_files[name], str)
    if cfg.data_files is not None and not isinstance(cfg.data_files, DictConfig):
        raise ConfigError(f"data_files={cfg.data_files}; it must map names to files, as data_files.NAME=FILE")
