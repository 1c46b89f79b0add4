"""Fuzzing guided by coverage: python tests/fuzz/bytes.py READER [-runs=100000] [-rss_limit_mb=2048] [-timeout=60]

READER is one of those in readers.py; the other arguments are libFuzzer's. Needs the extra `fuzz` (atheris).
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sculptor"]):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from fuzz.readers import make_readers


def main() -> None:
    """Runs libFuzzer on one reader."""
    name = sys.argv.pop(1)
    reader = make_readers(Path(tempfile.mkdtemp()))[name]
    corpus = Path(tempfile.mkdtemp())
    (corpus / "sound").write_bytes(reader.sound)
    atheris.Setup([*sys.argv, str(corpus)], lambda content: reader.try_bytes(bytes(content)) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
