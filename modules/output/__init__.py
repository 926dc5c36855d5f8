"""What a run writes: journal, recipe, tables, pictures, model card, the output folder.

Knows: files and wording. Refuses to know: how anything was found.
"""

from modules.output.card_settings import settings_file
from modules.output.changes import compare_fingerprints, rendered_in
from modules.output.comparison import comparison
from modules.output.folder import (
    SETTINGS_FILE,
    OutputFolder,
    Unfinished,
    check_output,
    locked_output,
    stamp,
    unfinished_output,
    what_stands,
    written_paths,
)
from modules.output.journal import JOURNAL_FILE, Journal, Line, read_journal
from modules.output.mergekit import Names, about_digits, check_sums, mergekit_text
from modules.output.model_card import CARD_FILE, write_card
from modules.output.plots import MERGE_MAP_FILE, PHRASE_CHART_FILE, merge_map, phrase_chart
from modules.output.recipe import (
    Recipe,
    find_source,
    folders_of,
    is_finished,
    read_outputs,
    read_recipe,
    write_recipe,
)
from modules.output.records import Sample, Source
from modules.output.run_record import RunRecord, begun_run
from modules.output.text_files import check_file, files_left, write_text
