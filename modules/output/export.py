"""Exports a recipe as a file for mergekit, if mergekit computes the same from its models.

Knows: what mergekit does differently. Refuses to know: its YAML, how a merge is made.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.checkpoint import Checkpoint, load_tokenizer
from modules.checkpoints.lora import Adapted
from modules.checkpoints.readers import dtype_name
from modules.model.arithmetic import Arithmetic
from modules.model.base_model import ResidentModel
from modules.model.embeddings import HeaderSkipped, matched_header
from modules.output.mergekit import Names, check_sums, mergekit_text
from modules.output.recipe import Recipe
from modules.output.records import Source
from modules.runtime.errors import ConfigError

Needed = Sequence[tuple[Source, Candidate]]  # the candidates with accepted merges


def exported(recipe: Recipe, base: Checkpoint, needed: Needed, layout: ResidentModel, names: Mapping[int, str]) -> str:
    """The file's text. layout: the base, maybe without weights. names: each model's name in the file, by its number.

    Raises ConfigError for what mergekit can't express, or would compute differently.
    """
    check_sums(recipe)
    saved = _saved_dtypes(recipe, base)
    problems = [*_unfit_types(recipe, base, needed, saved), *_unfit_models(recipe, base, needed, layout)]
    if problems:
        raise ConfigError("mergekit can't reproduce this recipe exactly:", *problems)
    model_names = Names(
        base=names[0],
        candidates={source.number: names[source.number] for source, _ in needed},
        layers=len(layout.layers),
        layer=layout.layers_name.rpartition(".")[2],
        header=[*dict.fromkeys(filter(None, (*layout.header().tensors, layout.embedding_name, layout.head_name)))],
        dtype=saved[0],
    )
    return mergekit_text(recipe, model_names)


def _saved_dtypes(recipe: Recipe, base: Checkpoint) -> list[str]:
    """The names of the dtypes of the output's weights."""
    if recipe.saved_dtype:
        return [recipe.saved_dtype]
    return sorted({dtype_name(info.dtype) for info in base.tensors.values() if info.dtype.is_floating_point})


def _unfit_types(recipe: Recipe, base: Checkpoint, needed: Needed, saved_dtypes: list[str]) -> Iterator[str]:
    """Problems with dtypes: mergekit writes only one, and that of the computation must hold all weights exactly."""
    if len(saved_dtypes) > 1:
        yield f"{base.name}: its tensors have several dtypes ({', '.join(saved_dtypes)}), but mergekit writes only one"
    compute_dtype = Arithmetic.named(recipe.dtype).dtype
    checkpoints = [base, *(candidate.checkpoint for _, candidate in needed)]
    stored_dtypes = {
        info.dtype for checkpoint in checkpoints for info in checkpoint.tensors.values() if info.dtype.is_floating_point
    }
    for dtype in sorted({dtype_name(dtype) for dtype in stored_dtypes} | set(saved_dtypes)):
        # bfloat16 numbers are float16 numbers, except for those that a run's log counts.
        if torch.finfo(getattr(torch, dtype)).eps < torch.finfo(compute_dtype).eps:
            yield f"it was computed in {recipe.dtype}, which rounded {dtype} weights; mergekit would not round them"


def _unfit_models(recipe: Recipe, base: Checkpoint, needed: Needed, layout: ResidentModel) -> Iterator[str]:
    """Problems with models: adapters, and headers whose rows are not merged one by one."""
    for source, candidate in needed:
        if isinstance(candidate.checkpoint, Adapted):
            yield f"{candidate.name} is an adapter, which mergekit applies differently; merge it with PEFT first"
        elif _takes_header(recipe, source.number, len(layout.layers)):
            tokenizer = load_tokenizer(base.path, base.companions)
            try:
                header = matched_header(layout, tokenizer, candidate)
            except HeaderSkipped as error:
                yield f"{error}; its embedding and LM head were not merged"
                continue
            if header.note:
                yield header.note
            elif len(header.matches) < layout.vocabulary:
                count = layout.vocabulary - len(header.matches)
                yield f"{candidate.name}: {count} rows of embedding and LM head have no token and stay the base's"


def _takes_header(recipe: Recipe, number: int, layers: int) -> bool:
    """Whether a candidate's header was merged."""
    if recipe.joint is None:
        return any(line.layer is None for line in recipe.accepted_of(number))
    column = [source.number for source in recipe.sources[1:]].index(number)
    return any(row[column] for row in recipe.joint.weights[layers:])
