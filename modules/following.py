"""The same merge in a process that does not lead: it searches along, and leaves printing and writing to the first one.

Knows: the order of the steps. Refuses to know: how any of them is done.
"""

from functools import partial

from modules.config import Config
from modules.console import Console
from modules.group import Group
from modules.hub import Ahead
from modules.journal import JournalCopy
from modules.opening import open_models
from modules.record import RunRecord
from modules.run import NOTHING_TO_SEARCH, Options, begin_download, begin_search, fetch_now, prepare_libraries


def follow_merge(config: Config, console: Console, options: Options, group: Group) -> None:
    """Search along from when the process that leads begins, until all candidates are searched.

    Raises as `merge_models` does, and ProcessLost when another process ends before its time.
    """
    prepare_libraries(config.random_seed)
    start = group.from_first()
    if start is NOTHING_TO_SEARCH:
        return
    models = open_models(config, partial(fetch_now, console))
    with Ahead(models.jobs, partial(begin_download, console)) as ahead:
        ahead.wait(0)
        record = RunRecord(JournalCopy(start.records), config)
        conductor = begin_search(config, console, models, record, ahead, start.budget, group)
        conductor.conduct(models.candidates)
