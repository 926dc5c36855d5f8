"""Phrases to tokens to packs to log-probabilities, by whole forwards and tail forwards; drift, gradients and samples.

Knows: tokenizers, packs, the model's forward. Refuses to know: merging, strategies, what a score is good for.
"""

from modules.scoring.budget import LOGITS_ON_CPU, TOKENS, Budget, Packing, budget_of, layer_bytes, logits_bytes
from modules.scoring.chats import (
    CONTEXTS,
    Asked,
    Rendered,
    asked_of,
    chat_of,
    chats_of,
    check_refusals,
    has_template,
    render,
    with_texts,
    within_thoughts,
)
from modules.scoring.drift import Drift, DriftMeter
from modules.scoring.exactness import Plain
from modules.scoring.gradient import GradientPass, Outside
from modules.scoring.hidden_states import streamed
from modules.scoring.layout import NOT_TAKEN, attention_window, build_scorer, check_numbers, is_taken, score_once
from modules.scoring.narrowness import check_float16
from modules.scoring.objective import Objective, Penalty, Value
from modules.scoring.packing import LAYOUTS, Inputs, TokenTree, attention_mask, build_packs, depths, tree_mask
from modules.scoring.samples import SamplingParams, answers, empty_answers, same_length_batches, sample
from modules.scoring.scorer import Scorer, by_pair, of_pairs, of_variants, other_ways, spreads
from modules.scoring.tails import Trial
from modules.scoring.tokenization import (
    Encoded,
    Root,
    Window,
    doubled_tokens,
    doubtful_phrases,
    encode_contexts,
    encode_pair,
    encode_pairs,
    neutral_windows,
    spread,
)
