"""Speeds: what is given stands, what is not is measured where it can be, else assumed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sculptor.planning import speeds
from sculptor.planning.speeds import decomposition_seconds, measure_speeds

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NOTHING: dict[str, float | None] = {"tflops": None, "link": None, "disk": None}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured, which takes no time here."""
    calls: list[str] = []

    def noted(name: str, value: float) -> Any:
        def measure(*_: Any) -> float:
            calls.append(name)
            return value

        return measure

    for name, value in (("products", 0.5), ("link", 20.0), ("disk", 3.0), ("eigen", 0.125)):
        monkeypatch.setattr(speeds, f"_measure_{name}", noted(name, value))
    return calls


def test_what_is_given_is_not_measured(measured: list[str], tmp_path: Path) -> None:
    found, names = measure_speeds({"tflops": 7.0, "link": 8.0, "disk": 9.0}, GPU, True, tmp_path)
    assert found == {"tflops": 7.0, "float32": 7.0, "link": 8.0, "disk": 9.0, "eigen": 0.125}
    assert names == ()
    assert measured == ["eigen"]


@pytest.mark.parametrize(
    ("device", "here", "names", "expected"),
    [
        (GPU, True, ("tflops", "link", "disk"), (0.5, 20.0, 3.0)),
        (CPU, True, ("tflops", "disk"), (0.5, 25.0, 3.0)),
        (GPU, False, ("disk",), (300.0, 25.0, 3.0)),
    ],
)
def test_only_what_is_here_is_measured(
    device: torch.device, here: bool, names: tuple[str, ...], expected: tuple[float, ...], tmp_path: Path
) -> None:
    found, measured = measure_speeds(NOTHING, device, here, tmp_path)
    assert measured == names
    assert (found["tflops"], found["link"], found["disk"]) == expected


def test_a_full_disk_is_assumed_to_be_like_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_: Path) -> float:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(speeds, "_measure_disk", full)
    found, measured = measure_speeds(NOTHING, CPU, True, tmp_path)
    assert measured == ("tflops",)
    assert found["disk"] == 2.0


def test_what_is_not_multiplied_in_bfloat16_is_measured_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speeds, "_measure_products", lambda device, dtype: 0.4 if dtype == torch.bfloat16 else 0.2)
    found, _ = measure_speeds(NOTHING, CPU, True, tmp_path, torch.bfloat16)
    assert (found["tflops"], found["float32"]) == (0.4, 0.2)
    found, _ = measure_speeds(NOTHING, CPU, True, tmp_path, torch.float32)
    assert (found["tflops"], found["float32"]) == (0.2, 0.2)


def test_a_busy_cpu_is_not_taken_for_one_that_cannot_decompose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speeds, "_measure_eigen", lambda device: 60.0)
    found, _ = measure_speeds(NOTHING, CPU, True, tmp_path)
    assert found["eigen"] == pytest.approx(250 * 512**3 / 0.5e12)
    assert measure_speeds(NOTHING, GPU, True, tmp_path)[0]["eigen"] == 60.0


def test_decompositions_take_the_cube_of_the_smaller_side() -> None:
    assert decomposition_seconds((512, 512), 0.5, "cpu") == pytest.approx(0.5)
    assert decomposition_seconds((1024, 5000), 0.5, "cpu") == pytest.approx(4.0)
    assert decomposition_seconds((5000, 1024), 0.5, "cpu") == pytest.approx(4.0)
    assert decomposition_seconds((2048, 2048), 0.5, "cuda") == pytest.approx(0.5)
    assert decomposition_seconds((256, 300), 0.5, "cpu") == pytest.approx(0.0625)


def test_the_disk_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    assert speeds._measure_disk(tmp_path / "not" / "there") > 0
    assert not list(tmp_path.iterdir())
