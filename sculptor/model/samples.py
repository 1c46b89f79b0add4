"""A few dozen of the base's own sequences, with what it predicted there: what harm is measured on, in an archive's section.

Half of them steer a training, the other half only report: no step ever depends on these. Of every prediction the likeliest
tokens are kept, and some drawn from the rest, so the base is not needed again (`sculptor.numerics.divergence`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sculptor.archive.store import Archive
from sculptor.data.batches import collate
from sculptor.data.examples import IGNORED, Example
from sculptor.errors import ArchiveError, CheckpointError, DataError
from sculptor.model.load import LoadedModel
from sculptor.model.loss import predictions
from sculptor.model.sampling import sample_examples, template_tokens
from sculptor.numerics.divergence import Truncated, truncate
from sculptor.numerics.finite import is_finite
from sculptor.progress import Progress

SECTION = "samples"
SUFFIX = ".safetensors"
# Some 128 sequences, or 85 conversations: three MB.
TOKENS = 8192
# On a CPU, where sampling takes as long as the rest of an analysis: tokens times parameters, and the fewest tokens.
_CPU_WORK = 4e11
_CPU_TOKENS = 2048
LENGTH = 64
CHAT_LENGTH = 96  # beside what a chat template adds; at least half of it is the answer, which alone carries loss
KEPT = 64
DRAWN = 16  # of all other tokens; docs/harm.md has what either number is worth
_FEWEST = 4  # two that steer and two that report: a figure of one would have no error
ROWS = 8  # at a time, when they are measured
_FIELDS = {"input_ids": (torch.int32, 1), "has_loss": (torch.bool, 1), "lengths": (torch.int32, 1),
           "top_ids": (torch.int32, 2), "log_probabilities": (torch.float32, 2),
           "drawn_ids": (torch.int32, 2), "log_shares": (torch.float32, 2)}  # fmt: skip
_DRAWN = ("drawn_ids", "log_shares")  # which archives of before did not have: of these, harm is a lower bound


class Sample(NamedTuple):
    """A sequence, and what the base predicted where it carries loss."""

    example: Example
    base: Truncated


@dataclass(frozen=True, eq=False, slots=True)
class Samples:
    """All samples, alternately one that steers and one that reports."""

    all: tuple[Sample, ...]

    @property
    def steering(self) -> tuple[Sample, ...]:
        """Those that a training may look at."""
        return self.all[::2]

    @property
    def reporting(self) -> tuple[Sample, ...]:
        """Those that it may not."""
        return self.all[1::2]


def draw_samples(
    loaded: LoadedModel, max_length: int, seed: int, progress: Progress, *, kept: int | None = None
) -> Samples:
    """Samples the model anew, apart from everything that it is calibrated on; through its chat template where it has one.

    Args:
        loaded: a causal model.
        max_length: longest sequence in tokens, if that is less than what is usual here.
        seed: of the sampling; another than of what it is calibrated on.
        progress: makes progress bars.
        kept: tokens kept of each prediction.

    Raises:
        CheckpointError: if it cannot sample.
        DataError: if it says too little.
    """
    chat = bool(loaded.tokenizer.chat_template)
    own, length = CHAT_LENGTH if chat else LENGTH, usual_length(loaded, max_length)
    # The template's tokens are not the model's: as much of its own words is drawn with a long one as with none.
    num_tokens = tokens_to_draw(loaded) * length // min(own, length)
    examples = sample_examples(
        loaded, num_tokens, length, chat=chat, seed=seed, progress=progress, name="sample, to measure harm on"
    )
    examples = tuple(example for example in examples if num_predicted(example))
    if len(examples) < _FEWEST:
        raise DataError(f"{loaded.checkpoint.path}: the model says too little by itself to keep samples of it")
    return describe(loaded, examples, seed, kept)


def usual_length(loaded: LoadedModel, max_length: int) -> int:
    """Longest sequence in tokens: of a model with a chat template, what that adds goes beside its own words."""
    beside = CHAT_LENGTH + template_tokens(loaded) if loaded.tokenizer.chat_template else LENGTH
    return min(beside, max_length)


def tokens_to_draw(loaded: LoadedModel) -> int:
    """How many tokens of samples are kept of a model: as many as its device draws in a minute or two."""
    if loaded.device.type != "cpu":
        return TOKENS
    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    return min(TOKENS, max(_CPU_TOKENS, int(_CPU_WORK / size)))


@torch.no_grad()
def describe(loaded: LoadedModel, examples: Sequence[Example], seed: int = 0, kept: int | None = None) -> Samples:
    """Sequences with what the model predicts there; `seed` is of the tokens drawn from what is not kept."""
    found: list[Sample] = []
    loaded.model.eval()
    generator = torch.Generator(loaded.device).manual_seed(seed)
    for start in range(0, len(examples), ROWS):
        chosen = examples[start : start + ROWS]
        batch = collate(chosen, loaded.pad_id).to(loaded.device)
        found += samples_of(
            chosen, truncate(predictions(loaded.model, batch, "causal"), kept or KEPT, DRAWN, generator)
        )
    return Samples(tuple(found))


def samples_of(examples: Sequence[Example], known: Truncated) -> Iterator[Sample]:
    """Sequences, each with its part of what was predicted in all of them."""
    counts = list(map(num_predicted, examples))
    parts = zip(*(torch.split(each.cpu(), counts) for each in known), strict=True)
    return (Sample(example, Truncated(*part)) for example, part in zip(examples, parts, strict=True))


def joined(samples: Sequence[Sample], device: torch.device) -> Truncated:
    """What the base predicted in all of them, one after the other."""
    return Truncated(*(torch.cat(parts).to(device) for parts in zip(*(each.base for each in samples), strict=True)))


def num_predicted(example: Example) -> int:
    """Tokens of a sequence that carry loss: the first is never predicted."""
    return sum(label != IGNORED for label in example.labels[1:])


def kept_samples(
    loaded: LoadedModel, max_length: int, seed: int, progress: Progress, *, kept: int | None = None
) -> tuple[bytes | None, str]:
    """An archive's section, or a file of its own; None and the reason where the model has none to give."""
    try:
        return write_samples(draw_samples(loaded, max_length, seed, progress, kept=kept)), ""
    except (CheckpointError, DataError) as cause:  # it says nothing: an archive is one without samples, too
        return None, str(cause)


def write_samples(samples: Samples) -> bytes:
    """The section's bytes: a safetensors file."""
    content: bytes = save(tensors_of(samples.all))
    return content


def tensors_of(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Samples as tensors; `parse_tensors` reads them."""
    examples = [sample.example for sample in samples]
    found = sequences_as_tensors(examples) | {
        "top_ids": torch.cat([sample.base.ids for sample in samples]),
        "log_probabilities": torch.cat([sample.base.log_probabilities for sample in samples]),
    }
    drawn = (torch.cat([sample.base.drawn for sample in samples]), torch.cat([s.base.log_shares for s in samples]))
    return found | dict(zip(_DRAWN, drawn, strict=True)) if drawn[0].shape[1] else found


def sequences_as_tensors(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Sequences alone; `sequences_of` reads them."""
    return {
        "input_ids": torch.tensor([token for each in examples for token in each.input_ids], dtype=torch.int32),
        "has_loss": torch.tensor([label != IGNORED for each in examples for label in each.labels]),
        "lengths": torch.tensor([each.length for each in examples], dtype=torch.int32),
    }


def sequences_of(tensors: Mapping[str, Tensor]) -> Iterator[Example]:
    """What `sequences_as_tensors` made."""
    lengths = tensors["lengths"].tolist()
    for ids, on in zip(*(torch.split(tensors[name], lengths) for name in ("input_ids", "has_loss")), strict=True):
        tokens = tuple(ids.tolist())
        yield Example(tokens, tuple(t if loss else IGNORED for t, loss in zip(tokens, on.tolist(), strict=True)))


def read_samples(archive: Archive, vocab_size: int | None = None) -> Samples | None:
    """The samples of an archive; None if it keeps none, or so few that nothing can be said of them.

    Args:
        archive: to read.
        vocab_size: how many ids the model has.

    Raises:
        ArchiveError: if they are damaged, or of another vocabulary.
    """
    content = archive.section(SECTION)
    if content is None:
        return None
    try:
        found = parse_samples(content, vocab_size)
        return found if len(found.all) >= _FEWEST else None
    except ValueError as cause:
        raise ArchiveError(
            f"{archive.path}: its samples are damaged ({cause}); run `sculptor analyze` again"
        ) from cause


def parse_samples(content: bytes, vocab_size: int | None = None) -> Samples:
    """What `write_samples` wrote.

    Raises:
        ValueError: if it is anything else, or of another vocabulary.
    """
    try:
        return Samples(parse_tensors(load(content), vocab_size))
    except SafetensorError as cause:
        raise ValueError(str(cause)) from cause


def parse_tensors(tensors: Mapping[str, Tensor], vocab_size: int | None) -> tuple[Sample, ...]:
    """What `tensors_of` made.

    Raises:
        ValueError: if it is anything else, or of another vocabulary.
    """
    return tuple(_parse(tensors, vocab_size))


def _parse(tensors: Mapping[str, Tensor], vocab_size: int | None) -> Iterator[Sample]:
    nothing = torch.zeros(len(tensors.get("top_ids", ())), 0)
    tensors = {"drawn_ids": nothing.to(torch.int32), "log_shares": nothing, **tensors}
    _check(tensors, vocab_size)
    at = 0
    for example in sequences_of(tensors):
        count = num_predicted(example)
        if not count or at + count > len(tensors["top_ids"]):
            raise ValueError("predictions do not go with the sequences")
        chosen = slice(at, at + count)
        yield Sample(example, Truncated(*(tensors[name][chosen] for name in list(_FIELDS)[3:])))
        at += count
    if at != len(tensors["top_ids"]):
        raise ValueError("more predictions than tokens")


def _check(tensors: Mapping[str, Tensor], vocab_size: int | None) -> None:
    """What a file may not be, whoever wrote it."""
    for name, (dtype, ndim) in _FIELDS.items():
        found = tensors.get(name)
        if found is None or found.dtype != dtype or found.ndim != ndim:
            raise ValueError(f"{name} is missing or of another form")
    if tensors.keys() != _FIELDS.keys():
        raise ValueError("unknown tensors")
    lengths, values = tensors["lengths"], tensors["log_probabilities"]
    num_tokens = len(tensors["input_ids"])
    if len(lengths) < 2 or int(lengths.min()) < 2 or int(lengths.sum()) != num_tokens:
        raise ValueError("lengths do not go with the tokens")
    rows, kept = tensors["top_ids"].shape
    drawn, shares = (tensors[name] for name in _DRAWN)
    if len(tensors["has_loss"]) != num_tokens or values.shape != (rows, kept + 1) or len(drawn) != rows:
        raise ValueError("tensors do not go with each other")
    if drawn.shape != shares.shape or not bool((shares <= 1e-3).all()) or not is_finite(shares):
        raise ValueError("shares that are none")
    ids = torch.cat([tensors["input_ids"], tensors["top_ids"].flatten(), drawn.flatten()])
    least, largest = int(ids.min()), int(ids.max())
    if least < 0 or (vocab_size is not None and largest >= vocab_size):
        raise ValueError(f"ids from {least} to {largest}, the model has {vocab_size} embeddings")
    if not bool((values <= 1e-3).all()) or not bool(((values.exp().sum(dim=-1) - 1).abs() < 1e-3).all()):
        raise ValueError("probabilities that do not add up to 1")
