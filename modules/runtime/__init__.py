"""What every program needs: console, log, errors, signals, processes, exit codes.

Knows: terminals, signals, ranks. Refuses to know: models, configurations.
"""

from modules.runtime.arguments import Arguments
from modules.runtime.console import (
    LOGS,
    Console,
    Unlogged,
    WorkerConsole,
    coloured,
    hint,
    open_streams,
    say,
    visible,
)
from modules.runtime.distributed import ALONE, Group, Rank, find_rank, joined, wait_for_main_process
from modules.runtime.errors import (
    BrokenWeights,
    CheckpointError,
    ConfigError,
    TooNarrow,
    first_line,
    naming,
    reading,
    without_panics,
)
from modules.runtime.input_files import check_is_file, no_file, open_input
from modules.runtime.oom import is_out_of_memory, retry_on_oom
from modules.runtime.program import LOADING, exit_code, importing, leave, postponed
from modules.runtime.text import (
    CONTEXT_WIDTH,
    PHRASE_WIDTH,
    RAW_WIDTH,
    USED_WIDTH,
    columns,
    duration,
    ended,
    fit,
    in_memory,
    on_disk,
    one_line,
    percent,
    pluralize,
    ranges,
    row,
    shortened,
    table,
)
