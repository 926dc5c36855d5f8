"""What the model would say: the completion tree, its ranking, suggestions, the report.

Knows: branching, probabilities, wording. Refuses to know: merging, output folders.
"""

from modules.mapper.completion_tree import BeamSearch, CompletionTree, at_most
from modules.mapper.detokenize import Detokenizer
from modules.mapper.next_tokens import build_predictor
from modules.mapper.ranking import PhraseRank, rank_phrases
