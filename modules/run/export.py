"""A recipe written as a file for mergekit, if its models are such that mergekit makes the same of them.

Knows: what mergekit does otherwise. Refuses to know: its YAML, how a merge is made.
"""

from collections.abc import Iterator

import torch

from modules.checkpoints.checkpoint import Checkpoint, load_tokenizer
from modules.checkpoints.lora import Adapted
from modules.checkpoints.open_models import Models
from modules.checkpoints.readers import dtype_name
from modules.config.inputs import check_apart, input_paths
from modules.config.locations import GGUF
from modules.model.arithmetic import Arithmetic
from modules.model.base_model import ResidentModel
from modules.model.embeddings import HeaderSkipped, matched_header
from modules.model.loading import ModelLoader
from modules.output.mergekit import Names, check_sums, mergekit_text
from modules.output.recipe import Recipe
from modules.output.text_files import check_file, write_text
from modules.run.replay import Replay, candidates_of, check_source, opened_with, recipe_of
from modules.run.steps import prepare_libraries
from modules.runtime.console import Console
from modules.runtime.errors import ConfigError


def export_mergekit(asked: Replay, console: Console) -> None:
    """Write what a recipe did as a file for mergekit. asked: its output is the file.

    Raises ConfigError for what mergekit can't be told, or would make something else of.
    """
    recipe = recipe_of(asked)
    check_file("--export-mergekit", asked.output, asked.overwrite)
    check_sums(recipe)
    config = opened_with(asked, recipe)
    prepare_libraries(config.random_seed)
    check_apart([asked.output], [asked.recipe, *input_paths(config)])
    loader = ModelLoader(config, console, compute=Arithmetic.named(recipe.dtype))
    models = loader.open()
    layout = loader.layout(models)
    saved = _saved(recipe, models)
    problems = [*_unfit_types(recipe, models, saved), *_unfit_models(recipe, models, layout)]
    if problems:
        raise ConfigError("mergekit can't reproduce this recipe exactly:", *problems)
    candidates = {source.number: _readable(one.where, one.checkpoint) for source, one in candidates_of(recipe, models)}
    names = Names(
        base=_readable(models.base_where, models.base),
        candidates=candidates,
        layers=len(layout.layers),
        layer=layout.layers_name.rpartition(".")[2],
        header=[*dict.fromkeys(filter(None, (*layout.header().tensors, layout.embedding_name, layout.head_name)))],
        dtype=saved[0],
    )
    write_text(asked.output, mergekit_text(recipe, names))
    console.final(f"Wrote {asked.output}; its first line is the mergekit command")


def _readable(where: str, checkpoint: Checkpoint) -> str:
    """Where mergekit finds a model: a GGUF file, as the folder that was made of it."""
    return str(checkpoint.path) if where.lower().endswith(GGUF) else where


def _saved(recipe: Recipe, models: Models) -> list[str]:
    """The types in which the output's weights are, by name."""
    if recipe.saved_dtype:
        return [recipe.saved_dtype]
    return sorted({dtype_name(info.dtype) for info in models.base.tensors.values() if info.dtype.is_floating_point})


def _unfit_types(recipe: Recipe, models: Models, saved: list[str]) -> Iterator[str]:
    """What is wrong with types: of what is written there can be one, and what is computed in must have room for all."""
    if len(saved) > 1:
        yield f"{models.base.name}: its tensors have several dtypes ({', '.join(saved)}), but mergekit writes only one"
    computed = Arithmetic.named(recipe.dtype).dtype
    checkpoints = [models.base, *(candidate.checkpoint for candidate in models.candidates)]
    stored = {info.dtype for one in checkpoints for info in one.tensors.values() if info.dtype.is_floating_point}
    for dtype in sorted({dtype_name(dtype) for dtype in stored} | set(saved)):
        # bfloat16 numbers are float16 numbers, but for those that a run's log counts.
        if torch.finfo(getattr(torch, dtype)).eps < torch.finfo(computed).eps:
            yield f"it was computed in {recipe.dtype}, which rounded {dtype} weights; mergekit would not round them"


def _unfit_models(recipe: Recipe, models: Models, layout: ResidentModel) -> Iterator[str]:
    """What is wrong with models: adapters, and headers whose rows are not merged one by one."""
    check_source(recipe.sources[0], models.base)
    for source, candidate in candidates_of(recipe, models):
        check_source(source, candidate.checkpoint)
        if isinstance(candidate.checkpoint, Adapted):
            yield f"{candidate.name} is an adapter, which mergekit applies differently; merge it with PEFT first"
        elif _takes_header(recipe, source.number, len(layout.layers)):
            tokenizer = load_tokenizer(models.base.path, models.base.companions)
            try:
                found = matched_header(layout, tokenizer, candidate)
            except HeaderSkipped as error:
                yield f"{error}; its embedding and LM head were not merged"
                continue
            if found.note:
                yield found.note
            elif len(found.matches) < layout.vocabulary:
                count = layout.vocabulary - len(found.matches)
                yield f"{candidate.name}: {count} rows of embedding and LM head have no token and stay the base's"


def _takes_header(recipe: Recipe, number: int, layers: int) -> bool:
    """Whether something of a candidate's header was merged."""
    if recipe.joint is None:
        return any(line.layer is None for line in recipe.accepted_of(number))
    column = [source.number for source in recipe.sources[1:]].index(number)
    return any(row[column] for row in recipe.joint.weights[layers:])
