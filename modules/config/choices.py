"""What merge_method, strategy and device can be.

Knows: names, and the one line on each. Refuses to know: what they do. The search has a function for each of the names.
"""

# By name what it does, as default.yaml prints it.
METHODS = {
    "lerp": "a straight mix of the two layers",
    "slerp": "a mix along the arc between them, which keeps their length",
    "slice": "the base's columns, a short blend, then the candidate's columns; the ratio is the candidate's part",
    "cyclic": "a band of the candidate's columns (15 %) at four fixed places; merge_ratios is not used",
    "gradient": "the candidate fades in up to a peak at 1 - ratio, then out again (45 % in all)",
}
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
