"""About how long a planned search will take on this machine, from one timed forward of a few of the model's layers.

Knows: seconds, layers with made-up weights. Refuses to know: phrases, files, what is decided.
"""

import copy
import time

import torch
from transformers import PreTrainedModel

from modules.checkpoints.architecture import find_layers
from modules.run.plan import Plan
from modules.scoring.layout import NOT_TAKEN

TIMED_LAYERS = 2
# Forwards of a layer that one step of a joint search is worth: forward, once more for the gradient, twice backward.
FORWARDS_OF_A_STEP = 4
STEPS_BEFORE = 6  # that a joint search takes to find where it begins, and to check its gradient


def estimate_seconds(plan: Plan, module: PreTrainedModel) -> float | None:
    """About how long the forwards of a search take, without downloads, reading and saving. None if it can't be told.

    module: the base's, without weights.
    """
    longest = max(plan.packs)
    try:
        seconds = _seconds_of_a_layer(module, longest, plan)
    except NOT_TAKEN:  # the model's forward needs something else, or there is no memory for it
        return None
    config, count, layers = plan.config, len(plan.candidates), plan.sizes.layers
    tokens = sum(plan.packs) + plan.trial_tokens  # of a trial
    if plan.is_joint:
        searched = (config.joint.steps + STEPS_BEFORE) * FORWARDS_OF_A_STEP * layers * tokens
    else:
        searched = count * plan.forwards * tokens
    # Drift of the base and after each candidate; where candidates are scored whole, that of each and its phrases.
    measured = (count + 1) * plan.neutral_tokens
    measured += count * (plan.neutral_tokens + sum(plan.packs)) if config.baselines else 0
    return seconds / longest * (searched + measured * layers)


@torch.no_grad()
def _seconds_of_a_layer(module: PreTrainedModel, tokens: int, plan: Plan) -> float:
    """A forward of so many tokens through the first layers, for one of them."""
    module = copy.deepcopy(module)
    layers, few = find_layers(module)[1], module.base_model
    del layers[TIMED_LAYERS:]
    few.to(plan.arithmetic.dtype).to_empty(device=plan.device)
    for tensor in (*few.parameters(), *few.buffers()):
        tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    inputs = torch.zeros(1, tokens, dtype=torch.long, device=plan.device)
    few(inputs[:, :1], use_cache=False)  # what is only done the first time is not timed
    begin = time.perf_counter()
    few(inputs, use_cache=False)
    if plan.device.type != "cpu":  # there, work has only been begun when the call returns
        torch.accelerator.synchronize(plan.device)
    return (time.perf_counter() - begin) / len(layers)
