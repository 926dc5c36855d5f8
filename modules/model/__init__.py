"""The resident base model: devices, placement, memory, layers, header, installing, saving.

Knows: torch modules. Refuses to know: phrases, scores, strategies.
"""

from modules.model.arithmetic import FALLBACK, Arithmetic, arithmetics
from modules.model.base_model import ResidentModel, is_finite
from modules.model.devices import (
    beside,
    follow,
    free_memory,
    present_devices,
    resolve_device,
    side_streams,
    wider,
    widest_float,
)
from modules.model.embeddings import (
    HeaderRows,
    HeaderSkipped,
    aligned_header,
    matched_header,
    own_header,
    untied_header,
)
from modules.model.loading import ModelLoader, release_memory, too_large_for
from modules.model.memory import (
    Memory,
    Sizes,
    free_on_accelerators,
    header_weights,
    placement_of,
    sizes_of,
    weights_of,
)
from modules.model.part import BLOCKS, Part, row_ranges
from modules.model.settings import Settings, settings_of
