"""Texts that were protected by name, in an archive's section: some sequences of each, what the base predicted, and its loss there.

Sequences that nothing was calibrated on, where a file has enough rows. On them a tuned model shows what became of the name: the
rise of its loss, and KL(base || new), as on samples (`sculptor.model.harm`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import cross_entropy

from sculptor.archive.store import Archive
from sculptor.data.batches import collate
from sculptor.data.examples import IGNORED, Example
from sculptor.errors import ArchiveError
from sculptor.model.harm import NamedHarm, by_sample, harm_of
from sculptor.model.load import LoadedModel
from sculptor.model.loss import predictions
from sculptor.model.samples import DRAWN, KEPT, Sample, joined, num_predicted, parse_tensors, samples_of, tensors_of
from sculptor.numerics.divergence import estimated_divergence, truncate
from sculptor.numerics.finite import is_finite
from sculptor.numerics.ratio import ratio_of_sums

SECTION = "protected"
TOKENS = 4096  # of each name, some 1.5 MB
_EVERY = 8  # of a file's sequences, those that are kept from calibration
_AT_ONCE = 1024  # tokens of a forward


@dataclass(frozen=True, eq=False, slots=True)
class Protected:
    """What is kept of one name: sequences with the base's predictions, and its summed loss on each."""

    name: str
    samples: tuple[Sample, ...]
    losses: tuple[float, ...]


def hold_out(examples: Sequence[Example]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Sequences to calibrate on, and to report on: the same where they are too few for both, none to report on of one."""
    kept = [example for example in examples if num_predicted(example)]
    apart = kept[_EVERY - 1 :: _EVERY]
    if len(apart) < 2:
        return tuple(examples), tuple(kept) if len(kept) > 1 else ()
    chosen = {id(example) for example in apart}
    return tuple(example for example in examples if id(example) not in chosen), tuple(_within(apart))


def _within(examples: Sequence[Example]) -> Iterator[Example]:
    total = 0
    for i, example in enumerate(examples):
        total += example.length
        if total > TOKENS and i > 1:
            return
        yield example


@torch.no_grad()
def describe_protected(loaded: LoadedModel, name: str, examples: Sequence[Example], seed: int = 0) -> Protected:
    """Sequences with what the model predicts there, and its loss; `seed` as in `sculptor.model.samples.describe`."""
    loaded.model.eval()
    generator = torch.Generator(loaded.device).manual_seed(seed)
    samples: list[Sample] = []
    losses: list[float] = []
    for group in _groups([example.length for example in examples]):
        chosen = [examples[i] for i in group]
        logits, labels, counts = _read(loaded.model, chosen, loaded.device, loaded.pad_id)
        samples += samples_of(chosen, truncate(logits, KEPT, DRAWN, generator))
        losses += _sums(cross_entropy(logits.float(), labels, reduction="none"), counts)
    return Protected(name, tuple(samples), tuple(losses))


@torch.no_grad()
def measure_protected(model: Any, kept: Protected, device: torch.device, *, pad_id: int = 0) -> NamedHarm:
    """What became of a name in a causal model as it is; the model is left in evaluation mode."""
    model.eval()
    apart: list[list[float]] = []
    rises: list[float] = []
    for group in _groups([sample.example.length for sample in kept.samples]):
        chosen = [kept.samples[i] for i in group]
        logits, labels, counts = _read(model, [sample.example for sample in chosen], device, pad_id)
        apart += by_sample(estimated_divergence(joined(chosen, device), logits), chosen).tolist()
        found = _sums(cross_entropy(logits.float(), labels, reduction="none"), counts)
        rises += [now - kept.losses[i] for i, now in zip(group, found, strict=True)]
    counts = [len(sample.base.ids) for sample in kept.samples]
    rise = ratio_of_sums(rises, counts)
    return NamedHarm(kept.name, harm_of(apart, counts), rise.mean, rise.error)


def _read(
    model: Any, examples: Sequence[Example], device: torch.device, pad_id: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Logits of every token with loss, the tokens themselves, and how many each sequence has."""
    batch = collate(examples, pad_id).to(device)
    labels = batch.labels[:, 1:]
    return predictions(model, batch, "causal"), labels[labels != IGNORED], list(map(num_predicted, examples))


def _sums(values: Tensor, counts: Sequence[int]) -> list[float]:
    return [float(part.sum()) for part in torch.split(values.double(), list(counts))]


def _groups(lengths: Sequence[int]) -> Iterator[range]:
    """Consecutive sequences that are read together."""
    start = longest = 0
    for i, length in enumerate(lengths):
        if i > start and max(longest, length) * (i - start + 1) > _AT_ONCE:
            yield range(start, i)
            start, longest = i, 0
        longest = max(longest, length)
    yield range(start, len(lengths))


def write_protected(kept: Sequence[Protected]) -> bytes:
    """The section's bytes: a safetensors file."""
    tensors: dict[str, Tensor] = {}
    for each in kept:
        tensors |= {f"{each.name}/{field}": value for field, value in tensors_of(each.samples).items()}
        tensors[f"{each.name}/losses"] = torch.tensor(each.losses, dtype=torch.float64)
    content: bytes = save(tensors)
    return content


def read_protected(archive: Archive, vocab_size: int | None = None) -> tuple[Protected, ...]:
    """What an archive keeps of names, in order of these; nothing, if it keeps nothing.

    Args:
        archive: to read.
        vocab_size: how many ids the model has.

    Raises:
        ArchiveError: if it is damaged, or of another vocabulary.
    """
    content = archive.section(SECTION)
    if content is None:
        return ()
    try:
        tensors = load(content)
        names = sorted({name.rpartition("/")[0] for name in tensors})
        return tuple(_parse(name, tensors, vocab_size) for name in names)
    except (SafetensorError, ValueError, KeyError) as cause:
        raise ArchiveError(
            f"{archive.path}: what it keeps of protected names is damaged ({cause}); run `sculptor analyze` again"
        ) from cause


def _parse(name: str, tensors: dict[str, Tensor], vocab_size: int | None) -> Protected:
    own = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
    losses = own.pop("losses")
    samples = parse_tensors(own, vocab_size)
    if losses.dtype != torch.float64 or losses.shape != (len(samples),) or not is_finite(losses):
        raise ValueError(f"losses of {name} do not go with its sequences")
    return Protected(name, samples, tuple(losses.tolist()))
