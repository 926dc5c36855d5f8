"""The YAML file as a frozen dataclass.

Knows: every key, its type, its default and what is allowed; reports all errors of a file together.
Refuses to know: torch, models, tokenizers. It must answer a typo in under a second.
"""

from modules.config.errors import CheckpointError, ConfigError
from modules.config.fields import DEVICES, DTYPES, METHODS, ON_ERROR, STRATEGIES, is_number, unusable
from modules.config.load import load_config, output_directory
from modules.config.phrase_lists import PHRASE_KEYS, Pair, shortened
from modules.config.schema import CONFIG_KEYS, NO_PART, TABLES, VERSION, Config, Directories, Mapper
