"""The header of a candidate, brought into the base's order: rows are matched token by token.

Knows: vocabularies, tied weights. Refuses to know: how rows are mixed, scores.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from modules.checkpoints.candidate import Candidate
from modules.checkpoints.checkpoint import Checkpoint, load_tokenizer
from modules.checkpoints.config_diff import ties_header
from modules.checkpoints.conversion import Tensors
from modules.checkpoints.weight_files import read_file
from modules.model.base_model import ResidentModel
from modules.model.part import Part
from modules.runtime.errors import ConfigError

_NO_TOKENS = ("config.json", "generation_config.json")  # files that decide on none within an architecture
MIN_SHARED_TOKENS = 0.9  # of the base's vocabulary, for the headers to be merged at all


class HeaderSkipped(Exception):
    """A candidate's header can't be matched with the base's; the message says why."""


@dataclass(frozen=True)
class HeaderRows:
    """A candidate's header, to be read some rows at a time, in the base's order."""

    candidate: Candidate
    sources: Mapping[str, str]  # tensor of the base's header -> the candidate's that is merged into it
    matches: Mapping[int, int]  # base row -> candidate row
    note: str | None = None  # a line about what had to be matched, and what a merge does without
    note_of_scores: str | None = None  # the same where the candidate is only scored, as `untied_header` has it
    own_head: str | None = None  # the candidate's head, if it has one of its own and the base has no place for it

    @cached_property
    def _order(self) -> Tensor:
        """The candidate's row for each of the base's up to the last that has one, -1 where there is none."""
        order = torch.full((max(self.matches) + 1,), -1)
        order[torch.tensor(list(self.matches))] = torch.tensor(list(self.matches.values()))
        return order

    def adopted(self, part: Part, first: int = 0) -> Tensors:
        """The rows for a part of the base's header, or for as many of its rows as the part has, from the first on. The
        part's own rows stay where there is no match. Raises as `Part.adopt` and reading do."""
        read = (
            (name, self.read(name, torch.arange(first, first + len(own)), own.cpu))
            for name, own in part.tensors.items()
        )
        return part.adopt(read, self.candidate.name)

    def read(self, name: str, rows: Tensor, own: Callable[[], Tensor] | None = None) -> Tensor:
        """Rows of one of the base's tensors by their numbers, (rows,), ascending: (rows, ...), on the CPU, as they are
        stored. own: makes the base's, which stay where there is no match; not needed if all have one.

        Raises CheckpointError if a file can't be read.
        """
        order = torch.where(rows < len(self._order), self._order[rows.clamp(max=len(self._order) - 1)], -1)
        matched = order >= 0
        theirs = self.candidate.rows(self.sources[name], order[matched])
        if own is None or bool(matched.all()):
            return theirs
        ours = own()
        found = ours.to(torch.promote_types(ours.dtype, theirs.dtype), copy=True)
        found[matched] = theirs.to(found.dtype)
        return found


def matched_header(model: ResidentModel, tokenizer: Any, candidate: Candidate, part: Part | None = None) -> HeaderRows:
    """A candidate's header, matched with the base's. tokenizer: the base's; part: its header, if it is read in a thread
    of its own. Raises HeaderSkipped if too few rows match, CheckpointError if a file can't be read."""
    part = part or model.header()
    sources = _sources(model, candidate, part)
    rows = min(tensor.shape[0] for tensor in part.tensors.values())
    their_rows = min(candidate.conversion.shape(source)[0] for source in sources.values())
    try:
        same = _same_files(model.checkpoint, candidate.checkpoint)
        other = tokenizer if same else load_tokenizer(*candidate.checkpoint.tokenizer_files)
    except ConfigError as error:
        raise HeaderSkipped(f"{error}, so none of the {rows} rows can be matched") from None
    ours = _tokens(tokenizer, rows)
    theirs = _tokens(other, their_rows)
    # Where one token of the base plays both parts, as in GPT-2, it is matched as the one that ends a text.
    roles = {tokenizer.bos_token: other.bos_token, tokenizer.eos_token: other.eos_token}
    roles = {token: part_played for token, part_played in roles.items() if token and part_played}
    matches = match_rows(ours, theirs, roles)
    known = len(set(ours.values()))
    if len(matches) < MIN_SHARED_TOKENS * known:
        shared = f"{len(matches)} of the base's {known} tokens (at least {MIN_SHARED_TOKENS:.0%} required)"
        raise HeaderSkipped(f"{candidate.name} shares only {shared}")
    tying, own_head = _about_tying(model, candidate, part)
    found = HeaderRows(candidate, sources, matches, own_head=own_head)
    if ours == theirs and rows == their_rows and tying is None:
        return found  # they are the same, row for row
    note = f"Embedding and LM head: {_description(candidate.name, ours, theirs, rows, their_rows, roles, matches)}"
    with_tying = f"{note}; {tying}" if tying else note
    of_scores = with_tying if own_head is None else f"{note}; its LM head is not tied"
    return replace(found, note=with_tying, note_of_scores=of_scores)


def own_header(model: ResidentModel) -> HeaderRows:
    """The base's header as its files have it, whatever has been merged into the model."""
    part = model.header()
    base = model.as_candidate()
    rows = max(tensor.shape[0] for tensor in part.tensors.values())
    return HeaderRows(base, _sources(model, base, part), {row: row for row in range(rows)})


def aligned_header(
    model: ResidentModel, tokenizer: Any, candidate: Candidate, part: Part | None = None
) -> tuple[Tensors, str | None]:
    """The candidate's header with its rows in the base's order, and a line about what had to be matched.

    tokenizer, part: see `matched_header`. Raises as that, and BrokenWeights if the rows are no numbers.
    """
    part = part or model.header()
    found = matched_header(model, tokenizer, candidate, part)
    return found.adopted(part), found.note


def untied_header(model: ResidentModel, tokenizer: Any, candidate: Candidate) -> tuple[Tensors, Tensors]:
    """The candidate's header as `aligned_header` has it, to be held where the embedding is read, and where the head is:
    two where the candidate has a head of its own and the base has not. Raises as that."""
    part = model.header()
    found = matched_header(model, tokenizer, candidate)
    header = found.adopted(part)
    if found.own_head is None:
        return header, header
    return header, replace(found, sources={**found.sources, model.embedding_name: found.own_head}).adopted(part)


def match_rows(base: Mapping[str, int], other: Mapping[str, int], roles: Mapping[str, str]) -> dict[int, int]:
    """Row of `base` -> row of `other` that holds the same token.

    base, other: token string -> row. roles: a token of the base -> the token that plays its part in the other (BOS,
    EOS), used where the other lacks the token itself. Tokens without a counterpart are absent from the result.
    """
    counterparts = ((row, token if token in other else roles.get(token)) for token, row in base.items())
    return {row: other[counterpart] for row, counterpart in counterparts if counterpart in other}


def _tokens(tokenizer: Any, rows: int) -> dict[str, int]:
    """The tokens of a tokenizer that a header of so many rows has room for, and their rows."""
    return {token: row for token, row in tokenizer.get_vocab().items() if row < rows}


def _description(
    name: str,
    ours: Mapping[str, int],
    theirs: Mapping[str, int],
    rows: int,
    their_rows: int,
    roles: Mapping[str, str],
    matches: Mapping[int, int],
) -> str:
    """How many rows were matched, how, and what becomes of the others. name: the candidate's; ours, theirs: token ->
    row; roles, matches: see `match_rows`."""
    by_role = [f"{a} with {b}" for a, b in roles.items() if a in ours and a not in theirs and b in theirs]
    moved = sum(row != other for row, other in matches.items())
    known = len(set(ours.values()))
    lacking = known - len(matches)
    nameless = rows - known
    added = len(set(theirs.values()) - set(matches.values()))
    text = f"{len(matches)} of {rows} rows matched by token"
    text += f", BOS or EOS by role ({', '.join(by_role)})" if by_role else ""
    text += f", {moved} of them at a different index" if moved else ""
    kept = [f"{lacking} ({name} lacks their tokens)"] if lacking else []
    kept += [f"{nameless} (without a token)"] if nameless else []
    text += f"; the base's rows stay: {' and '.join(kept)}" if kept else ""
    if added or their_rows != rows:
        text += f"; {name} has {their_rows} rows"
        text += f", {added} of them for tokens that the base lacks" if added else ""
    return text


def _same_files(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether the tokenizers of two models of one architecture are the same, file by file. Raises CheckpointError if a
    file can't be read."""
    (here, ours) = one.tokenizer_files
    (there, theirs) = other.tokenizer_files
    sizes = {name: size for name, size in ours.sizes.items() if name not in _NO_TOKENS}
    if sizes != {name: size for name, size in theirs.sizes.items() if name not in _NO_TOKENS}:
        return False
    return all(read_file(here / name) == read_file(there / name) for name in sizes)


def _sources(model: ResidentModel, candidate: Candidate, part: Part) -> dict[str, str]:
    """Tensor of the base's header -> the candidate's tensor that is merged into it. Raises HeaderSkipped.

    A candidate whose head is tied to its embedding may store only one of the two, which then stands for both.
    """
    embedding = model.embedding_name
    head = model.head_name
    twins = {embedding: head, head: embedding} if ties_header(candidate.checkpoint.config) else {}
    sources = {}
    for name, ours in part.tensors.items():
        source = name if name in candidate.conversion else twins.get(name)
        if source is None or source not in candidate.conversion:
            raise HeaderSkipped(f"{candidate.name} has no {name}")
        shape = candidate.conversion.shape(source)
        if shape[1:] != ours.shape[1:] or 0 in shape:
            raise HeaderSkipped(f"{candidate.name}'s {source} has shape {shape}, the base's has {tuple(ours.shape)}")
        sources[name] = source
    return sources


def _about_tying(model: ResidentModel, candidate: Candidate, part: Part) -> tuple[str | None, str | None]:
    """What becomes of the candidate's head where one model has a head of its own and the other has not; and, if it is
    the base that has not, the name of that head."""
    embedding = model.embedding_name
    head = model.head_name
    if head is None:
        return None, None
    ours_is_own = head in part.tensors
    theirs_is_own = embedding in candidate.conversion and head in candidate.conversion
    if theirs_is_own and ties_header(candidate.checkpoint.config):
        # As transformers has it: such a model is tied if, and only if, the two are equal. In .bin files they are.
        theirs_is_own = not torch.equal(*candidate.read([embedding, head]).values())
    if theirs_is_own and not ours_is_own:
        alike = candidate.conversion.shape(head) == candidate.conversion.shape(embedding)
        unused = f"the base ties its LM head to the embedding, so {candidate.name}'s own LM head is ignored"
        return unused, head if alike else None
    if ours_is_own and not theirs_is_own:
        return f"{candidate.name} ties its LM head to the embedding, which is merged into both of the base's", None
    return None, None
