"""The devices of this machine: their names, types, free memory and streams.

Knows: what is present on this machine. Refuses to know: models, what is computed.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import psutil
import torch

from modules.config.choices import ACCELERATORS, NUMBERED
from modules.runtime.distributed import Rank
from modules.runtime.errors import ConfigError
from modules.runtime.text import pluralize


def accelerators() -> list[torch.device]:
    """The devices of this machine beside the CPU, all of one kind."""
    current = torch.accelerator.current_accelerator(check_available=True)
    if current is None or current.type not in ACCELERATORS:
        return []
    return [torch.device(current.type, index) for index in range(torch.accelerator.device_count())]


def present_devices() -> list[str]:
    """The names of the devices of this machine."""
    return ["cpu", *(str(device) if device.type in NUMBERED else device.type for device in accelerators())]


def resolve_device(name: str) -> torch.device:
    """The torch device of a configured name. If it is absent, raises ConfigError, which names the present ones."""
    present = present_devices()
    first = next((device for device in present if device != "cpu"), "cpu")
    if name == "auto" or name == first.partition(":")[0]:
        name = first
    if name not in present:
        raise ConfigError(f"device: '{name}' is not available; this machine has {', '.join(present)}")
    return torch.device(name)


def leaves_choice(name: str) -> bool:
    """Whether a configured name may mean any of several devices."""
    return name == "auto" or name in ACCELERATORS


def own_device(name: str, rank: Rank) -> str:
    """The configured name of the device; if several processes have a GPU each, the name of this process's.

    Raises ConfigError if there are fewer GPUs than processes.
    """
    gpus = [device for device in present_devices() if device != "cpu"]
    if rank.local_world_size == 1 or not leaves_choice(name) or not gpus:
        return name
    if rank.local_rank >= len(gpus):
        raise ConfigError(
            f"{rank.local_world_size} processes for {pluralize(len(gpus), 'GPU')}; start at most one process per GPU"
        )
    return gpus[rank.local_rank]


def widest_float(device: torch.device) -> torch.dtype:
    """The widest type for sums on a device: float64, or float32 if it has no float64."""
    try:
        return torch.zeros((), dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32


def wider(dtype: torch.dtype, key: str = "compute_dtype") -> str:
    """Advice on values that are too large for a dtype. key: the setting that chooses the dtype."""
    # bfloat16 ends before float32
    wider_names = {torch.float16: "bfloat16+float32 or float32", torch.bfloat16: "float32"}
    if key == "dtype":
        wider_names[torch.float16] = "bfloat16 or float32"
    return f"set {key}: {wider_names[dtype]}" if dtype in wider_names else "no dtype can hold such values"


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device; None if it can't be asked."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    mem_get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    return mem_get_info(device)[0] if mem_get_info else None


def side_streams(devices: Iterable[torch.device]) -> list[torch.Stream]:
    """A stream on each device that can have several, for work beside the device's other work.

    To be made once: PyTorch keeps memory that is freed on a stream for that stream.
    """
    stream_devices = (device for device in devices if hasattr(torch.get_device_module(device), "Stream"))
    return [torch.Stream(device) for device in stream_devices if device.type != "cpu"]


@contextmanager
def beside(streams: Sequence[torch.Stream]) -> Iterator[None]:
    """Work that is begun within the block goes to these streams. If the block fails, they are waited for, so that the
    memory they copy from can be used again. Otherwise the block must see to it that its results are there."""
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(stream)
        try:
            yield
        except BaseException:
            for stream in streams:
                stream.synchronize()
            raise


def follow(streams: Iterable[torch.Stream]) -> None:
    """Let streams wait for the work given to their devices' present streams so far. The host does not wait."""
    for stream in streams:
        stream.wait_stream(torch.accelerator.current_stream(stream.device))
