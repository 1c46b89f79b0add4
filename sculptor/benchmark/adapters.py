"""Other people's methods through PEFT, in the same loop, for comparison: LoRA, O-LoRA and OSF.

Each is trained on all targeted matrices and merged into the weights at the end of a task. O-LoRA (arXiv 2310.14152)
adds lambda * sum ||A_earlier A^T||^2 to the loss; the A of earlier tasks wait beside the checkpoint. OSF is PEFT's own
version of the paper that sculptor implements.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculptor import __version__
from sculptor.archive.shards import save_tensors
from sculptor.benchmark.plan import AdapterSettings, Contender
from sculptor.checkpoint.architecture import Architecture, inspect_architecture
from sculptor.checkpoint.directory import check_modules
from sculptor.checkpoint.reader import Checkpoint, identity, open_checkpoint
from sculptor.checkpoint.records import RECORD_NAME
from sculptor.checkpoint.staging import put_in_place, staging, write_json, writing
from sculptor.checkpoint.tensors import digest, read_header, read_tensor
from sculptor.checkpoint.writer import output_dtype, write_checkpoint
from sculptor.checkpoint.written import remove
from sculptor.data.chat import use_template
from sculptor.data.examples import Encoded, digest_examples, encode_sources, resolve_max_length
from sculptor.data.rows import read_sources
from sculptor.distribution import extra
from sculptor.errors import OutputError, SettingsError
from sculptor.interruption import signals_wait
from sculptor.jobs.train_record import published
from sculptor.model.load import LoadedModel, checkpoint_activations, load_model, resolve_device
from sculptor.planning.footprints import Footprint, Workload, footprints
from sculptor.planning.splits import Split, choose_split
from sculptor.progress import Progress
from sculptor.training.loop import TrainingLoop
from sculptor.training.precision import compute_dtype, decide_precision
from sculptor.training.rates import Peaks
from sculptor.training.settings import STREAMED, TrainSettings
from sculptor.training.state import STATE_NAME, StateStore, has_state
from sculptor.training.stepping.resident import ResidentUpdates, TrainedParameters

_ADAPTER = "default"
_RATE = 5e-4  # unless the plan says; adapters start from nothing, so there is no size to be relative to
_EARLIER = "earlier_adapters.safetensors"


def require_peft() -> None:
    """Fails early where the comparison could not be run.

    Raises:
        SettingsError: if PEFT is not installed.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise SettingsError(f"this --method needs PEFT: {extra('baselines')}") from None


def check_adapter_settings(settings: TrainSettings, method: str) -> None:
    """Refuses settings of training that PEFT's methods have no use for.

    Raises:
        SettingsError: naming them.
    """
    unused = [
        option
        for option, given in (
            ("relative_rate", settings.relative_rate),
            ("weight_decay", settings.weight_decay),
            ("optimizer", settings.optimizer != "adamw"),
            ("optimizer_dtype", settings.optimizer_dtype != "float32"),
            ("token_weights", settings.token_weights != "same"),
            ("clip_by", settings.clip_by != "model"),
            ("select_rows", settings.select_rows),
            ("also_train", settings.also_train),
            ("offload", settings.offload in STREAMED),
            ("parallel", settings.parallel != "auto"),
            ("optimizer_mode", settings.optimizer_mode != "exact"),
            ("kl_weight", settings.kl_weight),
            ("max_harm", settings.max_harm),
            ("harm_every", settings.harm_every),
        )
        if given
    ]
    if unused:
        raise SettingsError(f"[train] {', '.join(unused)} without effect with --method {method}; leave it out")


def train_adapter(
    model: str | Path,
    data: Sequence[str | Path],
    output: Path,
    settings: TrainSettings,
    adapter: AdapterSettings,
    method: Contender,
    *,
    progress: Progress,
    stop: Callable[[], int | None],
) -> None:
    """Trains one task with a method of PEFT and writes the merged checkpoint; a run that was killed is taken up.

    Raises:
        SculptorError: if an input or the output cannot be used.
    """
    require_peft()
    check_adapter_settings(settings, method)
    checkpoint = open_checkpoint(model, settings.attn_implementation)
    check_modules(checkpoint.path)
    architecture = inspect_architecture(checkpoint)
    device = resolve_device(settings.device)
    settings = replace(
        settings,
        precision=decide_precision(settings.precision, checkpoint, device),
        max_length=resolve_max_length(settings.max_length, architecture.max_positions),
        learning_rate=settings.learning_rate or _RATE,
    )
    assert settings.max_length is not None
    with staging(output, command="continual task", overwrite=False, resume=True, worth_keeping=has_state) as partial:
        loaded = load_model(checkpoint, device, architecture)
        use_template(loaded.tokenizer, settings.chat_template)
        sources = read_sources(data, settings.max_rows, settings.columns)
        encoded = encode_sources(sources, loaded.tokenizer, loaded.kind, settings.max_length, architecture.vocab_size)
        settings, recompute = _split(settings, checkpoint, architecture, encoded, device)
        parameters = _inject(loaded, settings, adapter, method)
        if recompute:
            checkpoint_activations(loaded.model)
        earlier = _read_earlier(checkpoint.path, device) if method == "olora" else {}
        key = asdict(settings) | asdict(adapter) | {"method": method, "data": digest_examples(encoded.examples)}
        key["base"] = identity({target.name: digest(checkpoint[target.name]) for target in architecture.targets})
        key["mixture"] = encoded.mixture and asdict(encoded.mixture)
        key.pop("save_every")
        assert settings.learning_rate is not None
        peaks = Peaks({}, dict.fromkeys(parameters, settings.learning_rate))
        loop = TrainingLoop(
            loaded,
            ResidentUpdates(TrainedParameters((), parameters), peaks, settings, device),
            encoded.examples,
            settings,
            store=StateStore(partial / STATE_NAME, key, {}),
            metrics=partial / "metrics.jsonl",
            penalty=_overlap(parameters, earlier, adapter.orthogonality) if earlier else None,
            stop=stop,
            mixture=encoded.mixture,
        )
        with signals_wait():
            result = loop.run(progress)
        staged = partial / "output"
        remove(staged)
        with writing(staged):
            staged.mkdir(exist_ok=True)
        saved = None if settings.save_dtype == "keep" else getattr(torch, settings.save_dtype)
        replacements = _merged(loaded.model, architecture, saved)
        with closing(progress(total=checkpoint.num_bytes, desc="write", unit="B")) as bar:
            write_checkpoint(checkpoint, staged, replacements, dtype=saved, bar=bar)
        if method == "olora":
            _write_earlier(staged, earlier, parameters)
        record = {"created_by": f"sculptor {__version__}", "method": method, "settings": published(settings)}
        write_json(staged / RECORD_NAME, record | {"adapter": asdict(adapter), "result": asdict(result)})
        put_in_place(partial, output, overwrite=False)


def _split(
    settings: TrainSettings,
    checkpoint: Checkpoint,
    architecture: Architecture,
    encoded: Encoded,
    device: torch.device,
) -> tuple[TrainSettings, bool]:
    """The settings with the rows of a forward pass, and whether to recompute; as if every weight were trained."""
    batch = settings.rows_of_step(encoded.num_epoch)
    longest = max(example.length for example in encoded.examples)
    trained = sum(info.num_bytes // info.dtype.itemsize for info in checkpoint.infos.values())
    work = Workload(
        batch * longest, 1, num_extra=trained, row=longest, compute=compute_dtype(settings.precision, device)
    )

    def plans_of(split: Split) -> dict[str, Footprint]:
        return footprints(checkpoint, architecture, (), device, split.workload(work, batch))

    split = choose_split(plans_of, replace(settings, offload="none"), batch, longest, device)
    return replace(settings, micro_batch_size=split.rows), split.recompute


def _inject(
    loaded: LoadedModel, settings: TrainSettings, adapter: AdapterSettings, method: Contender
) -> dict[str, nn.Parameter]:
    """Puts adapters into the model and returns their parameters, float32."""
    import peft

    # Adapters are for modules; stacked experts, which are none, have no adapter.
    modules = [target.module for target in loaded.architecture.targets if target.window.is_whole]
    config: Any
    if method == "osf":
        config = peft.OSFConfig(target_modules=modules, effective_rank=adapter.preserve)
        loaded.model.to(torch.float32)  # its factors take the dtype of the weights, and drown in bf16
    else:
        config = peft.LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=0.0, target_modules=modules, bias="none"
        )
    devices = [loaded.device.index or 0] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed)  # A starts at random
        peft.inject_adapter_in_model(config, loaded.model, _ADAPTER)
    found = {}
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
            found[name] = parameter
    return found


def _merged(
    model: nn.Module, architecture: Architecture, saved: torch.dtype | None
) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each tensor of the checkpoint what adds its adapter, when it is written."""
    by_module = {target.module: target.name for target in architecture.targets if target.window.is_whole}
    return {
        by_module[path]: functools.partial(_add_delta, module, saved)
        for path, module in model.named_modules()
        if path in by_module
    }


@torch.no_grad()
def _add_delta(module: Any, saved: torch.dtype | None, weight: Tensor) -> Tensor:
    delta: Tensor = module.get_delta_weight(_ADAPTER).double().cpu()
    return (weight.double() + delta).to(output_dtype(weight.dtype, saved))


def _read_earlier(checkpoint: Path, device: torch.device) -> dict[str, Tensor]:
    """The A of all earlier tasks, stacked (rows, n), by parameter; none at the first task."""
    path = checkpoint / _EARLIER
    if not path.is_file():
        return {}
    infos, _ = read_header(path, OutputError)
    return {name: read_tensor(path, name, OutputError).to(device) for name in infos}


def _write_earlier(staged: Path, earlier: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    stacked = {
        name: torch.cat([*([earlier[name]] if name in earlier else []), parameter.detach()]).cpu()
        for name, parameter in parameters.items()
        if "lora_A" in name
    }
    save_tensors(stacked, staged / _EARLIER)


def _overlap(
    parameters: Mapping[str, nn.Parameter], earlier: Mapping[str, Tensor], weight: float
) -> Callable[[], Tensor]:
    def penalty() -> Tensor:
        total = sum(((a @ parameters[name].T).square().sum() for name, a in earlier.items()), start=torch.zeros(()))
        return weight * torch.as_tensor(total)

    return penalty
