"""Fine-tunes that somebody else made: a checkpoint with every tensor moved, and LoRA adapters as PEFT saves them."""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Everything in a directory's shards."""
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def save_tuned(
    base: Path, path: Path, *, size: float = 0.05, dtype: Any = torch.float32, max_shard_size: str = "1GB"
) -> Path:
    """The base's model with noise on every parameter, saved by transformers, with its tokenizer."""
    import transformers

    cls = getattr(transformers, transformers.AutoConfig.from_pretrained(base).architectures[0])
    model = cls.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return path


def save_adapter(base: Path, path: Path, scale: float = 0.1, **settings: Any) -> Any:
    """A LoRA adapter with noise in everything it trains, saved by PEFT; gives PEFT's model."""
    import peft
    import transformers

    cls = getattr(transformers, transformers.AutoConfig.from_pretrained(base).architectures[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about PEFT
        model = peft.get_peft_model(
            cls.from_pretrained(base, dtype=torch.float32), peft.LoraConfig(**({"r": 4} | settings))
        )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path)
    return model


def change_tensors(path: Path, change: Any) -> None:
    """Edits the only shard of a checkpoint or adapter in place."""
    (file,) = path.glob("*.safetensors")
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})


def as_model(name: str, path: Path, base: Path) -> Path:
    """The base's tensors in another layout, as programs save them: sharded, without the prefix of the head, or tied twice."""
    import shutil

    shutil.copytree(base, path)
    change = {
        "unprefixed": lambda found: {name.removeprefix("model."): value for name, value in found.items()},
        "tied twice": lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()},
    }[name]
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return path
