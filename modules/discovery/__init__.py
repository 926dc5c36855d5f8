"""What a model over-uses: the words and phrases of its samples, held against how often people write them.

Knows: words, phrases, frequencies, ranking. Refuses to know: models, tokenizers, how samples are drawn, phrase lists.
"""

from modules.discovery.finder import Finding, Findings, Text, find, share_of
from modules.discovery.human import HumanRates, human_rates
