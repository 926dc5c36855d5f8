"""Which device and type a model is computed on.

Knows: what is present on this machine. Refuses to know: models, memory.
"""

import torch

from modules.runtime import ConfigError, Rank


def present_devices() -> list[str]:
    """The names of the devices of this machine."""
    present = ["cpu"]
    if torch.cuda.is_available():
        present += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        present.append("mps")
    return present


def resolve_device(name: str) -> torch.device:
    """The torch device of a configured name. Raises ConfigError, naming those that are there, if it is absent."""
    present = present_devices()
    if name == "auto":
        name = next((other for other in present if other != "cpu"), "cpu")
    name = "cuda:0" if name == "cuda" else name
    if name not in present:
        raise ConfigError(f"device: '{name}' is not on this machine; there is {', '.join(present)}")
    return torch.device(name)


def own_device(name: str, rank: Rank) -> str:
    """The configured name of a device or, where several processes are to have one each, that of this process's.

    Raises ConfigError if there are fewer GPUs than processes.
    """
    gpus = [device for device in present_devices() if device.startswith("cuda")]
    if rank.local_world_size == 1 or name not in ("auto", "cuda") or not gpus:
        return name
    if rank.local_rank >= len(gpus):
        raise ConfigError(
            f"{rank.local_world_size} processes were started on a machine with {len(gpus)} GPUs; start as many as GPUs"
        )
    return gpus[rank.local_rank]


def resolve_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What to compute in. auto: the checkpoint's own half type on an accelerator (float16 unless it is bfloat16); on a
    CPU bfloat16 checkpoints in bfloat16, all others in float32, since float16 products are several times slower."""
    if name != "auto":
        return getattr(torch, name)
    if stored == torch.bfloat16:
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" else torch.float16


def wider(dtype: torch.dtype) -> str:
    """What to do about values that are too large for a dtype."""
    others = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}  # bfloat16 ends a little before float32
    return f"set dtype: {others[dtype]}" if dtype in others else "no dtype holds such values"
