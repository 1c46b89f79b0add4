"""Whether a model in another program's hands computes what a checkpoint says: else what trains is not what is written.

A checkpoint has tensors and a configuration. A model that was loaded with other settings, or in which hooks, buffers or
functions were put since, computes something else with the same tensors, and so does what is made of it.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sculptor.checkpoint.architecture import Architecture
from sculptor.checkpoint.config_differences import setting_differences
from sculptor.checkpoint.modes import evaluating
from sculptor.checkpoint.reader import Checkpoint
from sculptor.data.batches import Batch
from sculptor.errors import SettingsError, TrainingError
from sculptor.model.load import LoadedModel
from sculptor.model.loss import logits_of
from sculptor.training.protect import protected_matrices

# What no forward pass of a finished model depends on.
_OF_TRAINING = re.compile(
    r"(.*\.)?(\w*token_ids?|\w*drop\w*|output_\w+|return_dict|\w*attn_implementation\w*|\w*aux_loss\w*|\w*z_loss\w*"
    r"|problem_type|(id2)?label(2id)?|num_labels|architectures)(\..*)?"
)
_LENGTH = 48
_STEP = 7919  # a prime, so that the probe's tokens are spread over the vocabulary
# Of what predictions differ by, what rounding does in many layers, in steps of the coarsest dtype; and matrix units.
_STEPS, _LEAST = 16, 1e-2


def check_settings(model: Any, checkpoint: Checkpoint) -> None:
    """Refuses a model that was built with other settings than are written.

    Raises:
        TrainingError: naming the first.
    """
    found = [line for line in setting_differences(checkpoint, model.config.to_dict()) if not _is_of_training(line)]
    if found:
        raise TrainingError(
            f"the trainer's model is not as {checkpoint.path}/config.json says, which would be written: {found[0]}; change it "
            "there, and load the model from there as it is"
        )


def _is_of_training(line: str) -> bool:
    return _OF_TRAINING.fullmatch(line.partition(" was ")[0]) is not None


@torch.no_grad()
def check_others(model: nn.Module, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Refuses what would be missing in the output: parameters that no file has a place for, frozen ones that have changed."""
    own = {id(value) for matrix in protected_matrices(model) for value in matrix.coordinates.values}
    found = [(name, value) for name, value in model.named_parameters(remove_duplicate=False) if id(value) not in own]
    placed = {id(value) for name, value in found if name in architecture.tensors}
    for name, value in found:
        if value.requires_grad and id(value) not in placed:
            raise TrainingError(
                f"{name} is trained, and {checkpoint.path} has no tensor for it, so it would be lost: sculptor writes the model "
                "without adapters or further heads; train without (no peft_config), or freeze it"
            )
        tensor = architecture.tensors.get(name)
        if tensor is None or value.requires_grad or checkpoint.infos[tensor].shape != tuple(value.shape):
            continue
        # A model may be loaded in another dtype.
        if not torch.allclose(value.float().cpu(), checkpoint[tensor].float(), rtol=2**-7, atol=1e-7):
            raise TrainingError(
                f"{name} is frozen, and not as in {checkpoint.path}, whose values would be written; load the model from there, "
                "and change nothing, or set requires_grad before the trainer is made"
            )


@torch.no_grad()
def has_moved(model: nn.Module, checkpoint: Checkpoint, architecture: Architecture, name: str) -> bool:
    """Whether a parameter is not as in the files."""
    value = model.get_parameter(name)
    return not torch.equal(value.cpu(), checkpoint[architecture.tensors[name]].to(value.dtype))


def autocast_of(args: Any) -> torch.dtype | None:
    """What a trainer lowers products to."""
    return torch.bfloat16 if getattr(args, "bf16", False) else torch.float16 if getattr(args, "fp16", False) else None


@torch.no_grad()
def check_buffers(model: nn.Module, loaded: LoadedModel) -> None:
    """Refuses a model whose buffers, rotations of positions for instance, are not those that loading makes.

    Raises:
        TrainingError: naming the first.
    """
    made = dict(loaded.model.named_buffers())
    for name, value in model.named_buffers():
        own = made.get(name)
        if own is None or own.is_meta or own.shape != value.shape or not value.is_floating_point():
            continue
        if not torch.allclose(value.float().cpu(), own.float().cpu(), rtol=2**-7, atol=1e-7):
            raise TrainingError(
                f"{name}: a buffer that is not as loading {loaded.checkpoint.path} makes it, and that is not written; load the "
                "model from there, and change nothing"
            )


@torch.no_grad()
def check_computes(model: Any, loaded: LoadedModel, autocast: torch.dtype | None, what: str) -> None:
    """Refuses a model that predicts something else than a checkpoint.

    Args:
        model: of the trainer, as that checkpoint.
        loaded: the checkpoint, loaded for this.
        autocast: what the trainer lowers products to, if it does.
        what: the checkpoint is to the user.

    Raises:
        TrainingError: if it does.
    """
    expected, found = _probe(loaded.model, loaded), _probe(model, loaded)
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    moved = float(((found - expected).norm(dim=-1) / spread.clamp_min(1e-12)).median())
    dtypes = [next(each.parameters()).dtype for each in (model, loaded.model)] + ([autocast] if autocast else [])
    if not moved <= max(_LEAST, _STEPS * max(torch.finfo(dtype).eps for dtype in dtypes)):
        raise TrainingError(
            f"the trainer's model predicts something else than {what}, by {moved:.1e} of the spread: hooks, buffers, modules or "
            "functions were changed since it was loaded, and none of them is written; load it, protect it, and change nothing"
        )


def _probe(model: Any, loaded: LoadedModel) -> Tensor:
    """Logits (L, vocabulary) of some tokens of everywhere in the vocabulary, on the CPU."""
    device = model.get_input_embeddings().weight.device
    length = min(_LENGTH, loaded.architecture.max_positions or _LENGTH)
    ids = torch.tensor([[i * _STEP % loaded.architecture.vocab_size for i in range(length)]], device=device)
    with evaluating(model):
        logits = logits_of(model, Batch(ids, torch.ones_like(ids), ids), loaded.architecture.kind)
    return logits[0].float().cpu()


def check_size(model: Any, expected: int) -> None:
    """Trainers may add tokens, for example with a chat template of their own."""
    found = model.get_input_embeddings().weight.shape[0]
    if found != expected:
        raise TrainingError(
            f"the trainer's model has {found} embeddings, the checkpoint {expected}: what is written has the checkpoint's "
            "tokens and tokenizer; train without adding tokens"
        )


def check_tokenizer(theirs: Any, ours: Any, notice: Callable[[str], object]) -> None:
    """Refuses a trainer whose tokens are other ones than the output's tokenizer makes; says what else of it is not written.

    Raises:
        SettingsError: if they are.
    """
    if not hasattr(theirs, "get_vocab"):  # a processor of something else, or none
        return
    if theirs.get_vocab() != ours.get_vocab():
        raise SettingsError(
            "the trainer's processing_class has another vocabulary than the base's tokenizer, which the output comes with; "
            "load it from the base"
        )
    other = [
        name for name in ("chat_template", "eos_token") if getattr(theirs, name, None) != getattr(ours, name, None)
    ]
    if other:
        notice(
            f"the trainer's processing_class has another {' and '.join(other)}; the output comes with the base's tokenizer"
        )
