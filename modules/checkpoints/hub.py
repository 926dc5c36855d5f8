"""Models of the hub: found at one commit, small files first, weights when they are needed.

Knows: huggingface_hub, its cache, what can go wrong on the way. Refuses to know: what is in the files.

The token is the one that huggingface_hub finds (HF_TOKEN, or `hf auth login`), the cache its own (HF_HOME), and
HF_HUB_OFFLINE and HF_ENDPOINT mean what they mean there.
"""

import errno
import glob
import shutil
import time
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    constants,
    errors,
    get_cached_repo_tree,
    scan_cache_dir,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils import tqdm as HubBar
from tqdm import tqdm

from modules.checkpoints.bin_files import Forms
from modules.checkpoints.weight_files import is_there
from modules.config import Location
from modules.runtime import CheckpointError, ConfigError, first_line

PAUSES = (2.0, 10.0, 30.0, 120.0)  # seconds before a file whose download failed is asked for again
PARALLEL = 4  # files that are fetched at a time
TIMEOUT = 30.0  # seconds for the hub to say what a model consists of

Report = Callable[[int], Any]  # is told how many bytes have come


# Asking again changes nothing about these.
_FINAL = (
    errors.RepositoryNotFoundError,
    errors.RevisionNotFoundError,
    errors.RemoteEntryNotFoundError,
    errors.OfflineModeIsEnabled,
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG)


@dataclass(frozen=True, eq=False)
class Repository:
    """One model of the hub at one commit. Its folder, in the cache, has the files that were fetched so far."""

    location: Location
    folder: Path
    sizes: Mapping[str, int]  # of all files that can be had, in bytes
    fetched: set[str] = field(default_factory=set)  # what this run has put into the folder
    trouble: str | None = None  # why the hub can't be asked for more than is in the folder

    def absent(self, files: Iterable[str]) -> list[str]:
        """Those of the files that are not in the folder yet."""
        return [file for file in files if not is_there(self.folder / file)]

    def headers(self, files: Sequence[str]) -> dict[str, Forms]:
        """What is in safetensors files, of which only the headers are fetched. Raises ConfigError if they can't be."""

        def header(file: str) -> Forms:
            found = HfApi().parse_safetensors_file_metadata(self.location.repo, file, revision=self.folder.name)
            return {name: (info.dtype, tuple(info.shape)) for name, info in found.tensors.items()}

        try:
            with ThreadPoolExecutor(PARALLEL) as pool:
                return dict(zip(files, pool.map(header, files), strict=True))
        except Exception as error:  # whatever the network library raises
            raise ConfigError(f"{self.location.text}: {reason(self.location, error)}") from None

    def fetch(self, files: Iterable[str], report: Report) -> None:
        """Put files into the folder, several at a time; those that are there already are left alone.

        A connection that breaks is taken up where it broke; what can't be had is asked for again after a while. Raises
        CheckpointError if that does not help.
        """
        wanted, reported = self.absent(files), 0
        self.fetched.update(wanted)

        def count(received: int) -> None:
            nonlocal reported
            reported += received
            report(received)

        for pause in (*PAUSES, None):
            absent = self.absent(wanted)
            if not absent:
                return
            # What was reported of a file that broke off is reported again.
            count(sum(self.sizes.get(file, 0) for file in wanted if file not in absent) - reported)
            try:
                _snapshot(
                    self.location.repo, self.folder.name, absent, max_workers=PARALLEL, tqdm_class=_reporting(count)
                )
            except _Cancelled:
                raise
            except Exception as error:  # whatever the network library raises
                if pause is None or isinstance(error, _FINAL) or _is_of_the_disk(error):
                    what, why = (self.absent(absent) or absent)[0], reason(self.location, error)
                    raise CheckpointError(f"{self.location.text}: {what} can't be had: {why}") from None
                time.sleep(pause)

    def remove_fetched(self) -> None:
        """Remove from the cache what this run has put there, and nothing else."""
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
        for revision in (revision for repo in cache.repos for revision in repo.revisions):
            if revision.snapshot_path.resolve() == self.folder.resolve():
                names = {file: file.file_path.relative_to(revision.snapshot_path).as_posix() for file in revision.files}
                ours = [file for file, name in names.items() if name in self.fetched]
                all_ours = len(ours) == len(names)
                (cache.delete_revisions(revision.commit_hash) if all_ours else cache.delete_files(*ours)).execute()
        self.fetched.clear()


Choice = Callable[[Mapping[str, int]], list[str]]  # of all files of a model, with their sizes, some


def find(location: Location, wanted: Choice, welcome: Choice) -> Repository:
    """A model of the hub, some of its files fetched. wanted: those to fetch; welcome: those that are not missed where
    the hub can't be asked.

    What the cache has is taken where the hub can't be asked. Raises ConfigError if the cache has nothing either.
    """
    repo, revision = location.repo, location.revision
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        names = wanted(sizes) + welcome(sizes)
        new = {n for n in names if not isinstance(try_to_load_from_cache(repo, n, revision=info.sha), str)}
        return Repository(location, _snapshot(repo, revision, names), sizes, new)
    except Exception as error:  # whatever the network library raises
        trouble = reason(location, error)
    try:
        # Of an older cache nobody knows what is missing; of this one the first file that is.
        folder = _snapshot(repo, revision, ["config.json"], local_files_only=True)
        sizes = _cached_sizes(repo, folder)
    except Exception:  # not in the cache
        cache = constants.HF_HUB_CACHE
        raise ConfigError(f"{location.text}: no such folder, not in the hub's cache ({cache}), and {trouble}") from None
    missing = [name for name in wanted(sizes) if not is_there(folder / name)]
    if missing:
        raise ConfigError(f"{location.text}: {missing[0]} is not in the cache, and {trouble}")
    here = {name: size for name, size in sizes.items() if is_there(folder / name)}
    return Repository(location, folder, here, trouble=trouble)


def _snapshot(repo: str, revision: str | None, names: Iterable[str], **settings: Any) -> Path:
    """The folder of a repository at one revision in the cache, with these files in it."""
    patterns = [glob.escape(name) for name in names]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, **settings))


def _cached_sizes(repo: str, folder: Path) -> dict[str, int]:
    """All files of a repository as the cache remembers them or, if it does not, those that it has."""
    try:
        return {file.path: file.size for file in get_cached_repo_tree(repo, revision=folder.name)}
    except errors.CachedRepoTreeNotFoundError:
        return {
            file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()
        }


def reason(location: Location, error: BaseException) -> str:
    """Why a file of the hub can't be had, and what can be done about it."""
    page = f"{constants.ENDPOINT}/{location.repo}"
    log_in = "set HF_TOKEN or run 'hf auth login'"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: ask for access at {page}, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such model at {page}; if it is a private one, {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no revision '{location.revision}'"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        token = "; the token in HF_TOKEN may have expired" if error.response.status_code == 401 else ""
        return f"{page} answers {error.response.status_code} ({first_line(error)}){token}"
    if isinstance(error, errors.SafetensorsParsingError):
        return f"{page} has a weight file that is none ({first_line(error)})"
    if _is_of_the_disk(error):
        return f"it can't be stored in {constants.HF_HUB_CACHE} ({error.strerror})"
    return f"{page} can't be reached ({first_line(error)})"


def _is_of_the_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


class _Cancelled(Exception):
    """The run is over; what is still being fetched is not needed."""


def _reporting(report: Report) -> type[HubBar]:
    """A class for the bars of a snapshot's download, none of which is shown: the one for bytes on the disk reports."""

    class Reporting(HubBar):
        def __init__(self, *args: Any, **settings: Any) -> None:
            self._counts = settings.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**settings, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                report(int(n or 0))

    return Reporting


@dataclass(frozen=True)
class Job:
    """Files of a repository that will be needed together. Without a repository there is nothing to do."""

    name: str
    repository: Repository | None = None
    files: tuple[str, ...] = ()

    @property
    def absent(self) -> list[str]:
        """What is still to be fetched."""
        return self.repository.absent(self.files) if self.repository else []

    @property
    def sizes(self) -> dict[tuple[Path, str], int]:
        """The same with its sizes in bytes, by folder and name."""
        hub = self.repository
        return {(hub.folder, file): hub.sizes.get(file, 0) for file in self.absent} if hub else {}


class Prefetcher:
    """Does jobs in their order in the background, never more than one ahead of the one that is in use."""

    def __init__(self, jobs: Sequence[Job], begin: Callable[[Job], tqdm]) -> None:
        """begin: is called, in the caller's thread, when a job's download begins; returns a bar for its progress."""
        self._jobs, self._begin, self._bars = jobs, begin, ExitStack()
        self._downloads: dict[int, Future[None]] = {}
        self._pool = ThreadPoolExecutor()
        self._over = False

    def wait(self, number: int) -> None:
        """Return when a job is done, the next one begun. Raises CheckpointError if a file can't be had.

        What has failed hours ago, when it was not needed yet, is tried once more.
        """
        came_ahead = number in self._downloads
        try:
            self._finish(number)
        except CheckpointError:
            if not came_ahead:
                raise
            self._finish(number)
        self._start(number + 1)

    def _finish(self, number: int) -> None:
        self._start(number)
        if number in self._downloads:
            futures.wait([self._downloads[number]])
            self._bars.close()  # no other one is open
            self._downloads.pop(number).result()

    def _start(self, number: int) -> None:
        """Begin a job, if there is such a one and it has anything to do."""
        if number in self._downloads or number >= len(self._jobs) or not self._jobs[number].absent:
            return
        job = self._jobs[number]
        bar = self._bars.enter_context(self._begin(job))

        def checked(count: int) -> None:
            if self._over:
                raise _Cancelled
            bar.update(count)

        self._downloads[number] = self._pool.submit(job.repository.fetch, job.files, checked)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        futures.wait(self._downloads.values(), 1.0)  # time to remove what is half done
        self._pool.shutdown(wait=False)
        self._bars.close()


def bytes_needed(jobs: Sequence[Job], keep: bool) -> int:
    """What the jobs put on the cache's disk at a time; a file that several need counts once.

    Where downloads are not kept, these are there together: the first job's, one in use, the one after it, and what
    earlier ones share with later ones.
    """
    files = [job.sizes for job in jobs]
    if keep:
        return sum(ChainMap(*files).values())

    def at(number: int) -> int:
        later = ChainMap(*files[number:])
        shared = {file: size for file, size in ChainMap(*files[:number]).items() if file in later}
        return sum(ChainMap(files[0], *files[number : number + 2], shared).values())

    return max(at(number) for number in range(len(files)))


def cache_folder() -> Path:
    """Where the hub's files are kept, or the nearest folder above it that is there already."""
    return there_already(Path(constants.HF_HUB_CACHE).expanduser().resolve())


def there_already(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_space(jobs: Sequence[Job], keep: bool) -> None:
    """Raise ConfigError if the cache's disk is too small for the jobs."""
    needed, cache, free = bytes_needed(jobs, keep), constants.HF_HUB_CACHE, shutil.disk_usage(cache_folder()).free
    if needed > free:
        hint = "make room, or set HF_HOME to a folder on a larger disk"
        raise ConfigError(f"{needed / 1e9:.1f} GB are to be downloaded, {cache} has room for {free / 1e9:.1f}: {hint}")
