"""What strategy and device can be.

Knows: names, and the one line on each. Refuses to know: what they do. The search has a function for each of the names.
"""

# By name what it does, as default.yaml prints it.
STRATEGIES = {
    "cumulative": "take the ratio with the lowest total, if it is below the present one",
    "all_phrases": "only ratios that make no phrase worse and at least one better",
    "quantitive": "only ratios that improve at least strategy_threshold of all phrases; of those, the most improved",
}

# PyTorch's names of the devices beside the CPU, in the order in which `auto` takes them, and those of which there may
# be several. No other file has them.
ACCELERATORS = ("cuda", "xpu", "mps")
NUMBERED = ("cuda", "xpu")
DEVICES = "auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"
DEVICE_PATTERN = r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$"
