"""What a run writes: journal, recipe, tables, pictures, model card, the output folder.

Knows: files and wording. Refuses to know: how anything was found.
"""

from modules.output.changes import compare_fingerprints, computed_in
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
from modules.output.journal import JournalCopy
from modules.output.mergekit import Names, about_digits, check_sums, mergekit_text
from modules.output.model_card import CARD_FILE, write_card
from modules.output.plots import MERGE_MAP_FILE, PHRASE_CHART_FILE, merge_map, phrase_chart
from modules.output.public import Public
from modules.output.recipe import Recipe, is_finished, located, read_outputs, read_recipe, rebuilt, write_recipe
from modules.output.records import JointStart, Sample, Settings, Source, rendered_in
from modules.output.run_record import RunRecord, begun_run
from modules.output.text_files import check_file, files_left, write_text
