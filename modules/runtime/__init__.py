"""What every program needs: console, log, errors, interrupts, processes, exit codes.

Knows: terminals, signals, ranks. Refuses to know: models, configurations.
"""

from modules.runtime.arguments import Arguments
from modules.runtime.console import (
    LOGS,
    Console,
    Silent,
    Unlogged,
    coloured,
    hint,
    open_streams,
    say,
    visible,
)
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
from modules.runtime.exit_codes import exit_code, leave
from modules.runtime.imports import LOADING, importing
from modules.runtime.input_files import check_is_file, no_file, open_input
from modules.runtime.interrupts import postponed
from modules.runtime.ranks import Rank, find_rank, wait_for_the_leader
from modules.runtime.shortage import is_out_of_memory, within_memory
from modules.runtime.text import (
    CONTEXT_WIDTH,
    PHRASE_WIDTH,
    RAW_WIDTH,
    USED_WIDTH,
    columns,
    counted,
    duration,
    ended,
    fit,
    in_memory,
    on_disk,
    one_line,
    percent,
    row,
    shortened,
    spans,
)
