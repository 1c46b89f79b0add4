"""Fuzzing guided by coverage: python tests/fuzz/bytes.py READER [-runs=100000] [-rss_limit_mb=2048] [-timeout=60]

READER is one of those in readers.py; the other arguments are libFuzzer's. Half of the changes to JSON are those of test_fuzz.py,
since bytes that are no JSON do not get far. Needs the extra `fuzz` (atheris).
"""

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sculptor"]):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from fuzz.readers import make_readers
    from fuzz.test_fuzz import damaged_json


def mutate(content: bytes, most: int, seed: int) -> bytes:
    """Another content, of at most so many bytes."""
    choose = random.Random(seed)
    if choose.random() < 0.5:
        try:
            return damaged_json(content, choose)[:most]
        except (ValueError, RecursionError):  # no JSON
            pass
    return bytes(atheris.Mutate(content, most))


def main() -> None:
    """Runs libFuzzer on one reader."""
    name = sys.argv.pop(1)
    reader = make_readers(Path(tempfile.mkdtemp()))[name]
    corpus = Path(tempfile.mkdtemp())
    (corpus / "sound").write_bytes(reader.sound)
    atheris.Setup(
        [*sys.argv, str(corpus)], lambda content: reader.try_bytes(bytes(content)) and None, custom_mutator=mutate
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
