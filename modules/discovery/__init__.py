"""A model's own phrases: what its texts over-use, contexts in which it says it, and how often it does.

Knows: words, frequencies, ranking, counting, wording. Refuses to know: models, tokenizers, how texts are drawn.
"""

from modules.discovery.contexts import Possible, listed_contexts, possible_contexts
from modules.discovery.finder import Finding, Findings, Text, find, share_of
from modules.discovery.human import HumanRates, human_rates
from modules.discovery.kept_texts import KeptTexts
from modules.discovery.matching import word_count
from modules.discovery.rates import Counts, counts
