"""What the model would say: the completion tree, its ranking, suggestions, the report.

Knows: branching, probabilities, wording. Refuses to know: merging, output folders.
"""

from modules.mapper.completion_tree import CompletionTree, Explorer, at_most
from modules.mapper.detokenize import Spelling
from modules.mapper.next_tokens import build_continuation
from modules.mapper.ranking import PhraseRank, rank_phrases
