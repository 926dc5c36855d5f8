"""The conductors: merge, map, replay, export, score; the plan and its estimate.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

from modules.run.export import export_mergekit
from modules.run.map import Exports, check_exports, map_model
from modules.run.merge import Options, merge_as_worker, merge_models
from modules.run.replay import Replay, replay_recipe
from modules.run.score import score_models
