"""How long something takes on this machine, where that is worth a line: on a CPU, where it may be minutes."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sculptor.planning.expected import Expected
from sculptor.planning.speeds import measure_speeds
from sculptor.world import here

# As fast as no CPU is: what is not worth a line then is not worth measuring the machine.
_FAST = {"tflops": 2.0, "float32": 2.0, "eigen": 0.01}
_SHORT = 20  # seconds
_WORTH = 120


def on_this_machine(
    expect: Callable[[Mapping[str, float]], Expected], device: torch.device, dtype: torch.dtype
) -> str | None:
    """What is expected at the speeds of this machine, as a line; None below two minutes, on a GPU, and of several processes.

    Args:
        expect: gives it at some speeds of `measure_speeds`.
        device: where.
        dtype: of most products.
    """
    if device.type != "cpu" or here().size > 1:
        return None
    speeds: Mapping[str, float] = _FAST
    for measured in (False, True):
        if measured:
            speeds, _ = measure_speeds({"tflops": None, "link": 1.0, "disk": 1.0}, device, True, Path(), dtype)
        found = expect(speeds)
        if found.total < (_WORTH if measured else _SHORT):
            return None
    return f"{found}, on this machine with nothing else to do"
