"""Scores models on tasks of lm_eval, the harness of EleutherAI
(https://github.com/EleutherAI/lm-evaluation-harness). The package is optional.

Knows: how lm_eval is called, the names of its results here. Refuses to know: what a task is.
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
    manager = _manager(config)
    unknown = [name for name in config.eval if not manager.match_tasks([name])]
    if unknown:
        hint = "; for your own tasks, set eval_path to their folder"
        if config.eval_path:
            hint = f", nor has {config.eval_path}"
        raise ConfigError(f"eval: lm_eval has no task {', '.join(unknown)}{hint}")


def base_on_tasks(context: Context, record: RunRecord) -> dict[str, float]:
    """The base's scores on the configured tasks, or those that an earlier run noted. The model is still the base."""
    noted = record.lines("tasks")
    if noted or not context.config.eval:
        return noted[0].metrics if noted else {}
    return record.note("tasks", metrics=score_on_tasks(context, "base")).metrics


def score_on_tasks(context: Context, name: str = "merge") -> dict[str, float]:
    """The present model's scores on the configured tasks: each metric, and its standard error. name: the model's.

    Empty, with a warning, if a task can't be run: that is no reason to lose a merge.
    """
    config = context.config
    console = context.console
    model = context.model
    if not config.eval:
        return {}
    console.timed(f"Scoring the {name} on {', '.join(config.eval)}")
    batch = 1 if model.device.type == "cpu" else "auto"
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), torch.random.fork_rng():
            harness = import_module("lm_eval.models.huggingface")
            wrapped = harness.HFLM(pretrained=model.module, tokenizer=context.tokenizer, batch_size=batch)
            tasks = {"tasks": list(config.eval), "task_manager": _manager(config), "log_samples": False}
            outcome = import_module("lm_eval").simple_evaluate(model=wrapped, **tasks)
    except Exception as error:  # of a task, of its data set, of the network
        if is_out_of_memory(error):
            raise
        console.warning(f"eval: {', '.join(config.eval)} can't be run: {first_line(error)}")
        return {}
    return _values(outcome["results"])


def _manager(config: Config) -> Any:
    """The manager that knows all tasks. Raises ConfigError if lm_eval is not installed."""
    try:
        import_module("lm_eval")
        return _tasks(config.eval_path)
    except ModuleNotFoundError as error:
        raise ConfigError(f"eval: the package {error.name} is not installed: pip install lm-eval") from None


@cache
def _tasks(folder: str | None) -> Any:
    """The tasks of lm_eval and of a folder. Cached: finding them takes seconds."""
    with redirect_stderr(io.StringIO()):
        return import_module("lm_eval.tasks").TaskManager(include_path=folder)


def _values(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The values by task and metric. lm_eval's key is the metric and the filter of its answers ("none": no filter)."""
    values = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if comma and isinstance(value, int | float) and math.isfinite(value):
                name = metric.replace("_stderr", " stderr")
                values[f"{task} {name}" + ("" if filter_name == "none" else f" ({filter_name})")] = float(value)
    return values
