"""From rows to what is known of every matrix: sources by their weights, one object per input, figures before scaling."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file, save_file

from sculptor import AnalyzeSettings
from sculptor.analysis import evidence as module
from sculptor.analysis.calibration import MeasuredMoments, measure_moments
from sculptor.analysis.evidence import Source, measure_evidence, weigh
from sculptor.checkpoint.reader import open_checkpoint
from sculptor.data.examples import IGNORED, Example
from sculptor.errors import CheckpointError
from sculptor.methods.method import Evidence, Measures, Moment
from sculptor.model.load import LoadedModel, load_model
from sculptor.progress import silent

CPU = torch.device("cpu")
SETTINGS = AnalyzeSettings(basis="curvature", data=("x",), device="cpu", seed=5)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model to measure."""
    return load_model(open_checkpoint(save_checkpoint(tmp_path_factory.mktemp("evidence") / "model")), CPU)


def rows(seed: int, count: int = 4) -> tuple[Example, ...]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(4, 44, (count, 7), generator=generator).tolist()
    return tuple(Example(tuple(ids), (IGNORED, *ids[1:])) for ids in drawn)


def gather(
    loaded: LoadedModel,
    sources: Sequence[Source],
    measures: Measures = "gradients",
    settings: AnalyzeSettings = SETTINGS,
    **more: Any,
) -> dict[str, Evidence]:
    targets = more.pop("targets", loaded.architecture.targets)
    passes = measure_evidence(loaded, targets, sources, measures, settings, silent, **more)
    found = list(itertools.chain.from_iterable(passes))
    assert [item.name for item in found] == [target.name for target in targets], "in the order of the model"
    return {item.name: item for item in found}


def alone(loaded: LoadedModel, examples: Sequence[Example], seed: int, gradients: bool = True) -> MeasuredMoments:
    """One source, as it is measured."""
    bar = silent(total=1, desc="", unit="")
    weighting = "gradients" if gradients else "tokens"
    targets = loaded.architecture.targets
    return measure_moments(
        loaded, targets, examples, gradients=gradients, labels="true", weighting=weighting, seed=seed, bar=bar
    )


def value(moment: Moment | None) -> torch.Tensor:
    assert moment is not None
    return moment.value.double()


@pytest.mark.parametrize("measures", ["inputs", "gradients"])
def test_moments_are_sums_of_unit_trace_by_weight(loaded: LoadedModel, measures: Measures) -> None:
    parts, weights, gradients = (rows(1), rows(2, 6), rows(3, 2)), (1.0, 0.25, 3.0), measures == "gradients"
    sources = [Source(str(i), part, weight) for i, (part, weight) in enumerate(zip(parts, weights, strict=True))]
    found = gather(loaded, sources, measures)
    measured = [alone(loaded, part, SETTINGS.seed + i, gradients) for i, part in enumerate(parts)]
    for target in loaded.architecture.targets:
        sides = [([m.inputs[target.input_group] for m in measured], found[target.name].inputs)]
        if gradients:
            sides.append(([m.outputs[target.name] for m in measured], found[target.name].outputs))
        for moments, made in sides:
            expected = sum(w * m.double() / m.double().trace() for w, m in zip(weights, moments, strict=True))
            torch.testing.assert_close(value(made), torch.as_tensor(expected), rtol=1e-4, atol=1e-6)
            assert float(value(made).trace()) == pytest.approx(sum(weights), rel=1e-5)


@pytest.mark.parametrize("measures", ["inputs", "gradients"])
def test_traces_are_those_before_scaling(loaded: LoadedModel, measures: Measures) -> None:
    parts, gradients = (rows(1), rows(2, 6)), measures == "gradients"
    found = gather(loaded, [Source("a", parts[0], 2.0), Source("b", parts[1])], measures)
    measured = [alone(loaded, part, SETTINGS.seed + i, gradients) for i, part in enumerate(parts)]
    for target in loaded.architecture.targets:
        traces = found[target.name].traces
        assert len(traces) == 2
        for (of_inputs, of_outputs), moments in zip(traces, measured, strict=True):
            assert of_inputs == pytest.approx(float(moments.inputs[target.input_group].trace()), rel=1e-5)
            expected = float(moments.outputs[target.name].trace()) if gradients else 0.0
            assert of_outputs == pytest.approx(expected, rel=1e-5)
            assert of_inputs > 0


def test_who_reads_one_input_gets_one_object(loaded: LoadedModel) -> None:
    found = gather(loaded, [Source("a", rows(1))])
    by_group: dict[str, set[int]] = {}
    for target in loaded.architecture.targets:
        made = found[target.name]
        assert made.inputs is not None
        by_group.setdefault(target.input_group, set()).add(id(made.inputs))
    assert len(by_group) == 8, "q, k, v; o; gate, up; down, in two blocks"
    assert all(len(objects) == 1 for objects in by_group.values())
    assert len(set.union(*by_group.values())) == 8
    outputs = [item.outputs for item in found.values()]
    assert len({id(item) for item in outputs}) == 14, "what each writes is its own"


@pytest.mark.parametrize("measures", ["inputs", "gradients"])
def test_only_what_was_asked_for_is_there(loaded: LoadedModel, measures: Measures) -> None:
    for made in gather(loaded, [Source("a", rows(1))], measures, task=3).values():
        assert (made.outputs is None) == (measures == "inputs")
        assert (made.cosine, made.update) == (None, None)
        assert made.task == 3


def test_weights_are_read_when_they_are_asked_for(loaded: LoadedModel) -> None:
    found = gather(loaded, [Source("a", rows(1))])
    for target in loaded.architecture.targets:
        weight = found[target.name].weight()
        assert weight.dtype == torch.float64
        assert weight.shape == target.shape == found[target.name].shape
        assert torch.equal(weight, loaded.checkpoint[target.tensor].double())


def test_a_transposed_weight_is_out_by_in(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "gpt2", "gpt2"))
    loaded = load_model(checkpoint, CPU)
    target = next(target for target in loaded.architecture.targets if target.transposed)
    assert torch.equal(weigh(checkpoint, target, CPU)(), checkpoint[target.tensor].double().T)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model")
    loaded = load_model(open_checkpoint(path), CPU)
    target = loaded.architecture.targets[3]
    tensors = load_file(path / "model.safetensors")
    tensors[target.tensor][0, 0] = float("inf")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    reads = weigh(open_checkpoint(path), target, CPU)
    with pytest.raises(CheckpointError, match=target.tensor):
        reads()


def test_a_weight_of_zero_trace_is_no_division(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*arguments: Any, **options: Any) -> MeasuredMoments:
        found = measure_moments(*arguments, **options)
        for side in (found.inputs, found.outputs):
            for moment in side.values():
                moment.zero_()
        return found

    monkeypatch.setattr(module, "measure_moments", nothing)
    for made in gather(loaded, [Source("a", rows(1)), Source("b", rows(2))]).values():
        assert not bool(value(made.inputs).any())
        assert made.traces == ((0.0, 0.0), (0.0, 0.0))


def test_each_source_has_a_seed_of_its_own(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[int, str, str]] = []

    def noted(*arguments: Any, **options: Any) -> MeasuredMoments:
        seeds.append((options["seed"], options["labels"], options["weighting"]))
        return measure_moments(*arguments, **options)

    monkeypatch.setattr(module, "measure_moments", noted)
    sources = [Source("a", rows(1)), Source("b", rows(2))]
    gather(loaded, sources)
    gather(loaded, sources, "inputs", replace(SETTINGS, fisher="sampled"))
    gather(loaded, sources[:1], "gradients", replace(SETTINGS, weighting="tokens"))
    assert seeds == [
        (5, "true", "gradients"),
        (6, "true", "gradients"),
        (5, "sampled", "tokens"),
        (6, "sampled", "tokens"),
        (5, "true", "tokens"),
    ]


def test_little_memory_reads_the_rows_more_often_to_the_same_end(loaded: LoadedModel) -> None:
    seen: dict[str, list[list[int]]] = {"calibrate": [], "derive": []}  # totals and counts, a pair for each memory

    class Bar:
        def __init__(self, pair: list[int]) -> None:
            self.pair = pair

        def update(self, count: int = 1) -> None:
            self.pair[1] += count

        def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...

        def close(self) -> None: ...

    def counted(total: int, desc: str, unit: str, initial: int = 0) -> Any:
        if not initial:
            seen[desc].append([total, 0])
        assert seen[desc][-1] == [total, initial], "each goes on where the one before ended"
        return Bar(seen[desc][-1])

    sources, found = [Source("a", rows(1)), Source("b", rows(2, 6))], []
    model_gb = sum(p.nbytes for p in loaded.model.parameters()) / 1e9
    for memory in (None, 1e-9 + model_gb):
        settings = replace(SETTINGS, device_memory=memory)
        targets = loaded.architecture.targets
        passes = measure_evidence(loaded, targets, sources, "gradients", settings, counted)
        made = itertools.chain.from_iterable(passes)
        found.append({item.name: (value(item.inputs), value(item.outputs), item.traces) for item in made})
    assert seen["calibrate"] == [[10, 10], [20, 20]], "a pass per block"
    assert seen["derive"] == [[len(targets)] * 2] * 2
    for name, (inputs, outputs, traces) in found[0].items():
        torch.testing.assert_close(found[1][name][0], inputs)
        torch.testing.assert_close(found[1][name][1], outputs)
        for one, two in zip(found[1][name][2], traces, strict=True):
            assert one == pytest.approx(two)
