"""A new head for sequence classification: what of a checkpoint stays, what comes new; and the same read off two checkpoints.

Everything that the classifier of the model's family has in common with the checkpoint stays, byte for byte and under its name in
the files. What only the language model's head had goes; what the files lack comes new, with the start values that transformers
gives it.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculptor.checkpoint.architecture import build_model, build_skeleton, find_blocks, inspect_architecture
from sculptor.checkpoint.configuration import load_config
from sculptor.checkpoint.directory import CONFIG_NAME
from sculptor.checkpoint.names import find_converted, match_names
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.records import RECORD_NAME
from sculptor.checkpoint.staging import write_json, writing
from sculptor.checkpoint.tokenizers import load_plainly
from sculptor.checkpoint.writer import write_checkpoint
from sculptor.errors import SculptorError, SettingsError
from sculptor.numerics.finite import is_finite
from sculptor.progress import Bar

PROBLEM = "single_label_classification"
_OPTION = "--task sequence-classification"


@dataclass(frozen=True, slots=True)
class NewHead:
    """A classifier's head for a checkpoint that has none.

    Attributes:
        model_class: of the classifier.
        classes: names by number.
        pad_id: what sequences are padded with.
        fresh: parameters that the files have not; they stand in the new files under these names.
        dropped: tensors of the files that the classifier has no use for.
        problem: what it solves; None if a loop of one's own has left that unsaid.
    """

    model_class: str
    classes: tuple[str, ...]
    pad_id: int | None
    fresh: tuple[str, ...]
    dropped: frozenset[str]
    problem: str | None = PROBLEM

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration with the new head."""
        changed: dict[str, Any] = copy.deepcopy(dict(config))
        changed["architectures"] = [self.model_class]
        changed["id2label"] = {str(i): name for i, name in enumerate(self.classes)}
        changed["label2id"] = {name: i for i, name in enumerate(self.classes)}
        if self.problem is not None or "problem_type" in changed:
            changed["problem_type"] = self.problem
        if self.pad_id is not None:
            changed["pad_token_id"] = self.pad_id
        return changed


def plan_head(checkpoint: Checkpoint, classes: Sequence[str], pad_id: int | None) -> NewHead:
    """What a new head would make of a checkpoint.

    Args:
        checkpoint: of any model but a classifier.
        classes: names by number.
        pad_id: of the tokenizer.

    Raises:
        SettingsError: if the model cannot get one.
    """
    planned = NewHead(_classifier_of(checkpoint), tuple(classes), pad_id, (), frozenset())
    model = _build(checkpoint, planned)
    known, converted = match_names(model, checkpoint), find_converted(model, checkpoint)
    tied = {*model.get_expanded_tied_weights_keys(all_submodels=True)}
    fresh = [
        name for name, _ in model.named_parameters() if name not in known and name not in converted and name not in tied
    ]
    body = tuple(f"{path}." for path in find_blocks(model))
    lacking = [name for name in fresh if name.startswith(body) or model.get_parameter(name) is _embedding(model)]
    if lacking or not fresh:
        what = (
            f"{checkpoint.path} has no tensor for {lacking[0]}" if lacking else "it has no parameter that would be new"
        )
        raise SettingsError(f"{_OPTION}: {planned.model_class} cannot get a new head ({what}); use a whole checkpoint")
    for parameter, name in known.items():
        expected, found = tuple(model.state_dict()[parameter].shape), checkpoint.infos[name].shape
        if found != expected:
            raise SettingsError(
                f"{_OPTION}: {checkpoint.path}: tensor {name} has shape {list(found)}, {planned.model_class} wants {list(expected)}"
            )
    kept = {*known.values(), *(name for made in converted.values() for name, _ in made.sources)}
    return NewHead(planned.model_class, planned.classes, pad_id, tuple(fresh), frozenset(checkpoint) - kept)


def _classifier_of(checkpoint: Checkpoint) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    architecture, family = inspect_architecture(checkpoint), str(checkpoint.config.get("model_type"))
    name = KNOWN.get(family)
    if checkpoint.config.get("is_encoder_decoder") or architecture.kind == "seq2seq":
        raise SettingsError(
            f"{_OPTION}: {checkpoint.path} is an encoder-decoder; train 'prompt' and 'completion' rows instead"
        )
    if not isinstance(name, str):
        raise SettingsError(
            f"{_OPTION}: transformers has no classifier of sequences for model type {family!r}; train 'prompt' and 'completion' "
            "rows instead"
        )
    return name


def _build(checkpoint: Checkpoint, head: NewHead) -> Any:
    """The classifier on the meta device."""
    import transformers

    loaded = load_config(checkpoint)
    config = type(loaded).from_dict(head.config(checkpoint.config))
    return build_model(getattr(transformers, head.model_class), config, checkpoint)


def _embedding(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def start_values(checkpoint: Checkpoint, head: NewHead, seed: int) -> dict[str, Tensor]:
    """What a new head begins with: as transformers begins it, in the dtype of the checkpoint.

    Raises:
        SettingsError: if transformers leaves a part of it without values.
    """
    model = _build(checkpoint, head)
    dtype = checkpoint.infos[next(name for name in match_names(model, checkpoint).values())].dtype
    owners = dict.fromkeys(name.rpartition(".")[0] for name in head.fresh)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for owner in owners:
            module = model.get_submodule(owner)
            for leaf, value in module.named_parameters(recurse=False):
                module.register_parameter(
                    leaf, torch.nn.Parameter(torch.full(value.shape, torch.nan), requires_grad=False)
                )
            model._init_weights(module)
    values = {name: model.get_parameter(name).detach().to(dtype) for name in head.fresh}
    empty = [name for name, value in values.items() if not is_finite(value)]
    if empty:
        raise SettingsError(f"{_OPTION}: transformers has no start values for {empty[0]} of {head.model_class}")
    return values


def write_with_head(checkpoint: Checkpoint, directory: Path, head: NewHead, seed: int, bar: Bar | None = None) -> None:
    """Writes a checkpoint with a new head; all else as it is.

    Args:
        checkpoint: what is copied.
        directory: an existing directory to write into.
        head: planned for it.
        seed: of its start values.
        bar: advanced by the bytes of the source.

    Raises:
        OutputError: if a file cannot be written.
    """
    values = start_values(checkpoint, head, seed)
    write_checkpoint(checkpoint, directory, {}, added=values, dropped=head.dropped, bar=bar)
    write_json(directory / CONFIG_NAME, head.config(checkpoint.config), allow_nan=True)
    record = checkpoint.path / RECORD_NAME
    if record.is_file():  # its lineage goes on
        with writing(directory / RECORD_NAME):
            (directory / RECORD_NAME).write_bytes(record.read_bytes())


def head_parameters(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Parameters of a classifier's head: all that is outside of its body."""
    model = build_skeleton(checkpoint)
    return tuple(name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}."))


def find_new_head(base: Checkpoint, tuned: Checkpoint) -> NewHead | None:
    """The head that another checkpoint has got, as its files show it; None if they show none.

    It has to be the one that `plan_head` plans for the base; whether everything else is as it was, is the caller's to compare.
    """
    if tuned.config.get("architectures") == base.config.get("architectures"):
        return None
    try:
        found = inspect_architecture(tuned)
        if found.kind != "classifier":
            return None
        pad_id = tuned.config.get("pad_token_id")
        if pad_id not in _paddings(base):  # where a sequence ends decides what is read of it
            return None
        head = plan_head(base, found.classes, pad_id if isinstance(pad_id, int) else None)
        if tuned.config.get("problem_type") is None:
            head = replace(head, problem=None)
    except SculptorError:  # no such head could have been made
        return None
    same = head.model_class == found.model_class and set(tuned) == (set(base) - head.dropped) | set(head.fresh)
    return head if same and _is_usable(base, tuned, head) else None


def _is_usable(base: Checkpoint, tuned: Checkpoint, head: NewHead) -> bool:
    """Whether its classes have names of their own, and its tensors the shapes that go with them."""
    model = _build(base, head)
    named = len({*head.classes}) == len(head.classes) and all(name.strip() for name in head.classes)
    return named and all(tuned.infos[name].shape == tuple(model.get_parameter(name).shape) for name in head.fresh)


def _paddings(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """What a classifier of a checkpoint may be said to be padded with."""
    try:
        tokenizer = load_plainly(checkpoint.path)
    except Exception:  # damaged files break its parts in any way they like
        tokenizer = None
    pads = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
    own = next((pad for pad in pads if pad is not None), None)
    return None, checkpoint.config.get("pad_token_id"), own
