import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Hashable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of this process and of every program that a test starts: two that share two cores only wait for each other's threads.
os.environ["OMP_NUM_THREADS"] = "1"
# Code from checkpoints is copied here before it is imported; two processes of tests must not share the copies.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules-")
# What models have answered is kept here: no test may find what another run has left.
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp(prefix="assets-")
sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import torch
import transformers
from hypothesis import settings

from modules.scoring.template_child import outcomes

pytest.register_assert_rewrite("broken_runs", "completions", "runs", "whole")  # what they find wrong is shown as well
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


def pytest_configure(config):
    """Where slow tests are left out, so are most generated inputs."""
    settings.register_profile("all", max_examples=100)
    settings.register_profile("some", max_examples=5)
    settings.load_profile("some" if "not slow" in config.getoption("markexpr") else "all")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The cases that `sampled` leaves out of the default run are slow."""
    seen = Counter()
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is not None and seen[item.function] % sampled.args[0]:
            item.add_marker("slow")
        seen[item.function] += 1


@pytest.fixture(autouse=True, scope="session")
def heard_signals():
    """Signals that a shell has the tests ignore, as it does in the background, are none to the programs they start."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ignored = [
        number for number in (getattr(signal, name) for name in names) if signal.getsignal(number) == signal.SIG_IGN
    ]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only wait for a second thread, and sums do not depend on the number of cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_pictures():
    """Drawing takes longer than merging models this small. Tests of pictures call the real functions, or start the
    program in another process, which draws."""

    def write_nothing(_recipe, file):
        file.write_bytes(b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modules.run.steps.merge_map", write_nothing)
        patch.setattr("modules.run.steps.phrase_chart", write_nothing)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_children():
    """Chat templates are rendered in this process: a child takes most of a second. Tests of it call the real function,
    or start the program in another process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modules.scoring.chats.in_child", lambda request: list(outcomes(request)))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two candidates, float32. A test file may have others of this name."""
    from runs import make_models

    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def asked(request):
    """Every value that a test of this module takes as its parameter in this session."""
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    return {value for item in items for value in item.callspec.params.values() if isinstance(value, Hashable)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of its own to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
