"""Model files: found, fetched, checked, read and written; adapters; candidates as streams of layers.

Knows: formats, the hub, tensor names. Refuses to know: devices, scores, merging.
"""

from modules.checkpoints.architecture import (
    find_layers,
    header_names,
    input_first_weights,
    with_buffers,
    without_weights,
)
from modules.checkpoints.candidate import Candidate
from modules.checkpoints.checkpoint import Checkpoint, copy_companions, load_tokenizer
from modules.checkpoints.companions import is_licence
from modules.checkpoints.conversion import Conversion, Tensors
from modules.checkpoints.downloads import fetch_now, fetching, remove_downloads
from modules.checkpoints.hub import Prefetcher, bytes_needed, cache_folder, check_space
from modules.checkpoints.lora import Adapted
from modules.checkpoints.meaning import layer_settings, ties_header
from modules.checkpoints.open_models import Models, candidate_sources, open_base, open_models
from modules.checkpoints.weight_files import TensorInfo, dtype_name, index_file, is_there, local_files, read_file
from modules.checkpoints.writing import NewWeights, written_name
