"""What the program does, recorded before a change that shall change nothing, and compared after it.

    python tests/helpers/behaviour.py record before.json [--program FOLDER]
    python tests/helpers/behaviour.py compare before.json after.json

Knows: the command line, the files of an output. Refuses to know: modules/; so it records any version of the program.
A record has, of each of its configurations, the SHA-256 of every weight file, the decisions with their scores, and
the console's text without times and measured speeds.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

import tiny
import torch
from peft import LoraConfig, get_peft_model
from project import ROOT
from transformers import AutoModelForCausalLM, MixtralConfig

RATIOS = [0.2, 0.5, 0.9]
PASSED_OVER = ("Measured", "Time (estimate)", "Memory", "Disk", "Output directory")  # what no two runs print alike


# ---------------------------------------------------------------------------------------------------------------------
# The models, the same ones each time
# ---------------------------------------------------------------------------------------------------------------------


def make_models(place: Path) -> None:
    """A Llama with two candidates and an adapter, one in bfloat16, and a mixture of experts."""
    tokenizer = tiny.bpe_tokenizer()
    config = tiny.llama_config(len(tokenizer))
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 3}
    experts = MixtralConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16, **heads)
    for name, settings, dtype in (
        ("llama", config, torch.float32),
        ("half", config, torch.bfloat16),
        ("moe", experts, torch.float32),
    ):
        base = tiny.make_model(place / name, settings, tokenizer, dtype=dtype, shard="100KB")
        tiny.make_candidate(place / f"{name}-one", base, seed=1)
        tiny.make_candidate(place / f"{name}-two", base, seed=2)
    make_adapter(place / "llama-lora", place / "llama")


def make_adapter(folder: Path, base: Path) -> None:
    torch.manual_seed(3)
    settings = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The configurations
# ---------------------------------------------------------------------------------------------------------------------

MERGES = {
    "lerp, cumulative, headers": ("llama", ["one"], {"merge_method": "lerp"}),
    "slerp, all_phrases": ("llama", ["one"], {"merge_method": "slerp", "strategy": "all_phrases"}),
    "slice, quantitive": (
        "llama",
        ["one"],
        {"merge_method": "slice", "strategy": "quantitive", "strategy_threshold": 0.4},
    ),
    "cyclic and gradient, no headers": (
        "llama",
        ["one"],
        {"merge_method": ["cyclic", "gradient"], "merge_headers": False},
    ),
    "an adapter": ("llama", ["lora"], {}),
    "two candidates": ("llama", ["one", "two"], {"merge_method": ["lerp", "slerp"]}),
    "bfloat16": ("half", ["one"], {}),
    "auto_weights": ("llama", ["two"], {"auto_weights": True}),
    "a mixture of experts": ("moe", ["one"], {}),
}


def record(program: Path, place: Path) -> dict[str, object]:
    """Run everything; what came of it, by configuration."""
    make_models(place / "models")
    found = {}
    for name, (base, candidates, settings) in MERGES.items():
        folder = set_up(place / name.replace(" ", "-"), place / "models" / base, candidates, **settings)
        found[name] = outcome(folder, run(program, folder, "merge_monster.py", "--config", "my.yaml"))
        print(name, file=sys.stderr)
    found["a replay"] = replayed(program, place / "two-candidates")
    found["a mapper run"] = mapped(program, place / "two-candidates")
    base = place / "models/llama"
    found["a resume after a kill"] = resumed(program, set_up(place / "resumed", base, ["one", "two"]))
    folder = set_up(place / "processes", base, ["one"])
    found["two processes"] = outcome(folder, run(program, folder, "merge_monster.py", "--config", "my.yaml", ranks=2))
    return found


def set_up(folder: Path, base: Path, candidates: list[str], **settings: object) -> Path:
    folder.mkdir()
    models = [f"{base}-{name}" for name in candidates]
    settings = {"merge_ratios": RATIOS, **settings}
    tiny.write_config(folder / "my.yaml", base, models, "out", mapper={"max_depth": 3, "prob_min": 2.0}, **settings)
    return folder


def command(program: Path, script: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(program / script)]


def run(program: Path, folder: Path, script: str, *arguments: str, ranks: int = 1) -> list[str]:
    """The console's text. Raises CalledProcessError if the run fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    result = subprocess.run(
        [*command(program, script, ranks), *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    if result.returncode:
        print(result.stdout, result.stderr, file=sys.stderr)
        result.check_returncode()
    lines = (re.sub(r"^\d\d:\d\d:\d\d - ", "", line.rstrip()) for line in result.stdout.splitlines())
    lines = (re.sub(r"logs/\S+|\d+(\.\d+)? s(econds)?\b|/tmp/\S+", "...", line) for line in lines)
    return [line for line in lines if not line.startswith(PASSED_OVER)]


def replayed(program: Path, folder: Path) -> dict[str, object]:
    recipe = ("--replay", "out/merge_monster_recipe.json", "--output", "again", "--source", "../models")
    console = run(program, folder, "merge_monster.py", *recipe)
    return {"weights": weights(folder / "again"), "console": console}


def mapped(program: Path, folder: Path) -> dict[str, object]:
    console = run(
        program, folder, "monster_mapper.py", "--config", "my.yaml", "--json", "tree.json", "--yaml", "b.yaml"
    )
    tree = re.sub(r'"/tmp/[^"]*"', '"..."', (folder / "tree.json").read_text(encoding="utf-8"))
    suggestions = re.sub(r"/tmp/\S+", "...", (folder / "b.yaml").read_text(encoding="utf-8"))
    return {"tree": json.loads(tree), "suggestions": suggestions, "console": console}


def resumed(program: Path, folder: Path) -> dict[str, object]:
    """Killed after its third decision, wherever it then is; what the console says of that depends on the moment."""
    arguments = [*command(program, "merge_monster.py"), "--config", "my.yaml"]
    with subprocess.Popen(
        arguments, cwd=folder, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as child:
        journal = folder / "out.partial/merge_monster_journal.jsonl"
        while child.poll() is None and not (journal.exists() and journal.read_text().count('"decision"') >= 3):
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
    run(program, folder, "merge_monster.py", "--config", "my.yaml", "--resume")
    return {**outcome(folder, []), "console": None}


def outcome(folder: Path, console: list[str]) -> dict[str, object]:
    lines = (folder / "out/merge_monster_journal.jsonl").read_text(encoding="utf-8").splitlines()
    decisions = [entry | {"seconds": None} for entry in map(json.loads, lines) if entry["kind"] == "decision"]
    return {"weights": weights(folder / "out"), "decisions": decisions, "console": console}


def weights(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


# ---------------------------------------------------------------------------------------------------------------------
# Two records
# ---------------------------------------------------------------------------------------------------------------------


def differences(before: dict, after: dict) -> list[str]:
    """One line for everything that is not the same, console lines named one by one."""
    found = [f"{name}: in one record only" for name in before.keys() ^ after.keys()]
    for name in before.keys() & after.keys():
        for what in sorted(before[name].keys() | after[name].keys()):
            old, new = before[name].get(what), after[name].get(what)
            if old == new:
                continue
            if what == "console" and old and new:
                found += [f"{name}: - {line}" for line in old if line not in new]
                found += [f"{name}: + {line}" for line in new if line not in old]
            else:
                found.append(f"{name}: {what} differ")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--program", type=Path, default=ROOT, help="the folder of merge_monster.py")
    options = parser.parse_args()
    if options.action == "record":
        with tempfile.TemporaryDirectory() as place:
            found = record(options.program.resolve(), Path(place))
        options.files[0].write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
        return 0
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in options.files)
    found = differences(before, after)
    print("\n".join(found) if found else f"All {len(before)} configurations: the same.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
