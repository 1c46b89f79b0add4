"""What an analysis that nobody told measures: curvature, of what the model says by itself, on as many tokens as a machine bears."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod

import torch

from sculptor.checkpoint.architecture import Architecture, Target
from sculptor.checkpoint.reader import Checkpoint
from sculptor.errors import SettingsError
from sculptor.jobs.on_this_machine import on_this_machine
from sculptor.methods.settings import CALIBRATION_TOKENS, RULES, SELF, AnalyzeSettings, is_self
from sculptor.model.load import load_tokenizer
from sculptor.planning.expected import expect_analysis, operations_per_token, sides_of

# Tokens times parameters on a CPU, and bounds of the tokens: what two cores sample and measure in a few minutes.
_CPU_WORK = 5e11
_CPU_TOKENS = (2000, 30_000)

_PROTECTED = {
    "weights": "protects the largest singular values, which needs no data and keeps general ability no better than chance does",
    "inputs": "protects what layers read",
    "curvature": "protects what the loss depends on",
    "random": "protects by chance",
}


def fill_in(
    settings: AnalyzeSettings, checkpoint: Checkpoint, architecture: Architecture, device: torch.device
) -> AnalyzeSettings:
    """The settings of an analysis that measures rows, with data and a number of tokens; what is given stays.

    Raises:
        SettingsError: if there are no data, and the model cannot sample any.
    """
    if not settings.data:
        if settings.rule != RULES[0]:
            raise SettingsError(f"rule {settings.rule} measures rows: pass data, files to calibrate on or self")
        if architecture.kind != "causal":
            raise SettingsError(
                f"{checkpoint.path}: only a causal model can sample text to calibrate on; give --data, or --basis weights, which "
                "needs none"
            )
        tokenizer = load_tokenizer(checkpoint, architecture, settings.chat_template)
        settings = replace(settings, data=(SELF,), chat=settings.chat or bool(tokenizer.chat_template))
    return replace(settings, calibration_tokens=settings.calibration_tokens or tokens_for(checkpoint, device))


def tokens_for(checkpoint: Checkpoint, device: torch.device) -> int:
    """Calibration tokens unless told otherwise: 100,000; on a CPU 5e11 over the model's parameters, 2,000 to 30,000."""
    if device.type != "cpu":
        return CALIBRATION_TOKENS
    least, most = _CPU_TOKENS
    return int(min(max(_CPU_WORK / num_parameters(checkpoint) // 100 * 100, least), most))


def num_parameters(checkpoint: Checkpoint) -> int:
    """Numbers in the files."""
    return sum(prod(info.shape) for info in checkpoint.infos.values())


FEWER = "fewer --calibration-tokens take less"


def tell_choice(
    given: AnalyzeSettings,
    settings: AnalyzeSettings,
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    device: torch.device,
    notice: Callable[[str], object],
) -> None:
    """Says what was chosen where nothing was given, as the options that ask for it, and what that takes.

    Args:
        given: by the user, `settings` what became of it.
        checkpoint, targets: what is analyzed, on `device`.
        notice: told one line, or two.
    """
    basis, own = settings.resolved_basis, bool(settings.data) and not given.data
    chosen = [] if given.basis or given.rule != RULES[0] else [f"--basis {basis}"]
    chosen += [f"--data {SELF}"] if own else []
    chosen += ["--chat"] if settings.chat and not given.chat else []
    if not chosen:
        return
    chosen += [f"--max-length {settings.max_length}"] if settings.max_length != given.max_length else []
    if settings.calibration_tokens is None:
        notice(f"chosen: {' '.join(chosen)}: {_PROTECTED[basis]}")
        return
    if given.calibration_tokens is None:
        chosen.append(f"--calibration-tokens {settings.calibration_tokens}")
    text = ", of text that the model says" if own else ""
    text += " through its chat template" if settings.chat else ""
    notice(f"chosen: {' '.join(chosen)}: {_PROTECTED[basis]}{text}")
    notice(_cost_line(settings, checkpoint, targets, device))


def _cost_line(
    settings: AnalyzeSettings, checkpoint: Checkpoint, targets: Sequence[Target], device: torch.device
) -> str:
    """What is computed, and how long that takes if nobody else uses the machine."""
    tokens = settings.calibration_tokens or CALIBRATION_TOKENS
    gradients = settings.resolved_basis == "curvature"
    sides = sides_of(targets, gradients=gradients)
    per_token = operations_per_token(checkpoint, sides, gradients=gradients)
    sampled = any(map(is_self, settings.data))
    expected = partial(expect_analysis, checkpoint, sides, tokens, gradients=gradients, sampled=sampled)
    time = on_this_machine(expected, device, torch.float32)
    return (
        f"it takes {tokens:,} tokens ({tokens * per_token / 1e12:.1f} TFLOP) and {len(sides)} eigendecompositions of up to "
        f"{max(sides, default=0):,} rows{f': {time}' if time else ''}; {FEWER}"
    )
