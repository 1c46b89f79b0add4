"""Random checkpoints of real shapes, written one tensor at a time.

    python tests/benchmarks/shapes.py 1.1b OUT --tokenizer DIR

The weights are random (normal, 0.02), so losses mean nothing; sizes, times and memory do.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from sculptor.checkpoint.tensors import write_tensors

SHAPES = {
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32},
    "7b-8": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32,
             "num_key_value_heads": 32},
    **{f"70b-{n}": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": n, "num_attention_heads": 64,
                    "num_key_value_heads": 8} for n in (4, 8, 16, 40, 80)},
}  # fmt: skip


def make_checkpoint(path: Path, shape: str, tokenizer: Path, device: str = "cpu") -> Path:
    """`random_checkpoint` of a shape."""
    return random_checkpoint(path, SHAPES[shape], tokenizer, device)


def random_checkpoint(path: Path, sizes: dict[str, Any], tokenizer: Path, device: str = "cpu") -> Path:
    """A bf16 Llama of some sizes, in one file, with a tokenizer copied from another checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    common = {
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    config = LlamaConfig(**(common | sizes))
    with torch.device("meta"):
        entries = [
            (name, torch.bfloat16, tuple(tensor.shape))
            for name, tensor in LlamaForCausalLM(config).state_dict().items()
            if name != "lm_head.weight" or not config.tie_word_embeddings
        ]
    shapes = {name: size for name, _, size in entries}
    generator = torch.Generator(device).manual_seed(0)

    def produce(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        return (torch.randn(shapes[name], generator=generator, device=device) * 0.02).to(torch.bfloat16).cpu()

    path.mkdir(parents=True)
    write_tensors(path / "model.safetensors", entries, produce, {"format": "pt"})
    content = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(content))
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, path / file.name)
    return path


def main() -> None:
    """Writes one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    make_checkpoint(options.output, options.shape, options.tokenizer, options.device)


if __name__ == "__main__":
    main()
