"""IFEval (Zhou et al. 2023, arXiv 2311.07911): do answers follow instructions that a program can check? By lm-eval's checker."""

import contextlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from sculptor.distribution import extra
from sculptor.errors import DataError

Check = Callable[[Mapping[str, Any], str], Sequence[bool]]
MISSING = f"IFEval needs lm-eval's checker: {extra('harness')}"


def find_checker() -> Check | None:
    """Says of a row and an answer which of the row's instructions are followed, strictly; None where lm-eval is not installed."""
    try:
        said = io.StringIO()  # it fetches data, and tells of it
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            module = import_module("lm_eval.tasks.ifeval.utils")
    except ImportError:
        return None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def check(row: Mapping[str, Any], answer: str) -> Sequence[bool]:
        try:
            found = module.process_results({"key": 0} | dict(row), [answer])
            return [bool(each) for each in found["inst_level_strict_acc"]]
        except Exception as cause:  # of instructions it does not know, data of nltk that are not here
            reason = " ".join(str(cause).strip("* \n").split())[:200] or type(cause).__name__
            raise DataError(
                f"IFEval: lm-eval's checker cannot judge {row['instruction_id_list']} ({reason})"
            ) from cause

    return check
