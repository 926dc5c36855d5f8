"""The conductors: merge, map, replay, export, score; the plan and its estimate.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""
