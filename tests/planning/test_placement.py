"""What is lacking, what would help, and how much of a full disk is one's own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sculptor.errors import SettingsError
from sculptor.planning import placement
from sculptor.planning.footprints import Footprint
from sculptor.planning.placement import (
    Shortage,
    available_disk,
    available_memory,
    check_waiting,
    choose,
    existing,
    remedy,
    shortages,
)
from sculptor.training.settings import Offload

CPU = torch.device("cpu")
MEMORY, DISK = "free memory or use a larger machine", "free some space or choose another place"
ROWS = "lower --micro-batch-size or --max-length"


def plan(offload: Offload = "none", **parts: Any) -> Footprint:
    found: dict[str, Any] = {"device": {}, "host": {}, "disk": {}} | parts
    return Footprint(offload, operations=1.0, folding=1.0, **found)


def room(monkeypatch: pytest.MonkeyPatch, device: float, host: float, disk: float) -> None:
    """A machine with so many bytes free."""
    monkeypatch.setattr(placement, "available_memory", lambda _: (device, host))
    monkeypatch.setattr(placement, "available_disk", lambda _: disk)


def test_nine_tenths_of_memory_and_all_of_a_disk_are_to_be_had() -> None:
    assert not Shortage("memory", 89.9, 100.0).exists
    assert Shortage("memory", 90.1, 100.0).exists
    assert not Shortage("disk", 100.0, 100.0).exists
    assert Shortage("disk", 100.1, 100.0).exists


def test_fewer_rows_help_where_the_rest_fits() -> None:
    assert Shortage("GPU memory", 120.0, 100.0, 40.0).yields
    assert not Shortage("GPU memory", 120.0, 100.0, 20.0).yields
    assert not Shortage("host memory", 120.0, 100.0).yields


@pytest.mark.parametrize(
    ("needed", "free", "text"),
    [(3.25e9, 1e9, "3.2 GB of memory (1.0 GB free)"), (5e7, 1e5, "50.0 MB of memory (0.1 MB free)")],
)
def test_a_shortage_is_said_in_units_that_suit(needed: float, free: float, text: str) -> None:
    assert str(Shortage("memory", needed, free)) == text


@pytest.mark.parametrize(
    ("lacking", "advice"),
    [
        ({"none": [("memory", 0.0)]}, MEMORY),
        ({"none": [("memory", 90.0)]}, ROWS),
        ({"none": [("memory", 0.0)], "disk": [("memory", 90.0)]}, ROWS),
        ({"none": [("disk", 0.0)]}, DISK),
        ({"none": [("memory", 0.0), ("disk", 0.0)], "cpu": [("memory", 0.0), ("disk", 0.0)]}, f"{MEMORY} and {DISK}"),
        ({"cpu": [("memory", 0.0)], "disk": [("disk", 0.0)]}, f"{ROWS}, or {DISK}"),
        ({"cpu": [("memory", 0.0)], "disk": [("memory", 0.0), ("disk", 0.0)]}, MEMORY),
    ],
)
def test_the_remedy_is_for_what_every_way_lacks(lacking: dict[str, list[tuple[str, float]]], advice: str) -> None:
    found = {name: [Shortage(what, 120.0, 100.0, rows) for what, rows in items] for name, items in lacking.items()}
    assert remedy(found) == advice


def test_a_gpu_and_its_host_are_counted_apart() -> None:
    both = plan(device={"activations": 30.0, "weights": 70.0}, host={"activation checkpoints": 5.0, "bases": 45.0})
    gpu = shortages(both, "cuda", 50.0, 40.0, 0.0)
    assert [(s.what, s.needed, s.free, s.of_rows) for s in gpu] == [
        ("GPU memory", 100.0, 50.0, 30.0),
        ("host memory", 50.0, 40.0, 5.0),
    ]
    (cpu,) = shortages(both, "cpu", 100.0, 100.0, 0.0)
    assert (cpu.what, cpu.needed, cpu.of_rows) == ("memory", 150.0, 35.0)
    assert shortages(both, "cuda", 200.0, 200.0, 0.0) == []
    (disk,) = shortages(plan(disk={"a": 1.0, "b": 2.0}), "cpu", 1.0, 1.0, 2.5)
    assert (disk.what, disk.needed) == ("disk", 3.0)


def test_what_a_killed_run_left_is_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks: a file with holes takes less than it is long."""
    room(monkeypatch, 1e12, 1e12, 0.0)
    found = {"none": plan(disk={"output": 50_000.0})}
    with pytest.raises(SettingsError, match="does not fit"):
        choose(found, CPU, "none", tmp_path, tmp_path / "out.partial")
    (tmp_path / "out.partial" / "state").mkdir(parents=True)
    with open(tmp_path / "out.partial" / "state" / "holes", "wb") as file:
        file.truncate(10**8)
    with pytest.raises(SettingsError, match="does not fit"):
        choose(found, CPU, "none", tmp_path, tmp_path / "out.partial")
    (tmp_path / "out.partial" / "state" / "full").write_bytes(b"x" * 60_000)
    assert choose(found, CPU, "none", tmp_path, tmp_path / "out.partial")[0] is found["none"]
    with pytest.raises(SettingsError, match="does not fit"):
        choose(found, CPU, "none", tmp_path)


def test_resident_is_doubted_but_done_streamed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 1e9, 1e9, 1e9)
    found = {name: plan(name, device={"weights": 2e9}) for name in ("none", "cpu", "disk")}  # type: ignore[arg-type]
    _, reason = choose(found, CPU, "none", tmp_path)
    assert reason == "--offload none, as asked, though it may need 2.0 GB of memory (1.0 GB free)"
    for asked in ("cpu", "disk", "auto"):
        with pytest.raises(SettingsError, match=rf"--offload {asked}: does not fit: .*; {MEMORY}$"):
            choose(found, CPU, asked, tmp_path)  # type: ignore[arg-type]
    found["disk"] = plan("disk")
    chosen, reason = choose(found, CPU, "auto", tmp_path)
    assert chosen is found["disk"]
    assert reason == (
        "--offload auto picks disk: none needs 2.0 GB of memory (1.0 GB free); cpu needs 2.0 GB of memory (1.0 GB free)"
    )


def test_a_place_that_is_not_there_yet_is_its_parent(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b" / "c") == tmp_path
    (tmp_path / "a").mkdir()
    assert existing(tmp_path / "a" / "b" / "c") == tmp_path / "a"
    assert existing(tmp_path) == tmp_path
    assert available_disk(tmp_path / "a" / "b" / "c") == pytest.approx(available_disk(tmp_path), rel=0.1)


def test_a_disk_that_does_not_say_is_no_reason_to_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))  # type: ignore[attr-defined]
    assert available_disk(tmp_path) == float("inf")


def test_a_container_s_limit_counts_and_cached_files_are_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever version of control groups there is; one without a limit says nothing."""
    group = "/sys/fs/cgroup/memory.max"
    files = {
        group: "1000000",
        "/sys/fs/cgroup/memory.current": "700000",
        "/sys/fs/cgroup/memory.stat": "anon 400000\nactive_file 100000\ninactive_file 50000\nother 9\n",
    }

    def read(self: Path, *_: Any, **__: Any) -> str:
        if str(self) not in files:
            raise FileNotFoundError(str(self))
        return files[str(self)]

    monkeypatch.setattr(Path, "read_text", read)
    assert available_memory(CPU) == (450_000.0, 450_000.0)
    files[group] = "max\n"
    assert available_memory(CPU)[1] > 1e6
    files[group] = "1000000"
    del files["/sys/fs/cgroup/memory.stat"]
    assert available_memory(CPU)[1] > 1e6, "what cannot be told is not counted"


def test_room_for_what_waits_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, 0.0, 1e9, 1e9)
    check_waiting(plan("cpu", device={"blocks": 1e12}, host={"weights": 8e8}), tmp_path)
    with pytest.raises(SettingsError, match=r'--offload cpu needs 2.0 GB of host memory .*; use offload="disk"$'):
        check_waiting(plan("cpu", host={"weights": 2e9}), tmp_path)
    with pytest.raises(SettingsError, match=rf"--offload disk needs 2.0 GB of host memory .*; {MEMORY}$"):
        check_waiting(plan("disk", host={"copies": 2e9}), tmp_path)
    for offload in ("cpu", "disk"):
        with pytest.raises(SettingsError, match=rf"needs 2.0 GB of disk .*; free some space in {tmp_path}$"):
            check_waiting(plan(offload, disk={"weights": 2e9}), tmp_path)
