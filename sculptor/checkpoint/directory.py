"""What a checkpoint directory is, told as transformers tells it: its configuration, its weight files, what goes along.

Whatever is decided here holds for every way of reading a model, so that none of them sees another model than
`from_pretrained` does. What cannot be told is refused by name.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sculptor.checkpoint.folders import MODULES_NAME, TEMPLATES, is_in, model_folders, module_folders, named_modules
from sculptor.errors import CheckpointError
from sculptor.validation import parse, read_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_FETCH = "fetch it again"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WEIGHTS = (
    *_PICKLED, ".safetensors", ".gguf", ".ggml", ".h5", ".keras", ".msgpack", ".ot", ".onnx", ".onnx_data", ".npz", ".npy",
    ".tflite", ".pb", ".mlmodel", ".engine", ".index.json",
)  # fmt: skip
_MODULE_WEIGHTS = (".safetensors", ".index.json")  # which go along in the folder of a module
_CODE = (".py", ".pyc", ".pyi", ".ipynb", ".sh", ".bat", ".ps1", ".js", ".so", ".dll", ".exe", ".whl", ".jar")
_SECRET = re.compile(
    r"credential|secret|passw|(^|[._-])id_(rsa|dsa|ecdsa|ed25519)|\.(pem|key|p12|pfx|jks|kdbx|keytab|ppk|asc)$"
    r"|^((hf_)?token|(api|access)_?(key|token)|service[_-]?account|auth|kaggle|netrc)([._-].*)?$"
    r"|(^|[._-])keys?\.(json|txt|ya?ml|toml)$",
    re.IGNORECASE,
)
# What transformers itself reads: without it, it would be another model.
_OWN = re.compile(
    r"(generation_|(video_|image_)?preprocessor_|processor_)?config\.json|special_tokens_map\.json|added_tokens\.json|merges\.txt"
    r"|(tokenizer|vocab|chat_template).*\.(json|txt|jinja)|.*\.(model|jinja|tiktoken|spm|bpe|codes)"
)
# By any ending: `LICENSE.model` is no tokenizer.
LICENCE = re.compile(r"(.*/)?(licen[cs]e|copying|notice|use_policy)[^/]*", re.IGNORECASE)
_BY_TRAINERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)[^/]*\.(bin|pt|pth)")
_WITH_WEIGHTS = (
    "CNN",
    "Dense",
    "LSTM",
    "LayerNorm",
    "StaticEmbedding",
    "WeightedLayerPooling",
    "WordEmbeddings",
    "WordWeights",
)
_OURS = ("archive.json", "sculptor.json")
# Tensor names that another program's wrapper has lengthened.
WRAPPERS = {
    "_orig_mod.": "torch.compile: save model._orig_mod",
    "module.": "DistributedDataParallel: save model.module",
    "base_model.model.": "PEFT: save model.merge_and_unload()",
    "_fsdp_wrapped_module.": "FSDP: save a full state dict",
    "_forward_module.": "DeepSpeed or Fabric: save the inner module",
}
# Only files that are never wanted are left on the hub.
HUB_IGNORED = tuple(f"*{suffix}" for suffix in (*_WEIGHTS, *_CODE) if suffix not in (".safetensors", ".index.json"))


def directory_problem(path: Path) -> str | None:
    """Why a path that exists is no directory of a model; None if it may be one."""
    if os.path.isdir(path):
        return None
    if path.suffix == ".gguf":
        return f"is a GGUF file; {_gguf_remedy(path.name)}"
    if path.suffix == ".safetensors":
        return "is a file; pass the directory with it and its config.json"
    return "is a file; expected a checkpoint directory"


def _gguf_remedy(name: str) -> str:
    return (
        f"make a checkpoint of it first: AutoModelForCausalLM.from_pretrained(DIR, gguf_file={name!r}, "
        "quantization_config=GgufConfig(dequantize=True)).save_pretrained(OUT), and its tokenizer likewise"
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json as it is in the file; numbers may be infinite, as transformers writes them.

    Raises:
        CheckpointError: if the directory holds no full-precision model with a configuration.
    """
    file = path / CONFIG_NAME
    names = {item.name for item in path.iterdir()} if path.is_dir() else set()
    if not names:
        raise CheckpointError(f"{path}: empty directory; expected config.json and safetensors weights")
    adapters = sorted(name for name in names if name.startswith(("adapter_config.json", "adapter_model.")))
    if adapters and SINGLE_NAME not in names and INDEX_NAME not in names:
        raise CheckpointError(
            f"{path}: an adapter ({adapters[0]}), no full model; merge it first: analyze, train and evaluate do with "
            f"--merge-adapter DIR, others take what `sculptor edit interpolate BASE {path} --alpha 1 --output DIR` writes"
        )
    if adapters:
        raise CheckpointError(
            f"{path}: {adapters[0]} beside full weights, and transformers may load both; merge or remove it"
        )
    if not file.is_file():
        gguf = sorted(name for name in names if name.endswith(".gguf"))
        if gguf:
            raise CheckpointError(f"{path}: only a GGUF file ({gguf[0]}); {_gguf_remedy(gguf[0])}")
        raise CheckpointError(f"{path}: no config.json; expected a Hugging Face checkpoint directory")
    content = parse(read_file(file, CheckpointError, _FETCH), file, CheckpointError, _FETCH, allow_inf_nan=True)
    for holder in (content, *(value for value in content.values() if isinstance(value, dict))):
        found = holder.get("quantization_config")
        if found:
            method = found.get("quant_method", "unknown method") if isinstance(found, dict) else found
            raise CheckpointError(f"{path}: quantised checkpoint ({method}); sculptor needs the unquantised weights")
    return content


def weight_files(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """Where each tensor is, if an index says so, and the files, relative to the directory; as transformers chooses them.

    `model.safetensors` goes before an index, which may be a left-over of an earlier save.

    Raises:
        CheckpointError: if there are none, or the index is damaged, or leads out of the directory.
    """
    if config.get("transformers_weights"):
        raise CheckpointError(
            f"{path}: config.json names a weight file of its own (transformers_weights); "
            "load it with transformers and save it again"
        )
    if (path / SINGLE_NAME).is_file():
        return None, (SINGLE_NAME,)
    index = path / INDEX_NAME
    if index.is_file():
        return _indexed_files(path, index)
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise CheckpointError(
            f"{path}: only pickled weights ({pickled[0]}), which can run code when read; convert them where you trust "
            'them: AutoModel.from_pretrained(DIR).save_pretrained(OUT), with the class named in "architectures"'
        )
    loose = sorted(file.name for file in path.glob("*.safetensors"))
    hint = f"; {loose[0]} is not named in an index" if loose else ""
    raise CheckpointError(f"{path}: no {SINGLE_NAME} and no {INDEX_NAME}{hint}")


def _indexed_files(path: Path, index: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    content = parse(read_file(index, CheckpointError, _FETCH), index, CheckpointError, _FETCH)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places or not isinstance(content.get("metadata"), dict):
        raise CheckpointError(f"{index}: not a weight index (expected objects 'metadata' and 'weight_map'); {_FETCH}")
    for name, file in places.items():
        # Links are followed, as hubs' caches have them; names that lead out are not.
        if not isinstance(file, str) or not file.endswith(".safetensors") or not file.isprintable():
            raise CheckpointError(f"{index}: {name} is said to be in {file!r}, no safetensors file; {_FETCH}")
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(f"{index}: {name} is said to be in {file!r}, outside of the directory; {_FETCH}")
    files = sorted(set(places.values()))
    missing = [file for file in files if not (path / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(files)} shards are missing ({', '.join(missing[:3])}); fetch them again"
        )
    return places, tuple(files)


def second_weights(path: Path, files: Collection[str], found: Iterable[str]) -> str | None:
    """Weights beside those that transformers loads, which it or other programs may load; None if there are none.

    Args:
        path: the directory.
        files: that are loaded.
        found: names of all files that count, relative to the directory.
    """
    index = INDEX_NAME if SINGLE_NAME not in files else None
    for name in sorted(found):
        if name == INDEX_NAME and index is None:
            if not _names_only_single(path / name):
                return name
        elif is_weights(name) and name not in files and name != index and not _BY_TRAINERS.fullmatch(name):
            return name
    return None


def _names_only_single(index: Path) -> bool:
    content = parse(read_file(index, CheckpointError, _FETCH), index, CheckpointError, _FETCH)
    places = content.get("weight_map")
    return isinstance(places, dict) and set(map(str, places.values())) == {SINGLE_NAME}


def is_weights(name: str) -> bool:
    """Whether a file holds weights, or an index of them."""
    return name.lower().endswith(_WEIGHTS)


def published_name(path: Path) -> str:
    """What records and cards call a directory: its hub name if it lies in the hub's cache, else its own, without folders."""
    place = path.resolve()
    store = place.parent.parent.name
    if place.parent.name == "snapshots" and store.startswith("models--"):
        return store.removeprefix("models--").replace("--", "/")
    return place.name


def companions(path: Path) -> Iterator[PurePosixPath]:
    """What belongs to a model beside its weights, relative to the directory: configuration, tokenizer, template, licence.

    Everything in the directory and in the model's folders goes along but weights, code, hidden files, what looks like a
    secret, and links that lead out; where transformers reads one of these, `check_links` has refused the model. The folders
    of modules go with their weights, which `check_modules` has looked at.
    """
    modules = module_folders(path)
    for name in sorted(_in_model(path)):
        module = is_in(name, modules) and name.lower().endswith(_MODULE_WEIGHTS)
        left = name.lower().endswith((*_WEIGHTS, *_CODE)) and not module
        if not left and not _SECRET.search(PurePosixPath(name).name):
            yield PurePosixPath(name)


def _in_model(path: Path) -> Iterator[str]:
    """Visible files of a directory and its model's folders."""
    _, _, names = next(os.walk(path), ("", [], []))
    yield from (name for name in names if (path / name).is_file() and _is_seen(path, path / name))
    for folder in model_folders(path):
        if _is_seen(path, path / folder):
            yield from _below(path, path / folder)


def _below(path: Path, top: Path) -> Iterator[str]:
    """Visible files below a folder of a directory, or below the directory itself."""
    for folder, inner, names in os.walk(top):
        here = Path(folder)
        inner[:] = [name for name in inner if _is_seen(path, here / name)]
        found = (here / name for name in names if (here / name).is_file() and _is_seen(path, here / name))
        yield from (file.relative_to(path).as_posix() for file in found)


def _is_seen(path: Path, item: Path) -> bool:
    return not _is_left(item.name) and not _leads_out(path, item)


def check_modules(path: Path) -> None:
    """Refuses a model of which a copy would lack a module's weights, since they are no safetensors.

    Raises:
        CheckpointError: naming the file.
    """
    remedy = "save it as safetensors: SentenceTransformer(DIR).save_pretrained(OUT)"
    for folder in module_folders(path):
        for here, _, names in os.walk(path / folder):
            pickled = sorted(
                name for name in names if name.lower().endswith(_PICKLED) and not _BY_TRAINERS.fullmatch(name)
            )
            if pickled and not any(name.endswith(".safetensors") for name in names):
                file = (Path(here) / pickled[0]).relative_to(path)
                raise CheckpointError(
                    f"{path}: {file} are pickled weights of a module, which an output would lack; {remedy}"
                )
    for folder, kind in named_modules(path):
        if kind in _WITH_WEIGHTS and not any((path / folder).glob("*.safetensors")):
            raise CheckpointError(
                f"{path}: no safetensors in {folder}, a {kind} in {MODULES_NAME} (pickled weights are not fetched); {remedy}"
            )


def tell_left_behind(path: Path, files: Collection[str], notice: Callable[[str], object]) -> None:
    """Says in a line what looks like weights and is not carried along, if there is any.

    Args:
        path: the directory.
        files: that hold the model's tensors.
        notice: told.
    """
    carried = {*files, *map(str, companions(path))}
    ours = {file.parent for name in _OURS for file in path.rglob(name)} - {path}
    found = sorted(
        name
        for name in _below(path, path)
        if is_weights(name) and not name.endswith(".index.json") and name not in carried
        if not _BY_TRAINERS.fullmatch(PurePosixPath(name).name) and not ours & set((path / name).parents)
    )
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    if found:
        notice(f"not in the output, since no part of the model: {', '.join(found[:3])}{more}")


def _is_left(name: str) -> bool:
    return name.startswith((".", "__pycache__")) or name.endswith(".partial")


def _leads_out(path: Path, item: Path) -> bool:
    """Whether something in a directory is elsewhere, or is what is never carried along; the hub's cache has its own store."""
    target, home = item.resolve(), path.resolve()
    if home in target.parents:
        return item.is_symlink() and (_is_left(target.name) or _SECRET.search(target.name) is not None)
    store = target.parent
    if store.name != "blobs":
        return True
    snapshot = home.parent.name == "snapshots" and store == home.parent.parent / "blobs"
    return not (snapshot or store.parent.name.startswith("models--"))


def check_links(path: Path) -> None:
    """Refuses a model of which transformers reads a file that is not in its directory: an output would carry its content.

    So it does where its licence is not there, which no output may lack.

    Raises:
        CheckpointError: naming the link.
    """
    templates = path / TEMPLATES
    modules = [item for folder in module_folders(path) for item in (path / folder, *(path / folder).rglob("*"))]
    for item in sorted((*path.iterdir(), *(templates.iterdir() if templates.is_dir() else ()), *modules)):
        licence = LICENCE.fullmatch(item.name) is not None
        own = item == templates or item in modules or licence or _OWN.fullmatch(item.name)
        if own and item.exists() and _leads_out(path, item):
            would = "lack it" if licence else "carry what is there"
            raise CheckpointError(
                f"{path}: {item.relative_to(path)} is a link to {item.resolve()}, and an output would {would}; put the file "
                "itself in its place (cp -L)"
            )


def wrapper_hint(names: Iterable[str]) -> str:
    """A hint, where another program's wrapper has lengthened the names."""
    for prefix, remedy in WRAPPERS.items():
        if any(name.startswith(prefix) for name in names):
            return f"; names begin with {prefix!r}, of {remedy} instead"
    return ""
