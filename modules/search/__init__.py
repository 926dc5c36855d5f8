"""Strategies, trials, decisions, and the two searches: layer by layer, and by gradient on a mix of all candidates.

Knows: what is tried and what is kept. Refuses to know: files, printing, how a forward is made.
"""
