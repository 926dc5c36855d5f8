"""The header of a candidate in the base's order: its rows are matched token by token.

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

_NO_TOKENS = ("config.json", "generation_config.json")  # files without influence on tokens within one architecture
MIN_SHARED_TOKENS = 0.9  # share of the base's vocabulary that must match for headers to be merged at all


class HeaderSkipped(Exception):
    """A candidate's header can't be matched with the base's; the message says why."""


@dataclass(frozen=True)
class HeaderRows:
    """A candidate's header in the base's order, to be read some rows at a time."""

    candidate: Candidate
    sources: Mapping[str, str]  # tensor of the base's header -> the candidate's that is merged into it
    matches: Mapping[int, int]  # base row -> candidate row
    note: str | None = None  # a line about which rows were matched, and what a merge leaves out
    note_of_scores: str | None = None  # the same if the candidate is only scored, with `untied_header`
    own_head: str | None = None  # name of the candidate's head, if it is untied and the base's is tied

    @cached_property
    def _order(self) -> Tensor:
        """The candidate's row for each base row up to the last that has a match; -1 where there is none. (rows,)."""
        order = torch.full((max(self.matches) + 1,), -1)
        order[torch.tensor(list(self.matches))] = torch.tensor(list(self.matches.values()))
        return order

    def adopted(self, part: Part, first: int = 0) -> Tensors:
        """The candidate's rows for a part of the base's header. The part's own rows stay where there is no match.

        first: the header's row that the part begins with, if it has only some rows. Raises as `Part.adopt` and reading
        do.
        """
        read = (
            (name, self.read(name, torch.arange(first, first + len(base_tensor)), base_tensor.cpu))
            for name, base_tensor in part.tensors.items()
        )
        return part.adopt(read, self.candidate.name)

    def read(self, name: str, rows: Tensor, base_rows: Callable[[], Tensor] | None = None) -> Tensor:
        """The candidate's rows for some rows of one of the base's tensors: (rows, ...), on the CPU, as they are stored.

        rows: their numbers, (rows,), ascending. base_rows: makes the base's own, which stay where there is no match;
        not needed if all match. Raises CheckpointError if a file can't be read.
        """
        order = torch.where(rows < len(self._order), self._order[rows.clamp(max=len(self._order) - 1)], -1)
        is_matched = order >= 0
        candidate_rows = self.candidate.rows(self.sources[name], order[is_matched])
        if base_rows is None or bool(is_matched.all()):
            return candidate_rows
        own_rows = base_rows()
        merged_rows = own_rows.to(torch.promote_types(own_rows.dtype, candidate_rows.dtype), copy=True)
        merged_rows[is_matched] = candidate_rows.to(merged_rows.dtype)
        return merged_rows


def matched_header(model: ResidentModel, tokenizer: Any, candidate: Candidate, part: Part | None = None) -> HeaderRows:
    """A candidate's header, matched with the base's. tokenizer: the base's; part: the base's header, to be given by a
    thread that reads ahead. Raises HeaderSkipped if too few rows match, CheckpointError if a file can't be read."""
    part = part or model.header()
    sources = _sources(model, candidate, part)
    rows = min(tensor.shape[0] for tensor in part.tensors.values())
    candidate_rows = min(candidate.conversion.shape(source)[0] for source in sources.values())
    try:
        has_same_tokenizer = _same_files(model.checkpoint, candidate.checkpoint)
        candidate_tokenizer = tokenizer if has_same_tokenizer else load_tokenizer(*candidate.checkpoint.tokenizer_files)
    except ConfigError as error:
        raise HeaderSkipped(f"{error}, so none of the {rows} rows can be matched") from None
    base_tokens = _tokens(tokenizer, rows)
    candidate_tokens = _tokens(candidate_tokenizer, candidate_rows)
    # If one token of the base is both BOS and EOS, as in GPT-2, it is matched as EOS.
    roles = {tokenizer.bos_token: candidate_tokenizer.bos_token, tokenizer.eos_token: candidate_tokenizer.eos_token}
    roles = {token: counterpart for token, counterpart in roles.items() if token and counterpart}
    matches = match_rows(base_tokens, candidate_tokens, roles)
    token_count = len(set(base_tokens.values()))
    if len(matches) < MIN_SHARED_TOKENS * token_count:
        shared = f"{len(matches)} of the base's {token_count} tokens (at least {MIN_SHARED_TOKENS:.0%} required)"
        raise HeaderSkipped(f"{candidate.name} shares only {shared}")
    tying, own_head = _about_tying(model, candidate, part)
    header = HeaderRows(candidate, sources, matches, own_head=own_head)
    if base_tokens == candidate_tokens and rows == candidate_rows and tying is None:
        return header  # the headers agree row for row
    note = (
        "Embedding and LM head: "
        f"{_description(candidate.name, base_tokens, candidate_tokens, rows, candidate_rows, roles, matches)}"
    )
    full_note = f"{note}; {tying}" if tying else note
    score_note = full_note if own_head is None else f"{note}; its LM head is not tied"
    return replace(header, note=full_note, note_of_scores=score_note)


def own_header(model: ResidentModel) -> HeaderRows:
    """The base's header as its files have it, whatever has been merged into the model."""
    part = model.header()
    base = model.as_candidate()
    rows = max(tensor.shape[0] for tensor in part.tensors.values())
    return HeaderRows(base, _sources(model, base, part), {row: row for row in range(rows)})


def aligned_header(
    model: ResidentModel, tokenizer: Any, candidate: Candidate, part: Part | None = None
) -> tuple[Tensors, str | None]:
    """The candidate's header with its rows in the base's order, and a line about which rows were matched.

    tokenizer, part: see `matched_header`. Raises as that, and BrokenWeights if rows hold NaN or infinity.
    """
    part = part or model.header()
    header_rows = matched_header(model, tokenizer, candidate, part)
    return header_rows.adopted(part), header_rows.note


def untied_header(model: ResidentModel, tokenizer: Any, candidate: Candidate) -> tuple[Tensors, Tensors]:
    """The candidate's header as `aligned_header` gives it: one for where the embedding is read, one for the head.

    They differ if the candidate's head is untied and the base's is tied. Raises as `aligned_header`.
    """
    part = model.header()
    header_rows = matched_header(model, tokenizer, candidate)
    header = header_rows.adopted(part)
    if header_rows.own_head is None:
        return header, header
    return header, replace(
        header_rows, sources={**header_rows.sources, model.embedding_name: header_rows.own_head}
    ).adopted(part)


def match_rows(base: Mapping[str, int], candidate: Mapping[str, int], roles: Mapping[str, str]) -> dict[int, int]:
    """Row of `base` -> row of `candidate` that holds the same token.

    base, candidate: token string -> row. roles: token of the base -> the candidate's token of the same role (BOS, EOS),
    used if the candidate lacks the token itself. Tokens without a counterpart are absent from the result.
    """
    counterparts = ((row, token if token in candidate else roles.get(token)) for token, row in base.items())
    return {row: candidate[counterpart] for row, counterpart in counterparts if counterpart in candidate}


def _tokens(tokenizer: Any, rows: int) -> dict[str, int]:
    """The tokens of a tokenizer that a header of so many rows has room for, and their rows."""
    return {token: row for token, row in tokenizer.get_vocab().items() if row < rows}


def _description(
    name: str,
    base_tokens: Mapping[str, int],
    candidate_tokens: Mapping[str, int],
    rows: int,
    candidate_rows: int,
    roles: Mapping[str, str],
    matches: Mapping[int, int],
) -> str:
    """How many rows were matched, how, and what becomes of the others. name: the candidate's; base_tokens,
    candidate_tokens: token -> row; rows: of the base's header; roles, matches: see `match_rows`."""
    by_role = [
        f"{token} with {counterpart}"
        for token, counterpart in roles.items()
        if token in base_tokens and token not in candidate_tokens and counterpart in candidate_tokens
    ]
    moved = sum(row != candidate_row for row, candidate_row in matches.items())
    token_count = len(set(base_tokens.values()))
    lacking = token_count - len(matches)
    tokenless = rows - token_count
    added = len(set(candidate_tokens.values()) - set(matches.values()))
    text = f"{len(matches)} of {rows} rows matched by token"
    text += f", BOS or EOS by role ({', '.join(by_role)})" if by_role else ""
    text += f", {moved} of them at a different index" if moved else ""
    kept_counts = [f"{lacking} ({name} lacks their tokens)"] if lacking else []
    kept_counts += [f"{tokenless} (without a token)"] if tokenless else []
    text += f"; the base's rows stay: {' and '.join(kept_counts)}" if kept_counts else ""
    if added or candidate_rows != rows:
        text += f"; {name} has {candidate_rows} rows"
        text += f", {added} of them for tokens that the base lacks" if added else ""
    return text


def _same_files(base: Checkpoint, candidate: Checkpoint) -> bool:
    """Whether two models of one architecture have the same tokenizer files. Raises CheckpointError if a file can't be
    read."""
    (base_folder, base_files) = base.tokenizer_files
    (candidate_folder, candidate_files) = candidate.tokenizer_files
    sizes = {name: size for name, size in base_files.sizes.items() if name not in _NO_TOKENS}
    if sizes != {name: size for name, size in candidate_files.sizes.items() if name not in _NO_TOKENS}:
        return False
    return all(read_file(base_folder / name) == read_file(candidate_folder / name) for name in sizes)


def _sources(model: ResidentModel, candidate: Candidate, part: Part) -> dict[str, str]:
    """Tensor of the base's header -> the candidate's tensor that is merged into it. Raises HeaderSkipped.

    A candidate whose head is tied to its embedding may store only one of the two; that one is then used for both.
    """
    embedding = model.embedding_name
    head = model.head_name
    twins = {embedding: head, head: embedding} if ties_header(candidate.checkpoint.config) else {}
    sources = {}
    for name, base_tensor in part.tensors.items():
        source = name if name in candidate.conversion else twins.get(name)
        if source is None or source not in candidate.conversion:
            raise HeaderSkipped(f"{candidate.name} has no {name}")
        shape = candidate.conversion.shape(source)
        if shape[1:] != base_tensor.shape[1:] or 0 in shape:
            raise HeaderSkipped(
                f"{candidate.name}'s {source} has shape {shape}, the base's has {tuple(base_tensor.shape)}"
            )
        sources[name] = source
    return sources


def _about_tying(model: ResidentModel, candidate: Candidate, part: Part) -> tuple[str | None, str | None]:
    """A note on the candidate's head if one model's head is tied and the other's is not, else None; and the name of the
    candidate's head if only the base's is tied and the shapes of head and embedding agree, else None."""
    embedding = model.embedding_name
    head = model.head_name
    if head is None:
        return None, None
    base_has_own = head in part.tensors
    candidate_has_own = embedding in candidate.conversion and head in candidate.conversion
    if candidate_has_own and ties_header(candidate.checkpoint.config):
        # transformers ties such a model if, and only if, the two are equal. In .bin files they are.
        candidate_has_own = not torch.equal(*candidate.read([embedding, head]).values())
    if candidate_has_own and not base_has_own:
        same_shape = candidate.conversion.shape(head) == candidate.conversion.shape(embedding)
        note = f"the base ties its LM head to the embedding, so {candidate.name}'s own LM head is ignored"
        return note, head if same_shape else None
    if base_has_own and not candidate_has_own:
        return f"{candidate.name} ties its LM head to the embedding, which is merged into both of the base's", None
    return None, None
