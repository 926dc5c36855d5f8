"""The values of strategy and device.

Knows: names, and one line on each. Refuses to know: what they do. The search has a function for each name.
"""

# By name, when a strategy accepts a merge; default.yaml prints it.
STRATEGIES = {
    "cumulative": "the total falls; the lowest wins",
    "all_phrases": "no pair gets worse; at least one improves",
    "quantitive": "at least strategy_threshold of all pairs improve",
}

# PyTorch's names of the devices beside the CPU, in the order of `auto`, and those that may have several devices. No
# other file has these names.
ACCELERATORS = ("cuda", "xpu", "mps")
NUMBERED = ("cuda", "xpu")
DEVICES = "auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"
DEVICE_PATTERN = r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$"
