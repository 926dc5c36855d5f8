"""When files of the hub are fetched and removed during a run.

Knows: which repositories a run needs, the bar, the one that comes ahead. Refuses to know: HTTP, what is in the files.
"""

from collections.abc import Iterable, Sequence

from tqdm import tqdm

from modules.checkpoints.hub import Job, Prefetcher, Repository, check_space
from modules.runtime import Console, counted


def fetch_now(console: Console, job: Job) -> None:
    """Fetch a job's files from the hub, if any are missing, and return when they are here. Raises ConfigError if the
    disk is too small, CheckpointError if they can't be had."""
    check_space([job], keep=True)
    with fetching(console, [job]) as prefetcher:
        prefetcher.wait(0)


def fetching(console: Console, jobs: Sequence[Job]) -> Prefetcher:
    """Jobs that are fetched one after another, each said and shown when it begins."""

    def begin(job: Job) -> tqdm:
        size = sum(job.sizes.values())
        console.timed(f"Downloading {job.name} ({counted(len(job.absent), 'file')}, {size / 1e9:.2f} GB)")
        return console.download(job.name, size)

    return Prefetcher(jobs, begin)


def remove_downloads(
    console: Console, repositories: Iterable[Repository | None], needed: Iterable[Repository | None] = ()
) -> None:
    """Remove from the hub's cache what this run has fetched of these, but for what is needed still."""
    folders = {repository.folder for repository in needed if repository}
    for repository in repositories:
        if repository is not None and repository.folder not in folders:
            try:
                repository.remove_fetched()
            except OSError as error:  # no reason to lose a merge
                console.warning(f"{repository.folder} could not be removed ({error.strerror})")
