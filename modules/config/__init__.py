"""The YAML file as a frozen dataclass.

Knows: every key, its type, its default and what is allowed; reports all errors of a file together.
Refuses to know: torch, models, tokenizers. It must answer a typo in under a second.
"""

from modules.config.apart import check_apart, input_paths, real_path
from modules.config.choices import ACCELERATORS, DEVICES, METHODS, NUMBERED, STRATEGIES
from modules.config.command_line import CONFIG, QUIET, SET
from modules.config.fields import COMPUTE_DTYPES, DTYPES, OneOf, is_number, unusable
from modules.config.load import load_config, output_directory
from modules.config.locations import (
    GGUF,
    Location,
    Source,
    missing_folder,
    names_folder,
    names_of,
    parse_location,
    parse_source,
    partial_of,
    parts_of,
    repositories_in,
    without_folders,
)
from modules.config.neutral_texts import read_neutral_texts
from modules.config.phrase_lists import PHRASES, Chat, Message, Pair
from modules.config.prompts import read_prompts
from modules.config.schema import NO_PART, TABLES, VERSION, Config, Directories, Discover, Joint, Mapper, Settings
