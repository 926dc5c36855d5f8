"""What merge_method, strategy and device can be.

Knows: names, and the one line on each. Refuses to know: what they do. The search registers its functions here, each
where it is written, so these are filled once modules.search has been imported.
"""

METHODS: dict[str, str] = {}  # name -> what it does, as default.yaml prints it
STRATEGIES: dict[str, str] = {}

# PyTorch's names of the devices beside the CPU, in the order in which `auto` takes them, and those of which there may
# be several. No other file has them.
ACCELERATORS = ("cuda", "xpu", "mps")
NUMBERED = ("cuda", "xpu")
DEVICES = "auto, cpu, cuda, cuda:N, xpu, xpu:N or mps"
DEVICE_PATTERN = r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$"
