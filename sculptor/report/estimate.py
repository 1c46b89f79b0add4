"""What `sculptor estimate` prints."""

from collections.abc import Callable, Mapping

from sculptor.jobs.estimate_report import Estimate
from sculptor.planning.placement import remedy
from sculptor.planning.shares import Share
from sculptor.report.data import data_text
from sculptor.report.text import size, table

_RANKS = 8  # columns of a table that are read


def estimate_text(found: Estimate, components: bool = False) -> str:
    """Memory, by component if asked for, then time and a verdict, for each mode."""
    where = "GPU" if found.kind == "cuda" else "CPU"
    lines = [
        f"{found.model}",
        f"{_count(found.num_parameters)} parameters, {_count(found.num_trainable)} of them free; {found.tokens:,} tokens per step, "
        f"micro-batches: {found.micro_batches}.",
        *_data(found),
        *_processes(found),
        f"{where}: {size(int(found.device_memory))} free; host: {size(int(found.host_memory))} free.",
        "",
        _memory(found, components),
        *_shares(found),
        "",
        _times(found),
        "",
        "; ".join(
            _speed(found, *item) for item in (("tflops", "TFLOP/s"), ("link", "GB/s link"), ("disk", "GB/s disk"))
        )
        + ".",
        f"Archive ({found.basis}): {size(found.archive_bytes)}; up to {_duration(found.analysis_seconds)} of decompositions "
        + ("after the passes over text that it measures." if found.basis in ("inputs", "curvature") else "to make it."),
    ]
    if found.chosen is None:
        lacking = {name: mode.shortages for name, mode in found.modes.items()}
        lines.append(f"Verdict: does not fit here; {remedy(lacking)}.")
        lines += [f"  {name} needs {', '.join(map(str, short))}" for name, short in lacking.items()]
    else:
        mode = found.modes[found.chosen]
        option = "--offload" if found.gpus == 1 else "--parallel"
        lines.append(
            f"Verdict: {option} auto picks {found.chosen}; about {found.tokens / mode.step:,.0f} tokens/s, bound by "
            f"{mode.bound}."
        )
    if found.expected is not None:
        lines.append(f"{str(found.expected).capitalize()}, by `sculptor train` with nothing else said.")
    if found.data is not None:
        lines += ["", data_text(found.data)]
    return "\n".join(lines)


def _data(found: Estimate) -> list[str]:
    if found.data is None:
        return []
    return [
        f"{found.data.num_examples:,} examples of up to {found.data.longest:,} tokens: {found.steps:,} steps per epoch, by default "
        f"{found.total:,} in all. Memory is for the longest."
    ]


def _processes(found: Estimate) -> list[str]:
    if found.gpus == 1:
        return []
    holding = " (replicate), or its share of them (shard)" if len(found.modes) > 2 else ""
    holding = ", which they divide" if "replicate" not in found.modes else holding
    return [
        f"{found.gpus} GPUs, each with its part of the rows and all matrices{holding}. Memory and bytes are those of the "
        "process with most."
    ]


def _shares(found: Estimate) -> list[str]:
    """What each process holds of matrices, where that is divided; of many, the least and the most."""
    divided = next((mode.plan.shares for mode in found.modes.values() if mode.plan.shares), ())
    if not divided:
        return []
    ranked = sorted(range(len(divided)), key=lambda rank: divided[rank].num_bytes)
    shown = range(len(divided)) if len(divided) <= _RANKS else (ranked[0], ranked[-1])
    parts: dict[str, Callable[[Share], float]] = {
        "weights": lambda share: share.weights,
        "pristine weights": lambda share: share.pristine,
        "bases": lambda share: share.bases,
        "coordinates, gradients, AdamW": lambda share: share.state,
        "in all": lambda share: share.num_bytes,
    }
    rows = [[name, *(size(int(of(divided[rank]))) for rank in shown)] for name, of in parts.items()]
    return ["", table(["held by rank, divided", *map(str, shown)], rows)]


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _memory(found: Estimate, components: bool) -> str:
    rows = []
    for place in ("device", "host", "disk"):
        parts: dict[str, dict[str, float]] = {}
        for name, mode in found.modes.items():
            held: Mapping[str, float] = getattr(mode.plan, place)
            for component, num_bytes in held.items():
                parts.setdefault(component, {})[name] = num_bytes
        if components:
            rows += [[f"{place}: {part}", *_cells(sizes, found)] for part, sizes in parts.items()]
        totals = {name: sum(getattr(mode.plan, place).values()) for name, mode in found.modes.items()}
        rows.append([f"{place}, in all", *_cells(totals, found)])
    return table(["memory", *found.modes], rows)


def _cells(sizes: Mapping[str, float], found: Estimate) -> list[str]:
    return [size(int(sizes[name])) if sizes.get(name) else "-" for name in found.modes]


def _times(found: Estimate) -> str:
    modes = found.modes.values()
    rows = [
        ["compute", *(f"{mode.compute:.2f} s" for mode in modes)],
        ["link", *(f"{mode.link:.2f} s" if mode.link else "-" for mode in modes)],
        *([["bytes from others", *(size(int(mode.plan.exchanged)) for mode in modes)]] if found.gpus > 1 else []),
        ["disk", *(f"{mode.disk:.2f} s" if mode.disk else "-" for mode in modes)],
        ["step, about", *(f"{mode.step:.2f} s" for mode in modes)],
        ["tokens/s, about", *(f"{found.tokens / mode.step:,.0f}" for mode in modes)],
        ["bound by", *(mode.bound for mode in modes)],
        *([["epoch, about", *(_duration(found.steps * mode.step) for mode in modes)]] if found.steps else []),
        ["fits", *("yes" if not mode.shortages else "no" for mode in modes)],
    ]
    return table(["time per step", *found.modes], rows)


def _speed(found: Estimate, name: str, unit: str) -> str:
    how = "measured" if name in found.measured else "given or assumed"
    return f"{found.speeds[name]:.3g} {unit} ({how})"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
