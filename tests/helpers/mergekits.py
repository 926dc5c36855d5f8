"""mergekit, in an environment of its own: it is no part of the program, and may ask for other versions than it does."""

import subprocess
import sys
import sysconfig
from pathlib import Path


def install(folder: Path) -> Path:
    """The folder of mergekit's commands, after it was installed into an environment there, if it is not yet. What is
    installed here and suits it, PyTorch first of all, is taken from here. Raises CalledProcessError if pip can't get
    it."""
    commands = folder / "bin"
    if not (commands / "mergekit-yaml").exists():
        run(sys.executable, "-m", "venv", str(folder))
        place = {"base": str(folder), "platbase": str(folder)}
        own = Path(sysconfig.get_path("purelib", "venv", place))
        (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        run(str(commands / "pip"), "install", "--quiet", "mergekit")
    return commands


def run(*command: str) -> None:
    """Run a command; what it prints is in the error, if it fails."""
    subprocess.run(command, check=True, capture_output=True, text=True)
