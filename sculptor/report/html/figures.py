"""Figures of matrices that several pages show as heat maps."""

from collections.abc import Iterable, Sequence

from sculptor.model.harm import Harm, NamedHarm
from sculptor.numerics.rounding import ROUNDING_SLACK
from sculptor.report.html.heat import Spot, by_block_and_role
from sculptor.report.html.page import Markup
from sculptor.report.text import first_text, percent


def harm_tile(harm: Harm | None, named: Sequence[NamedHarm] = ()) -> list[tuple[str, str, str | None]]:
    """What a model lost of its first base's own predictions, and of protected names, where that was measured."""
    if harm is None:
        return []
    found = [
        ("Harm", f"{harm.nats:.4f} ± {harm.error:.4f}", f"nats a token, KL(base || new), {harm.num_samples} samples"),
        ("At the first token", first_text(harm), "nats, by which an answer begins"),
    ]
    for each in named:
        told = f"change of the loss; KL {each.harm.nats:.4f} nats a token, {each.harm.num_samples} rows"
        found.append((f"Of {each.name}", f"{each.rise:+.4f} ± {each.rise_error:.4f}", told))
    return [*found]


def leak_spot(name: str, role: str, update: float, leak: float, rounding: float, *, holds: bool = True) -> Spot:
    """The leak of a matrix in units of what rounding explains; no value where nothing changed."""
    told = f"leak {leak:.2e}, rounding explains {rounding:.2e}, update {update:.1e}" + (
        "" if holds else ", does NOT hold"
    )
    if not update:
        return Spot(name, role, None, "did not change" if holds else told, not holds)
    return Spot(name, role, leak / rounding if rounding else (float("inf") if leak else 0.0), told, not holds)


def leak_map(spots: list[Spot]) -> list[Markup]:
    """Leak against what rounding explains."""
    return by_block_and_role(
        "Leak against what rounding explains",
        "1.00: storing the result explains all of it. Faint is good.",
        spots,
        _ratio,
        lambda value: (value - 1) / (ROUNDING_SLACK - 1),
        ("explained", f"{ROUNDING_SLACK:g} times and above"),
        largest=True,
    )


def update_map(spots: list[Spot]) -> list[Markup]:
    """Size of the updates."""
    most = max((spot.value or 0.0 for spot in spots), default=0.0)
    return by_block_and_role(
        "Size of the update",
        "Norm of the change, in % of that of the matrix.",
        spots,
        _hundredths,
        lambda value: value / most if most else 0.0,
        ("0", f"{_hundredths(most)} %"),
    )


def share_map(caption: str, explained: str, shares: Iterable[tuple[str, str, float]]) -> list[Markup]:
    """Shares from 0 to 1 of matrices, given by name and role."""
    return by_block_and_role(
        caption,
        f"{explained} In %.",
        [Spot(name, role, share, percent(share)) for name, role, share in shares],
        lambda value: f"{100 * value:.0f}",
        lambda value: value,
        ("0 %", "100 %"),
    )


def _hundredths(value: float) -> str:
    share = 100 * value
    return "0" if not share else f"{share:.1f}" if share >= 1 else f"{share:.2f}" if share >= 0.01 else f"{share:.0e}"


def _ratio(value: float) -> str:
    if value == float("inf"):
        return "∞"
    return f"{value:.2f}" if value < 100 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
