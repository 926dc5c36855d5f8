"""What strategy and device can be.

Knows: names, and the one line on each. Refuses to know: what they do. The search has a function for each of the names.
"""

# By name when it accepts a merge, as default.yaml prints it.
STRATEGIES = {
    "cumulative": "the total falls; the lowest wins",
    "all_phrases": "no pair gets worse; at least one improves",
    "quantitive": "at least strategy_threshold of all pairs improve",
}

# PyTorch's names of the devices beside the CPU, in the order in which `auto` takes them, and those of which there may
# be several. No other file has them.
ACCELERATORS = ("cuda", "xpu", "mps")
NUMBERED = ("cuda", "xpu")
DEVICES = "auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"
DEVICE_PATTERN = r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$"
