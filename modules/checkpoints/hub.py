"""A model's files, in a local folder or in the hub's cache: small ones first, weights when they are needed.

Knows: huggingface_hub, its cache, what can go wrong on the way. Refuses to know: what is in the files, when to fetch.

The token is the one that huggingface_hub finds (HF_TOKEN, or `hf auth login`), the cache its own (HF_HOME), and
HF_HUB_OFFLINE and HF_ENDPOINT mean what they mean there.
"""

import errno
import glob
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    errors,
    get_cached_repo_tree,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils import tqdm as HubBar

from modules.checkpoints.companions import licence_files, small_files
from modules.checkpoints.readers import Forms
from modules.checkpoints.weight_files import is_there, local_files
from modules.config.locations import Location
from modules.runtime.errors import CheckpointError, ConfigError, first_line
from modules.runtime.text import pluralize

PAUSES = (2.0, 10.0, 30.0, 120.0)  # seconds before a file whose download failed is asked for again
PARALLEL = 4  # files that are fetched at a time
TIMEOUT = 30.0  # seconds for the hub to say what a model consists of

Report = Callable[[int], Any]  # is called with the number of bytes that were downloaded

# Errors that a retry does not mend.
_FINAL = (
    errors.RepositoryNotFoundError,
    errors.RevisionNotFoundError,
    errors.RemoteEntryNotFoundError,
    errors.OfflineModeIsEnabled,
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG)


class Cancelled(Exception):
    """Raised by a report when the run is over: ends a download that is no longer needed."""


@dataclass(frozen=True, eq=False)
class Repository:
    """A model's files: in a local folder, or at one commit of the hub, in the folder of the cache."""

    location: Location
    folder: Path
    sizes: Mapping[str, int]  # of all files, also those to be downloaded, in bytes
    commit: str = ""  # of the hub's
    trouble: str = ""  # why the hub can't be reached
    was_cached: bool = True  # whether the folder held files before this run
    fetched: set[str] = field(default_factory=set)  # files that this run has downloaded
    is_new: bool = False  # whether this run has made the folder from a GGUF file
    notes: Sequence[str] = ()  # lines for the person at the terminal
    warnings: Sequence[str] = ()  # lines about what may be wrong with the files

    @property
    def text(self) -> str:
        """As the configuration names it."""
        return self.location.text

    @property
    def where(self) -> str:
        """The id on the hub with its commit, or the absolute path."""
        if self.commit:
            return f"{self.location.repo}@{self.commit}"
        return str((self.location.folder or self.folder).resolve())

    @property
    def written(self) -> list[str]:
        """A line about the files that this run has written to the disk, if any."""
        if self.is_new:
            return [f"{self.folder}, converted from GGUF"]
        return [f"{pluralize(len(self.fetched), 'file')} of {self.text} in the hub's cache"] if self.fetched else []

    def same_as(self, other: "Repository") -> bool:
        """Whether both are the same files: one folder, or one commit under two ids of the hub."""
        if self.commit and other.commit:
            return self.commit == other.commit
        return self.folder.resolve() == other.folder.resolve()

    def absent(self, files: Iterable[str]) -> list[str]:
        """Those of the files that are not in the folder yet."""
        return [file for file in files if not is_there(self.folder / file)] if self.commit else []

    def headers(self, files: Sequence[str]) -> dict[str, Forms]:
        """The tensors' dtypes and shapes by file: downloads only headers of safetensors files. Raises ConfigError on
        failure."""

        def header(file: str) -> Forms:
            metadata = HfApi().parse_safetensors_file_metadata(self.location.repo, file, revision=self.commit)
            return {name: (info.dtype, info.shape) for name, info in metadata.tensors.items()}

        try:
            with ThreadPoolExecutor(PARALLEL) as pool:
                return dict(zip(files, pool.map(header, files), strict=True))
        except Exception as error:  # whatever the network library raises
            raise ConfigError(f"{self.text}: {reason(self.location, error)}") from None

    def fetch(self, files: Iterable[str], report: Report) -> None:
        """Download files into the folder, several at a time, but for those that are there already.

        A failed download is tried again after a pause. Raises CheckpointError if it keeps failing.
        """
        absent_files = self.absent(files)
        self.fetched.update(absent_files)
        for pause in (*PAUSES, None):
            try:
                _snapshot(
                    self.location.repo, self.commit, absent_files, max_workers=PARALLEL, tqdm_class=reporting(report)
                )
                return
            except Cancelled:
                raise
            except Exception as error:  # whatever the network library raises
                if pause is None or isinstance(error, _FINAL) or _is_of_the_disk(error):
                    missing = (self.absent(absent_files) or absent_files)[0]
                    raise CheckpointError(
                        f"{self.text}: can't download {missing}: {reason(self.location, error)}"
                    ) from None
                time.sleep(pause)


def local(location: Location, folder: Path, **fields: Any) -> Repository:
    """The files of a local folder. fields: see `Repository`. Raises CheckpointError if it can't be read."""
    sizes = {name: (folder / name).stat().st_size for name in local_files(folder)}
    return Repository(location, folder, sizes, **fields)


def find(location: Location) -> Repository:
    """A model of the hub; downloads its small files.

    If the hub can't be reached, takes the model from the cache. Raises ConfigError if the cache lacks it too.
    """
    try:
        return _from_hub(location)
    except Exception as error:  # whatever the network library raises
        trouble = reason(location, error)
    return _from_cache(location, trouble)


def _from_hub(location: Location) -> Repository:
    repo = location.repo
    info = HfApi().model_info(repo, revision=location.revision, files_metadata=True, timeout=TIMEOUT)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    cached = {name for name in sizes if isinstance(try_to_load_from_cache(repo, name, revision=info.sha), str)}
    names = small_files(sizes) + licence_files(sizes)
    folder = _snapshot(repo, location.revision, names)  # the revision's name finds it again without the hub
    note = f"{location.text} is at commit {folder.name}"
    downloaded = set(names) - cached
    return Repository(location, folder, sizes, folder.name, was_cached=bool(cached), fetched=downloaded, notes=[note])


def _from_cache(location: Location, trouble: str) -> Repository:
    """A model's files in the cache, since the hub can't be reached. trouble: why not."""
    try:
        # Older caches do not list a repository's files; a newer one raises if the first file is missing.
        folder = _snapshot(location.repo, location.revision, ["config.json"], local_files_only=True)
        sizes = _cached_sizes(location.repo, folder)
    except Exception:  # not in the cache
        cache = constants.HF_HUB_CACHE
        raise ConfigError(f"{location.text}: no such folder, not in the hub's cache ({cache}), and {trouble}") from None
    missing = [name for name in small_files(sizes) if not is_there(folder / name)]
    if missing:
        raise ConfigError(f"{location.text}: {missing[0]} is not in the cache, and {trouble}")
    sizes = {name: size for name, size in sizes.items() if is_there(folder / name)}
    note = f"{location.text} is at commit {folder.name}; using the cached copy, because {trouble}"
    return Repository(location, folder, sizes, folder.name, trouble, notes=[note])


def _snapshot(repo: str, revision: str | None, names: Iterable[str], **settings: Any) -> Path:
    """The folder of a repository at one revision in the cache, with these files in it."""
    patterns = [glob.escape(name) for name in names]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, **settings))


def _cached_sizes(repo: str, folder: Path) -> dict[str, int]:
    """Sizes of all files of a repository, if the cache has their list, else of those that it holds."""
    try:
        return {file.path: file.size for file in get_cached_repo_tree(repo, revision=folder.name)}
    except errors.CachedRepoTreeNotFoundError:
        files = [file for file in folder.rglob("*") if file.is_file()]
        return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def reason(location: Location, error: BaseException) -> str:
    """Why a file of the hub can't be downloaded, and what the user can do about it."""
    page = f"{constants.ENDPOINT}/{location.repo}"
    log_in = "set HF_TOKEN or run 'hf auth login'"
    if isinstance(error, errors.GatedRepoError):
        return f"the model is gated; request access at {page}, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{page} does not exist; if the model is private, {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no revision '{location.revision}'"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return f"{page} returned HTTP {error.response.status_code} ({first_line(error)})"
    if isinstance(error, errors.SafetensorsParsingError):
        return f"{page} has an invalid weight file ({first_line(error)})"
    if _is_of_the_disk(error):
        return f"it can't be written to {constants.HF_HUB_CACHE} ({error.strerror})"
    return f"{page} can't be reached ({first_line(error)})"


def _is_of_the_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


def reporting(report: Report) -> type[HubBar]:
    """A class for the progress bars of snapshot_download. None is shown; the one that counts bytes calls report."""

    class Reporting(HubBar):
        def __init__(self, *args: Any, **settings: Any) -> None:
            self._counts_bytes = settings.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**settings, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts_bytes:
                report(int(n or 0))

    return Reporting
