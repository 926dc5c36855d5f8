"""Tasks of lm_eval, the harness of EleutherAI (https://github.com/EleutherAI/lm-evaluation-harness): what models score
on them. The package is optional.

Knows: how it is asked, what its results are called here. Refuses to know: what a task is.
"""

import io
import math
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from typing import Any

import torch

from modules.config.schema import Config
from modules.metrics.metric import Context
from modules.output.run_record import RunRecord
from modules.runtime.errors import ConfigError, first_line
from modules.runtime.oom import is_out_of_memory


def check_tasks(config: Config) -> None:
    """Raise ConfigError if lm_eval is needed and not installed, or does not know a task."""
    if not config.eval:
        return
    known = _manager(config)
    unknown = [name for name in config.eval if not known.match_tasks([name])]
    if unknown:
        where = (
            f", nor is it in {config.eval_path}" if config.eval_path else "; set eval_path to the folder of your own"
        )
        raise ConfigError(f"eval: lm_eval has no task {', '.join(unknown)}{where}")


def base_on_tasks(context: Context, record: RunRecord) -> dict[str, float]:
    """What the base, which the model is, scores on the configured tasks, or what an earlier run has noted of it."""
    noted = record.lines("tasks")
    if noted or not context.config.eval:
        return noted[0].metrics if noted else {}
    return record.note("tasks", metrics=score_on_tasks(context, "base")).metrics


def score_on_tasks(context: Context, what: str = "merge") -> dict[str, float]:
    """What the model as it is scores on the configured tasks: each metric, and its standard error. what: it is.

    Nothing, and a warning says why, where a task can't be run: that is no reason to lose a merge.
    """
    config = context.config
    console = context.console
    model = context.model
    if not config.eval:
        return {}
    console.timed(f"Scoring the {what} on {', '.join(config.eval)}")
    batch = 1 if model.device.type == "cpu" else "auto"
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), torch.random.fork_rng():
            harness = import_module("lm_eval.models.huggingface")
            wrapped = harness.HFLM(pretrained=model.module, tokenizer=context.tokenizer, batch_size=batch)
            tasks = {"tasks": list(config.eval), "task_manager": _manager(config), "log_samples": False}
            found = import_module("lm_eval").simple_evaluate(model=wrapped, **tasks)
    except Exception as error:  # of a task, of its data set, of the network
        if is_out_of_memory(error):
            raise
        console.warning(f"eval: {', '.join(config.eval)} can't be run: {first_line(error)}")
        return {}
    return _values(found["results"])


def _manager(config: Config) -> Any:
    """Which tasks there are. Raises ConfigError if lm_eval is not installed."""
    try:
        import_module("lm_eval")
        return _tasks(config.eval_path)
    except ModuleNotFoundError as error:
        raise ConfigError(f"eval: the package {error.name} is not installed: pip install lm-eval") from None


@cache
def _tasks(folder: str | None) -> Any:
    """The tasks of lm_eval and of a folder: to find them takes seconds."""
    with redirect_stderr(io.StringIO()):
        return import_module("lm_eval.tasks").TaskManager(include_path=folder)


def _values(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """By task and metric; lm_eval names a metric with the filter that its answers went through, "none" if none."""
    values = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, answers = key.partition(",")
            if comma and isinstance(value, int | float) and math.isfinite(value):
                name = metric.replace("_stderr", " stderr")
                values[f"{task} {name}" + ("" if answers == "none" else f" ({answers})")] = float(value)
    return values
