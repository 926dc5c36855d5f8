"""The YAML file as a frozen dataclass.

Knows: every key, its type, its default and what is allowed; reports all errors of a file together.
Refuses to know: torch, models, tokenizers. It must answer a typo in under a second.
"""
