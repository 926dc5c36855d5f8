"""Methods, strategies, trials, decisions, and the loop that tries them.

Knows: what is tried and what is kept. Refuses to know: files, printing, how a forward is made.

Neither this file nor what it imports imports PyTorch. The searches are in modules.search.search, layer by layer, and
modules.search.joint, by gradient on what modules.search.mixing mixes; merging without one is in modules.search.trial,
and, without a model in memory, in modules.search.rebuild.
"""
