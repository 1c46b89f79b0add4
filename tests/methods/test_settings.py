"""Every contradiction in what an analysis is told is one error that names the option."""

from dataclasses import asdict
from json import dumps
from typing import Any

import pytest

from sculptor import AnalyzeSettings
from sculptor.errors import SettingsError
from sculptor.methods.kinds import make_method
from sculptor.validation import read_json

CURVATURE: dict[str, Any] = {"basis": "curvature", "data": ("rows.jsonl",)}
INPUTS: dict[str, Any] = {"basis": "inputs", "data": ("rows.jsonl",)}
FOR_WEIGHTS = {"preserve", "constraint", "min_retention", "target_retention"}
WEIGHTS: dict[str, Any] = {"basis": "weights"}
RANDOM: dict[str, Any] = {"basis": "random", "preserve": 0.5}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        # Out of range.
        (CURVATURE | {"budget": 0.0}, r"--budget 0\.0: expected more than 0"),
        (CURVATURE | {"budget": 1.5}, r"--budget 1\.5: expected at most 1"),
        (CURVATURE | {"budget": -0.5}, r"--budget -0\.5: expected more than 0"),
        (CURVATURE | {"budget": float("nan")}, "--budget nan: expected a finite number"),
        (CURVATURE | {"budget": "0.5"}, r"--budget 0\.5: expected a number, found '0\.5'"),
        (CURVATURE | {"keep": 0.0}, r"--keep 0\.0: expected more than 0"),
        (CURVATURE | {"keep": 1.01}, r"--keep 1\.01: expected at most 1"),
        (CURVATURE | {"keep": float("nan")}, "--keep nan: expected a finite number"),
        (CURVATURE | {"calibration_tokens": 0}, "--calibration-tokens 0: expected at least 1"),
        (CURVATURE | {"device_memory": 0.0}, r"--device-memory 0\.0: expected more than 0"),
        (CURVATURE | {"device_memory": float("nan")}, "--device-memory nan: expected a finite number"),
        (CURVATURE | {"row_groups": 0}, "--row-groups 0: expected at least 1"),
        (CURVATURE | {"row_groups": 33}, "--row-groups 33: expected at most 32"),
        (CURVATURE | {"seed": -1}, "--seed -1: expected at least 0"),
        (CURVATURE | {"seed": 2**31}, "--seed 2147483648: expected at most"),
        ({"basis": "fisher"}, "--basis fisher: expected 'weights', 'inputs', 'curvature' or 'random'"),
        # Moments: what goes with ranks only.
        (CURVATURE | {"preserve": 0.5}, "--preserve without effect with --basis curvature: use --budget"),
        (INPUTS | {"preserve": 0.5}, "--preserve without effect with --basis inputs: use --budget"),
        (CURVATURE | {"preserve": 0.0}, "--preserve without effect"),
        (CURVATURE | {"constraint": "input"}, "--constraint without effect"),
        (CURVATURE | {"min_retention": 0.2}, "--min-retention without effect"),
        (INPUTS | {"target_retention": 0.7}, "--target-retention without effect"),
        (CURVATURE | {"constraint": "core", "preserve": 0.5}, "--constraint, --preserve without effect"),
        # Inputs alone: what goes with gradients only.
        (INPUTS | {"row_groups": 3}, "--row-groups without effect with --basis inputs"),
        (INPUTS | {"fisher": "sampled"}, "--fisher without effect with --basis inputs"),
        (INPUTS | {"weighting": "gradients"}, "--weighting without effect with --basis inputs"),
        # Ranks: what goes with moments only.
        (WEIGHTS | {"budget": 0.5}, "--budget without effect with --basis weights; use inputs or curvature"),
        (RANDOM | {"budget": 0.5}, "--budget without effect with --basis random"),
        (WEIGHTS | {"keep": 0.7}, "--keep without effect with --basis weights"),
        (WEIGHTS | {"row_groups": 3}, "--row-groups without effect with --basis weights"),
        (WEIGHTS | {"threshold": "model"}, "--threshold without effect with --basis weights"),
        (WEIGHTS | {"fisher": "sampled"}, "--fisher without effect with --basis weights"),
        (WEIGHTS | {"weighting": "gradients"}, "--weighting without effect with --basis weights"),
        (WEIGHTS | {"calibration_tokens": 1000}, "--calibration-tokens without effect with --basis weights"),
        (WEIGHTS | {"device_memory": 4.0}, "--device-memory without effect with --basis weights"),
        (WEIGHTS | {"data": ("self",)}, "--data self without effect with --basis weights"),
        ({"basis": "random", "data": ("self",)}, "--data self without effect with --basis random"),
        (RANDOM | {"data": ("rows.jsonl",)}, "--data without effect: --preserve fixes the rank"),
        ({"preserve": 0.5, "target_retention": 0.7}, "--target-retention without effect"),
        # Sampled text.
        (CURVATURE | {"chat": True}, "--chat without effect: it samples conversations for --data self"),
        (WEIGHTS | {"chat": True}, "--chat without effect with --basis weights"),
        # Options of the weights' directions choose these.
        ({"preserve": 0.5, "budget": 0.5}, "--budget without effect with --basis weights"),
    ],
)
def test_contradictions_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        make_method(AnalyzeSettings(**wrong))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_archive_keeps_names_of_which_two_files_may_have_one() -> None:
    for given in ({"basis": "curvature"}, {"rule": "lowrank"}):
        make_method(AnalyzeSettings(**given, data=("rows.jsonl", "rows.jsonl")))


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        AnalyzeSettings(preserve=1.5, keep=2.0, row_groups=0)
    for option in ("--preserve", "--keep", "--row-groups"):
        assert option in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        make_method(AnalyzeSettings(basis="inputs", preserve=0.5, row_groups=3))
    for option in ("--preserve", "--row-groups"):
        assert option in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"constraint": "triple"},
        CURVATURE | {"threshold": "models"},
        CURVATURE | {"fisher": "samples"},
        CURVATURE | {"weighting": "gradient"},
        CURVATURE | {"dtype": "float46"},
    ],
    ids=["constraint", "threshold", "fisher", "weighting", "dtype"],
)
def test_unknown_words_are_refused(wrong: dict[str, Any]) -> None:
    """A plan can say any word, so the settings have to know theirs."""
    option = "--" + next(name for name in wrong if name not in CURVATURE)
    with pytest.raises(SettingsError, match=option):
        make_method(AnalyzeSettings(**wrong))


@pytest.mark.parametrize(
    "right",
    [
        {},
        {"chat": True},
        {"budget": 0.5},
        WEIGHTS,
        {"preserve": 0.0},
        {"data": ("rows.jsonl",), "min_retention": 0.2},
        RANDOM,
        CURVATURE,
        CURVATURE | {"budget": 1.0, "keep": 1.0, "row_groups": 1, "threshold": "model", "fisher": "sampled"},
        CURVATURE | {"data": ("self",), "chat": True, "weighting": "gradients"},
        CURVATURE | {"data": ("rows.jsonl", "self")},
        INPUTS | {"budget": 0.5, "calibration_tokens": 1},
    ],
)
def test_what_fits_is_taken_and_survives_the_manifest(right: dict[str, Any]) -> None:
    settings = AnalyzeSettings(**right)
    assert make_method(settings).terms.basis == right.get(
        "basis", "weights" if FOR_WEIGHTS & set(right) else "curvature"
    )
    text = dumps(asdict(settings))  # type: ignore[call-overload]
    assert read_json(AnalyzeSettings, text, "archive.json", SettingsError, "") == settings
    assert settings.free_budget == right.get("budget", 0.6)


def test_sources_share_the_tokens() -> None:
    settings = AnalyzeSettings(basis="inputs", data=("a.jsonl", "b.jsonl", "self"), calibration_tokens=100)
    assert settings.tokens_per_source == 34
    assert AnalyzeSettings().tokens_per_source == 100_000
