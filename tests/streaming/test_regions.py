"""Where bytes wait: layouts, host memory and files."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sculptor.errors import OutputError
from sculptor.streaming.layout import ALIGNMENT, Layout
from sculptor.streaming.regions import FileRegion, HostRegion, Region, Scratch
from sculptor.streaming.transfers import Staging

CPU = torch.device("cpu")
SIZE = 20_000
ENTRIES = [
    ("a", torch.float32, (3, 5)),
    ("b", torch.bfloat16, (7,)),
    ("c", torch.float64, ()),
    ("d", torch.int8, (1,)),
    ("e", torch.float32, (0, 4)),
    ("f", torch.float32, (64,)),
]


def file_region(path: Path, num_bytes: int = SIZE) -> FileRegion:
    return FileRegion(path, num_bytes, Staging(CPU, 1024), Staging(CPU, 1024))


def noise(num_bytes: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=["host", "file"])
def region(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Region]:
    made = HostRegion(SIZE, pinned=False) if request.param == "host" else file_region(tmp_path / "region")
    yield made
    made.close()


def test_tensors_of_a_layout_are_aligned_and_apart() -> None:
    layout = Layout(ENTRIES)
    assert list(layout) == [name for name, _, _ in ENTRIES]
    end = 0
    for name, dtype, shape in ENTRIES:
        place = layout[name]
        assert (place.dtype, place.shape) == (dtype, shape)
        assert place.start % ALIGNMENT == 0
        assert end <= place.start < end + ALIGNMENT
        assert place.stop - place.start == dtype.itemsize * torch.Size(shape).numel()
        end = place.stop
    assert layout.num_bytes % ALIGNMENT == 0
    assert end <= layout.num_bytes < end + ALIGNMENT


def test_views_share_the_memory_they_are_given(generator: torch.Generator) -> None:
    layout = Layout(ENTRIES)
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    values = {name: torch.randn(shape, generator=generator).mul(50).to(dtype) for name, dtype, shape in ENTRIES}
    for name, view in layout.views(memory).items():
        view.copy_(values[name])
    for name, value in values.items():
        found = layout.view(memory, name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert torch.equal(found, value), name
    assert Layout.of(values).num_bytes == layout.num_bytes
    assert dict(Layout.of(values)) == dict(layout)


def test_an_empty_layout_has_no_bytes() -> None:
    assert Layout([]).num_bytes == 0
    assert Layout([]).views(torch.empty(0, dtype=torch.uint8)) == {}


def test_a_new_region_holds_zeros(region: Region) -> None:
    found = torch.ones(SIZE, dtype=torch.uint8)
    region.load(found, 0)
    assert not found.any()


def test_any_range_comes_back_as_it_went(region: Region, generator: torch.Generator) -> None:
    expected = torch.zeros(SIZE, dtype=torch.uint8)
    for start, stop in ((0, SIZE), (5, 6), (1000, 9000), (SIZE - 3, SIZE), (4096, 4096), (0, 1)):
        part = noise(stop - start, generator)
        expected[start:stop] = part
        region.store(part, start)
        part.zero_()  # what was stored is a copy
        found = torch.empty(SIZE, dtype=torch.uint8)
        region.load(found, 0)
        assert torch.equal(found, expected)
        within = torch.empty(stop - start, dtype=torch.uint8)
        region.load(within, start)
        assert torch.equal(within, expected[start:stop])


def test_a_file_is_removed_when_it_is_closed(tmp_path: Path) -> None:
    region = file_region(tmp_path / "region")
    assert (tmp_path / "region").stat().st_size == SIZE
    region.close()
    assert not (tmp_path / "region").exists()
    region.close()


def test_an_old_file_of_that_name_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "region").write_bytes(b"left over" * 10_000)
    region = file_region(tmp_path / "region")
    found = torch.ones(SIZE, dtype=torch.uint8)
    region.load(found, 0)
    assert not found.any()
    assert (tmp_path / "region").stat().st_size == SIZE
    region.close()


def test_a_closed_host_region_holds_nothing() -> None:
    region = HostRegion(SIZE, pinned=False)
    region.close()
    assert region.memory.numel() == 0


def test_no_room_for_a_file_is_one_line(tmp_path: Path, small_disk: None) -> None:
    with pytest.raises(OutputError, match=r"region: cannot write .File too large.; free some space"):
        file_region(tmp_path / "region", 1 << 20)


def test_a_disk_that_fills_up_is_one_line(tmp_path: Path, small_disk: None) -> None:
    region = file_region(tmp_path / "region", 65536)
    region.store(torch.zeros(65536, dtype=torch.uint8), 0)
    with pytest.raises(OutputError, match=r"region: cannot write .File too large.; free some space"):
        region.store(torch.zeros(4096, dtype=torch.uint8), 65536 - 100)
    region.close()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        file_region(tmp_path / "nowhere" / "region")


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_scratch_makes_the_regions_of_its_tier(tier: str, tmp_path: Path) -> None:
    scratch = Scratch(tier, tmp_path / "scratch", CPU)  # type: ignore[arg-type]
    assert not (tmp_path / "scratch").exists()  # not before there is something to keep
    region = scratch.region("state-0", 100)
    assert isinstance(region, FileRegion if tier == "disk" else HostRegion)
    assert (tmp_path / "scratch" / "state-0").exists() == (tier == "disk")
    region.close()
    assert not (tmp_path / "scratch" / "state-0").exists()
