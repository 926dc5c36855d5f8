"""Writes a recipe as a file for mergekit, on demand.

Knows: the order of the steps. Refuses to know: what mergekit can't express, its YAML.
"""

from modules.checkpoints.checkpoint import Checkpoint
from modules.config.inputs import check_apart, input_paths
from modules.config.locations import GGUF
from modules.model.arithmetic import Arithmetic
from modules.model.loading import ModelLoader
from modules.output.export import exported
from modules.output.mergekit import check_sums
from modules.output.text_files import check_file, write_text
from modules.run.replay import Replay, candidates_of, check_source, opened_with, recipe_of
from modules.run.steps import prepare_libraries
from modules.runtime.console import Console


def export_mergekit(request: Replay, console: Console) -> None:
    """Write a recipe's merge as a file for mergekit. request: its output is the file.

    Raises ConfigError for what mergekit can't express, or would compute differently.
    """
    recipe = recipe_of(request)
    check_file("--export-mergekit", request.output, request.overwrite)
    check_sums(recipe)
    config = opened_with(request, recipe)
    prepare_libraries(config.random_seed)
    check_apart([request.output], [request.recipe, *input_paths(config)])
    loader = ModelLoader(config, console, compute=Arithmetic.named(recipe.dtype))
    models = loader.open()
    needed = candidates_of(recipe, models)
    check_source(recipe.sources[0], models.base)
    names = {0: _readable(models.base_where, models.base)}
    for source, candidate in needed:
        check_source(source, candidate.checkpoint)
        names[source.number] = _readable(candidate.where, candidate.checkpoint)
    write_text(request.output, exported(recipe, models.base, needed, loader.layout(models), names))
    console.final(f"Wrote {request.output}; its first line is the mergekit command")


def _readable(where: str, checkpoint: Checkpoint) -> str:
    """Where mergekit finds a model. For a GGUF file this is the folder it was converted to."""
    return str(checkpoint.path) if where.lower().endswith(GGUF) else where
