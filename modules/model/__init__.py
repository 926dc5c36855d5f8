"""The resident base model: devices, placement, memory, layers, header, installing, saving.

Knows: torch modules. Refuses to know: phrases, scores, strategies.
"""
