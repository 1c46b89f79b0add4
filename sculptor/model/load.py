"""Opening a checkpoint as a transformers model with its tokenizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sculptor.checkpoint.architecture import Architecture, ModelKind, inspect_architecture
from sculptor.checkpoint.configuration import load_config, model_class, reason_of, stop_ids
from sculptor.checkpoint.reader import Checkpoint
from sculptor.checkpoint.tokenizers import load_plainly
from sculptor.data.batches import EXACT, Batch, Widths, make_batch
from sculptor.data.chat import use_template
from sculptor.data.edges import end_answers_at
from sculptor.data.examples import Example
from sculptor.errors import CheckpointError, SculptorError, SettingsError
from sculptor.model.positions import guard_positions, turns_at
from sculptor.model.probe import check_model, check_text_alone
from sculptor.numerics.finite import is_finite
from sculptor.numerics.kernels import keep_kernels
from sculptor.numerics.precision import why_not
from sculptor.progress import Progress, silent
from sculptor.streaming.blocks import BlockStream
from sculptor.streaming.build import Divide, stream_model
from sculptor.streaming.regions import Tier
from sculptor.world import here


@dataclass(frozen=True, eq=False, slots=True)
class LoadedModel:
    """A model on its device, or streamed to it, in evaluation mode."""

    checkpoint: Checkpoint
    architecture: Architecture
    model: Any
    tokenizer: Any
    device: torch.device
    stream: BlockStream | None = None  # if its blocks are not on the device

    @property
    def kind(self) -> ModelKind:
        """How it is trained."""
        return self.architecture.kind

    @property
    def pad_id(self) -> int:
        """What padding is filled with; it is masked, so any id does that the model has."""
        found = self.tokenizer.pad_token_id
        if self.kind == "classifier" and self.model.config.pad_token_id is not None:
            found = self.model.config.pad_token_id  # by which decoders tell where a sequence ends
        wanted = int(found if found is not None else self.tokenizer.eos_token_id or 0)
        return wanted if 0 <= wanted < self.architecture.vocab_size else 0

    def batch(self, examples: Sequence[Example], seed: int, widths: Widths | None = None) -> Batch:
        """One micro-batch on the host; `seed` decides what is masked, where tokens are."""
        vocab_size = min(len(self.tokenizer), self.architecture.vocab_size)
        mask_id = self.tokenizer.mask_token_id
        return make_batch(examples, self.kind, self.pad_id, mask_id, vocab_size, seed, widths or self.widths)

    @property
    def widths(self) -> Widths:
        """What rows are padded to: attention on a GPU is planned anew for every shape, which takes longer than some padding."""
        return self.padded_to(64) if self.device.type == "cuda" else EXACT

    def padded_to(self, multiple: int) -> Widths:
        """No further than positions reach, and not beyond where they turn otherwise."""
        known = (self.architecture.max_positions, turns_at(self.model))
        return Widths(multiple, min((each for each in known if each is not None), default=None))

    def pass_by(self) -> None:
        """Does this process's part of a forward pass without gradients that others have rows for."""
        if self.stream is not None:
            self.stream.pass_by(training=False)

    def close(self) -> None:
        """Gives back what its blocks take elsewhere; a streamed model cannot be used any more."""
        if self.stream is not None:
            self.stream.close()


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU there is, else the CPU.

    Raises:
        SettingsError: if the device is unknown or not there.
    """
    keep_kernels()
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
    if here().size > 1 and name.startswith("cuda:"):
        raise SettingsError(f"--device {name}: several processes have a GPU each; use cuda, or start one process")
    try:
        device = torch.device(name)
        reason = why_not(device)
        if reason is not None:
            raise RuntimeError(reason)
        device = torch.empty(0, device=device).device  # with its number
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        reason = str(cause).splitlines()[0][:120]
        raise SettingsError(f"--device {name}: not available ({reason}); use auto, cpu, cuda or cuda:N") from cause
    return device


def load_model(checkpoint: Checkpoint, device: torch.device, architecture: Architecture | None = None) -> LoadedModel:
    """Loads model and tokenizer: float32 on a CPU, in the checkpoint's own dtype elsewhere.

    Raises:
        CheckpointError: if weights are missing, or there is no tokenizer.
    """
    architecture = architecture or inspect_architecture(checkpoint)
    check_head(checkpoint, architecture)
    cls = model_class(checkpoint.config, checkpoint.path)
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    try:
        model, info = cls.from_pretrained(
            checkpoint.path, config=load_config(checkpoint), dtype=dtype, use_safetensors=True, output_loading_info=True,
            local_files_only=True,
        )  # fmt: skip
    except SculptorError:
        raise
    except Exception as cause:  # transformers raises whatever its parts raise
        raise CheckpointError(f"{checkpoint.path}: transformers cannot load it ({reason_of(cause)})") from cause
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} parameters of {architecture.model_class} are not in the files and would be "
            f"random, first {missing[0]}"
        )
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise CheckpointError(
                f"{checkpoint.path}: {name} has NaN or infinite values; use a checkpoint from before the training diverged"
            )
    model.requires_grad_(False)
    model.to(device).eval()
    check_model(checkpoint, architecture, model, device)
    guard_positions(model)
    return LoadedModel(checkpoint, architecture, model, load_tokenizer(checkpoint, architecture), device)


def load_streamed(
    checkpoint: Checkpoint,
    device: torch.device,
    tier: Tier,
    architecture: Architecture | None = None,
    *,
    scratch: Path | None = None,
    compute_dtypes: Mapping[str, torch.dtype] | None = None,
    resident: frozenset[str] = frozenset(),
    keep_inputs: bool | None = None,
    progress: Progress = silent,
    divide: Divide | None = None,
    constants: Tier | None = None,
) -> LoadedModel:
    """`load_model` for a model of which one block at a time is on the device.

    Args:
        checkpoint: where the weights are.
        device: where the model computes.
        tier: where blocks wait.
        architecture: of the checkpoint.
        scratch: directory for what changes, in the disk tier.
        compute_dtypes: parameters of blocks that will change, and the dtype they are to have on the device.
        resident: parameters of blocks that stay on the device.
        keep_inputs: whether activation checkpoints stay on the device; default on a CPU only.
        progress: makes progress bars.
        divide, constants: as for `stream_model`.

    Raises:
        CheckpointError: if weights are missing, or there is no tokenizer.
        SettingsError: if the host does not give enough memory.
    """
    architecture = architecture or inspect_architecture(checkpoint)
    check_head(checkpoint, architecture)
    try:
        model, stream = stream_model(
            checkpoint,
            architecture,
            device,
            tier,
            scratch=scratch,
            compute_dtypes=compute_dtypes,
            resident=resident,
            keep_inputs=keep_inputs,
            progress=progress,
            divide=divide,
            constants=constants,
        )
    except MemoryError as cause:
        raise SettingsError(f"--offload {constants or tier}: {cause}; use --offload disk") from cause
    try:
        check_model(checkpoint, architecture, model, device, mixed=torch.bfloat16 in (compute_dtypes or {}).values())
        tokenizer = load_tokenizer(checkpoint, architecture)
    except BaseException:
        stream.close()  # host memory that is pinned stays so else
        raise
    guard_positions(model)
    return LoadedModel(checkpoint, architecture, model, tokenizer, device, stream)


def check_head(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Checks that a checkpoint's model predicts tokens, or classes of sequences.

    Raises:
        CheckpointError: if it has no head for that.
    """
    if architecture.kind == "classifier":
        _check_classes(checkpoint, architecture)
    if architecture.kind == "headless":
        raise CheckpointError(
            f"{checkpoint.path}: {architecture.model_class} has no language-modelling head; expected a causal, masked or "
            'encoder-decoder language model in "architectures", or a classifier of sequences that is no encoder-decoder'
        )


def _check_classes(checkpoint: Checkpoint, architecture: Architecture) -> None:
    problem = checkpoint.config.get("problem_type")
    if problem in ("regression", "multi_label_classification") or len(architecture.classes) < 2:
        what = problem or f"{len(architecture.classes)} output"
        raise CheckpointError(
            f"{checkpoint.path}: {architecture.model_class} gives scores ({what}); sculptor trains classifiers with one of two or "
            "more classes for each row"
        )


def check_trainable(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Checks, without weights, that a model learns from text: what cannot be trained is neither analyzed nor planned for.

    Raises:
        CheckpointError: if it has no language-modelling head, or does not run on text alone.
    """
    check_head(checkpoint, architecture)
    check_text_alone(checkpoint, architecture)


def load_tokenizer(checkpoint: Checkpoint, architecture: Architecture, chat_template: str | None = None) -> Any:
    """The checkpoint's tokenizer, with its own chat template or another.

    Args:
        checkpoint: where its files are.
        architecture: of the checkpoint.
        chat_template: name of one of the tokenizer's own, or a file; default the tokenizer's default.

    Raises:
        CheckpointError: if there is none, or it has no end of sequence.
        SettingsError: if there is no such chat template.
    """
    kind = architecture.kind

    try:
        tokenizer = load_plainly(checkpoint.path)
    except Exception as cause:  # damaged files break its parts in any way they like
        raise CheckpointError(
            f"{checkpoint.path}: no usable tokenizer ({reason_of(cause, 160)}); copy its files there"
        ) from cause
    if kind in ("causal", "seq2seq") and tokenizer.eos_token_id is None:
        raise CheckpointError(f"{checkpoint.path}: the tokenizer has no end-of-sequence token; set eos_token")
    if kind == "masked" and tokenizer.mask_token_id is None:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has no mask token; masked language modelling needs one"
        )
    if kind == "masked" and tokenizer.mask_token_id >= architecture.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}: the mask token has id {tokenizer.mask_token_id}, the model has {architecture.vocab_size} "
            "embeddings; use its own tokenizer"
        )
    if kind == "causal":
        end_answers_at(tokenizer, stop_ids(checkpoint))
    use_template(tokenizer, chat_template)
    return tokenizer


def checkpoint_activations(model: Any) -> None:
    """Recomputes each block's activations in the backward pass; transformers renamed the switch in 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
