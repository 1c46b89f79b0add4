"""Linear maps that give X and dY: the gradients of a plain one, whoever asks, and no full-size gradient where it is not needed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_checkpoint, task_rows, write_rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sculptor
from sculptor import AnalyzeSettings, Archive
from sculptor.errors import TrainingError
from sculptor.methods.rule import OuterProduct, Working
from sculptor.methods.sides import Side
from sculptor.methods.staircase import StaircaseRule
from sculptor.model.load import checkpoint_activations
from sculptor.numerics.free_space import MANY_TOKENS
from sculptor.training import linear
from sculptor.training.linear import can_hand_over, hand_over
from sculptor.training.protect import protected_matrices
from sculptor.training.stepping.narrowing import narrowed_numbers, narrowed_side

COVERS = ["sculptor.training.stepping.narrowing"]
M, N = 24, 16
RULE = StaircaseRule((M, N), ((8, N), (M, 8)), Side("leading", 8), Side("free", 8))


def plain(bias: bool, generator: torch.Generator) -> nn.Linear:
    made = nn.Linear(N, M, bias=bias, dtype=torch.float64)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(N,), (5, N), (2, 3, N)])
def test_gradients_are_those_of_torch(bias: bool, shape: tuple[int, ...], generator: torch.Generator) -> None:
    module = plain(bias, generator)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.randn(*shape[:-1], M, dtype=torch.float64, generator=generator)
    (module(x) * weights).sum().backward()
    assert x.grad is not None
    assert module.weight.grad is not None
    expected, dx, db = module.weight.grad, x.grad, module.bias.grad if bias else None
    x.grad = module.weight.grad = None
    if bias:
        module.bias.grad = None
    given: list[OuterProduct] = []
    over = hand_over(module, RULE, given.append, torch.device("cpu"))
    (module(x) * weights).sum().backward()
    (product,) = given
    torch.testing.assert_close(product.outputs.T @ product.inputs, expected)
    torch.testing.assert_close(x.grad, dx)
    if bias:
        torch.testing.assert_close(module.bias.grad, db)
    assert module.weight.grad is None
    over.remove()
    module(x).sum().backward()
    assert module.weight.grad is not None
    assert len(given) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(N,), (5, N), (2, 3, N)])
def test_a_model_may_go_on_in_place(bias: bool, shape: tuple[int, ...], generator: torch.Generator) -> None:
    """As LED does with its queries."""
    module = plain(bias, generator)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    (module(x) / 3).square().sum().backward()
    assert x.grad is not None
    expected, x.grad = x.grad, None
    hand_over(module, RULE, lambda product: None, torch.device("cpu"))
    found = module(x)
    found /= 3
    found.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_an_input_without_a_gradient_stops_nothing(generator: torch.Generator) -> None:
    module, given = plain(False, generator).requires_grad_(False), []  # type: ignore[var-annotated]
    hand_over(module, RULE, given.append, torch.device("cpu"))
    x = torch.randn(5, N, dtype=torch.float64, generator=generator)
    module(x).sum().backward()
    assert len(given) == 1
    with torch.no_grad():
        assert not module(x).requires_grad


def test_only_what_runs_as_torch_has_it_is_handed_over() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Named(nn.Linear):
        """As it is."""

    hooked = nn.Linear(2, 2)
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    assert [can_hand_over(each) for each in (nn.Linear(2, 2), Named(2, 2), Scaled(2, 2), hooked, nn.Identity())] == [
        True, True, False, False, False,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("linear")
    save_checkpoint(path / "model")
    write_rows(path / "rows.jsonl", task_rows())
    sculptor.analyze(path / "model", path / "archive", AnalyzeSettings(preserve=0.5, samples=False, device="cpu"))
    return path


def load(made: Path, protected: bool = True, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float32).train()
    return sculptor.protect(model, made / "archive", **options) if protected else model


def gradients(model: Any, run: Any = None) -> dict[str, Tensor]:
    ids = torch.arange(60).view(2, 30) % 50
    for a in model.parameters():
        a.grad = None
    (model if run is None else run)(input_ids=ids, labels=ids).loss.backward()
    return {m.coordinates.name: m.coordinates.values[0].grad for m in protected_matrices(model)}  # type: ignore[misc]


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()), msg=name)


@pytest.fixture
def expected(made: Path) -> dict[str, Tensor]:
    """Of full-size gradients, turned in float64 as the archive's rules say."""
    model, archive = load(made, protected=False), Archive(made / "archive")
    ids = torch.arange(60).view(2, 30) % 50
    model(input_ids=ids, labels=ids).loss.backward()
    found = {}
    for name in archive.open_names:
        entry, gradient = archive.read(name), model.get_parameter(name).grad.double()
        tensors = entry.rule.prepare(entry.tensors, Working(torch.device("cpu"), torch.float64)).tensors
        (projected,) = entry.rule.project(torch.empty(0), tensors, [], gradient)
        found[name] = projected.float()
    return found


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at that of folded weights
@pytest.mark.parametrize("way", ["plain", "checkpointed", "copied", "by-weight", "compiled"])
def test_a_protected_model_has_the_gradients_of_full_ones(
    way: str, made: Path, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = load(made), None
    if way == "checkpointed":
        checkpoint_activations(model)
    elif way == "copied":
        model = copy.deepcopy(model)
    elif way == "by-weight":  # as code that never calls the module
        for matrix in protected_matrices(model):
            module = matrix.module
            module.forward = lambda x, module=module: x @ module.weight.mT  # type: ignore[method-assign, misc]
    elif way == "compiled":
        run = torch.compile(model, backend="eager")
    taken: list[OuterProduct] = []
    multiply = linear.multiply
    monkeypatch.setattr("sculptor.training.stack.multiply", lambda *a: (taken.append(a[0]), multiply(*a))[1])  # type: ignore[func-returns-value]
    assert_alike(gradients(model, run), expected)
    assert bool(taken) == (way not in ("by-weight", "compiled"))


@pytest.mark.parametrize("keeps", ["forward", "bias"])
def test_what_others_keep_of_a_module_runs_when_it_is_merged(keeps: str, made: Path) -> None:
    model = load(made, protected=False)
    module = model.model.layers[0].mlp.up_proj
    if keeps == "bias":  # its class stays one of parametrized modules
        module.bias = nn.Parameter(torch.zeros(module.out_features))
        nn.utils.parametrize.register_parametrization(module, "bias", nn.Identity())
    sculptor.protect(model, made / "archive")
    if keeps == "forward":
        kept = module.forward
        module.forward = lambda x: kept(x)
    expected = model(input_ids=torch.arange(9)[None]).logits
    sculptor.merge(model)
    torch.testing.assert_close(model(input_ids=torch.arange(9)[None]).logits, expected)


def test_what_is_frozen_is_not_projected(made: Path) -> None:
    """As where a LoRA is trained on top, or biases alone."""

    def flops(model: Any) -> int:
        model.requires_grad_(False)
        module = model.model.layers[0].self_attn.q_proj
        module.bias = nn.Parameter(torch.zeros(module.out_features))
        ids = torch.arange(60).view(2, 30) % 50
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        assert module.bias.grad is not None
        return int(counter.get_total_flops())

    folded = load(made)
    folded(input_ids=torch.arange(9)[None])
    assert flops(folded) == flops(load(made, protected=False))


def test_gradients_of_gradients_want_whole_ones(made: Path) -> None:
    ids = torch.arange(18).view(2, 9)

    def penalty(model: Any) -> Tensor:
        model.set_attn_implementation("eager")
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs_embeds=embedded, labels=ids).loss, embedded, create_graph=True)
        return slope.square().sum()

    with pytest.raises(TrainingError, match="full_gradients=True"):
        penalty(load(made))
    model = load(made, full_gradients=True)
    penalty(model).backward()
    assert all(m.coordinates.values[0].grad is not None for m in protected_matrices(model)[:-1])


def test_a_module_that_is_used_twice_gets_both_gradients(made: Path) -> None:
    model = load(made)
    module = protected_matrices(model)[0].module
    (a,) = protected_matrices(model)[0].coordinates.values
    x = torch.randn(6, module.in_features, generator=torch.Generator().manual_seed(0))  # type: ignore[call-overload]
    module(x).sum().backward()
    assert a.grad is not None
    once = a.grad.clone()
    a.grad = None
    (module(x).sum() + checkpoint(module, x, use_reentrant=False).sum() + (x @ module.weight.mT).sum()).backward()
    torch.testing.assert_close(a.grad, 3 * once)


@pytest.mark.parametrize("narrowed", [True, False])
def test_autocast_makes_the_products_that_it_made(
    narrowed: bool, made: Path, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of weights of its own dtype, as `train` has them on a GPU, they are narrow; of others it makes its own."""
    model = load(made, compute_dtype=torch.bfloat16 if narrowed else None)
    taken: list[Tensor] = []
    multiply = linear.multiply
    monkeypatch.setattr("sculptor.training.stack.multiply", lambda *a: (taken.append(a[0]), multiply(*a))[1])  # type: ignore[func-returns-value]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model)
    assert bool(taken) == narrowed
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_less_is_multiplied_than_with_full_gradients(made: Path) -> None:
    def flops(model: Any) -> int:
        gradients(model)  # folds
        with FlopCounterMode(display=False) as counter:
            gradients(model)
        return int(counter.get_total_flops())

    narrow, full = load(made), load(made)
    for matrix in protected_matrices(full):
        module = matrix.module
        module.forward = lambda x, module=module: nn.functional.linear(x, module.weight, module.bias)  # type: ignore[method-assign, misc]
    assert flops(narrow) < flops(full)


def test_computing_again_stops_before_the_last_product(made: Path) -> None:
    """As it does for functions of torch's own."""

    def again(model: Any) -> int:
        found = []
        for _ in range(2):
            gradients(model)  # folds
            with FlopCounterMode(display=False) as counter:
                gradients(model)
            found.append(int(counter.get_total_flops()))
            checkpoint_activations(model)
        return found[1] - found[0]

    narrow, full = load(made), load(made)
    for matrix in protected_matrices(full):
        module = matrix.module
        module.forward = lambda x, module=module: nn.functional.linear(x, module.weight, module.bias)  # type: ignore[method-assign, misc]
    assert again(narrow) == again(full)


def test_processes_add_up_what_is_less() -> None:
    assert narrowed_side(RULE) == "input"
    narrow, shown = narrowed_numbers(RULE, "input")
    assert (narrow, shown) == (M * 8, N * 8)
    assert narrow + shown <= M * N
    nothing = StaircaseRule((M, N), ((1, N), (M, 1)), Side("leading", 1), Side("leading", 1))
    assert nothing.order(MANY_TOKENS) == "after"
    assert narrowed_side(nothing) is None
