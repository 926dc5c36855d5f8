"""Downloads files of the hub ahead of their use during a run, and removes them.

Knows: which files a run needs next, the bar, the disk. Refuses to know: HTTP, what is in the files.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir
from tqdm import tqdm

from modules.checkpoints.hub import Cancelled, Repository
from modules.runtime.console import Console
from modules.runtime.errors import ConfigError
from modules.runtime.text import on_disk, pluralize


@dataclass(frozen=True)
class Job:
    """Files of a repository that will be needed together."""

    name: str
    repository: Repository
    files: Sequence[str]

    @property
    def absent(self) -> list[str]:
        """The files that are still to be downloaded."""
        return self.repository.absent(self.files)

    @property
    def sizes(self) -> dict[tuple[Path, str], int]:
        """Sizes of these files in bytes, by folder and name."""
        return {(self.repository.folder, file): self.repository.sizes.get(file, 0) for file in self.absent}


class Prefetcher:
    """Downloads jobs in order in the background, at most one ahead of the job in use."""

    def __init__(self, jobs: Sequence[Job], begin: Callable[[Job], tqdm]) -> None:
        """begin: is called, in the caller's thread, when a job's download begins; returns a bar for its progress."""
        self._jobs = jobs
        self._begin = begin
        self._pool = ThreadPoolExecutor()
        self._bars = ExitStack()
        self._running: list[Future[None]] = []  # no more than one
        self._is_over = False

    def wait(self, number: int) -> None:
        """Return when a job is done and the next one has begun. Raises CheckpointError if a download fails."""
        self._finish()
        self._start(number)  # again, if it failed while it was not needed yet
        for download in self._finish():
            download.result()
        if number + 1 < len(self._jobs):
            self._start(number + 1)

    def _start(self, number: int) -> None:
        """Begin a job, unless all its files are there."""
        job = self._jobs[number]
        if not job.absent:
            return
        bar = self._bars.enter_context(self._begin(job))

        def report(count: int) -> None:
            if self._is_over:
                raise Cancelled
            bar.update(count)

        self._running.append(self._pool.submit(job.repository.fetch, job.files, report))

    def _finish(self) -> list[Future[None]]:
        """Wait until the running download has ended, successfully or not; returns it."""
        ended = self._running
        self._running = []
        futures.wait(ended)
        self._bars.close()
        return ended

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        futures.wait(self._running, 1.0)  # time to remove unfinished files
        self._pool.shutdown(wait=False)
        self._bars.close()


def fetch_now(console: Console, job: Job) -> None:
    """Download a job's missing files and return when all are there. Raises ConfigError if the disk is too small,
    CheckpointError if a download fails."""
    check_space([job])
    with fetching(console, [job]) as prefetcher:
        prefetcher.wait(0)


def fetching(console: Console, jobs: Sequence[Job]) -> Prefetcher:
    """A prefetcher of jobs that prints a line and shows a bar when each download begins."""

    def begin(job: Job) -> tqdm:
        size = sum(job.sizes.values())
        console.timed(f"Downloading {job.name} ({pluralize(len(job.absent), 'file')}, {on_disk(size)})")
        return console.download(job.name, size)

    return Prefetcher(jobs, begin)


def remove_downloads(console: Console, repositories: Iterable[Repository], needed: Iterable[Repository] = ()) -> None:
    """Remove these models from the hub's cache, but for those that were there before this run or are still needed."""
    downloaded = [repository for repository in repositories if repository.fetched and not repository.was_cached]
    downloaded_commits = {(repository.location.repo, repository.commit) for repository in downloaded}
    if not downloaded_commits:
        return
    kept_commits = {repository.commit for repository in needed}
    removable = set()
    cache = scan_cache_dir(constants.HF_HUB_CACHE)
    for repo in cache.repos:
        for revision in repo.revisions:
            is_ours = (repo.repo_id, revision.commit_hash) in downloaded_commits
            (removable if is_ours else kept_commits).add(revision.commit_hash)
    try:
        cache.delete_revisions(*(removable - kept_commits)).execute()
    except OSError as error:  # no reason to lose a merge
        console.warning(f"could not remove the downloads from {constants.HF_HUB_CACHE} ({error.strerror})")


def bytes_needed(jobs: Iterable[Job]) -> int:
    """Bytes that all jobs together write to the cache's disk; a file of several jobs counts once."""
    sizes: dict[tuple[Path, str], int] = {}
    for job in jobs:
        sizes |= job.sizes
    return sum(sizes.values())


def cache_folder() -> Path:
    """The folder of the hub's cache, or the nearest existing folder above it."""
    return nearest_folder(Path(constants.HF_HUB_CACHE).expanduser().resolve())


def nearest_folder(folder: Path) -> Path:
    """A folder, or the nearest existing one above it."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_space(jobs: Iterable[Job]) -> None:
    """Raise ConfigError if the cache's disk is too small for the jobs."""
    check_room(bytes_needed(jobs), Path(constants.HF_HUB_CACHE).expanduser().resolve(), "the downloads need")


def check_room(needed: int, folder: Path, purpose: str) -> None:
    """Raise ConfigError if the disk of a folder is too small. needed: in bytes. purpose: how the message begins."""
    free = shutil.disk_usage(nearest_folder(folder)).free
    if needed > free:
        sizes = f"{purpose} {on_disk(needed)}, but {folder} has {on_disk(free)} free"
        raise ConfigError(f"{sizes}; free some space, or set HF_HOME to a folder on a larger disk")
