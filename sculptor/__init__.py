"""Teaches a saved language model new tasks without making it forget.

The public API is what is named here; each function is what its command calls. Nothing heavy is imported before
a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sculptor.distribution import NAME

__version__ = "0.1.0"
__distribution__ = NAME  # by which the command knows this package from another one that is imported as `sculptor`

_HOMES = {
    "AnalyzeSettings": "sculptor.methods.settings",
    "BankSettings": "sculptor.edits.settings",
    "Choose": "sculptor.edits.settings",
    "EstimateSettings": "sculptor.planning.settings",
    "Archive": "sculptor.archive.store",
    "Interpolate": "sculptor.edits.settings",
    "Kind": "sculptor.methods.kinds",
    "Lines": "sculptor.edits.settings",
    "Project": "sculptor.edits.settings",
    "Prune": "sculptor.edits.settings",
    "SculptorCallback": "sculptor.tasks.callback",
    "SculptorError": "sculptor.errors",
    "Threshold": "sculptor.edits.settings",
    "TrainSettings": "sculptor.training.settings",
    "add_to_bank": "sculptor.tasks.bank",
    "analyze": "sculptor.tasks.analyze",
    "card": "sculptor.tasks.card",
    "chat": "sculptor.tasks.chat",
    "continual": "sculptor.benchmark.runner",
    "edit": "sculptor.tasks.edit",
    "estimate": "sculptor.tasks.estimate",
    "evaluate": "sculptor.tasks.evaluate",
    "export_task": "sculptor.tasks.bank",
    "frontier": "sculptor.benchmark.frontier",
    "harm": "sculptor.jobs.harm",
    "inspect": "sculptor.tasks.inspect_archive",
    "convert": "sculptor.tasks.convert",
    "merge": "sculptor.training.merging",
    "merge_adapter": "sculptor.tasks.adapter",
    "parameter_groups": "sculptor.training.rates",
    "protect": "sculptor.training.protect",
    "prune": "sculptor.tasks.prune",
    "push": "sculptor.tasks.push",
    "route": "sculptor.tasks.bank",
    "stream": "sculptor.tasks.stream",
    "train": "sculptor.tasks.train",
    "verify": "sculptor.tasks.verify",
    "preview": "sculptor.tasks.data",
}
__all__ = [
    "AnalyzeSettings",
    "Archive",
    "BankSettings",
    "Choose",
    "EstimateSettings",
    "Interpolate",
    "Kind",
    "Lines",
    "Project",
    "Prune",
    "SculptorCallback",
    "SculptorError",
    "Threshold",
    "TrainSettings",
    "__version__",
    "add_to_bank",
    "analyze",
    "card",
    "chat",
    "continual",
    "convert",
    "edit",
    "estimate",
    "evaluate",
    "export_task",
    "frontier",
    "harm",
    "inspect",
    "merge",
    "merge_adapter",
    "parameter_groups",
    "preview",
    "protect",
    "prune",
    "push",
    "route",
    "stream",
    "train",
    "verify",
]

if TYPE_CHECKING:
    from sculptor.archive.store import Archive
    from sculptor.benchmark.frontier import frontier
    from sculptor.benchmark.runner import continual
    from sculptor.edits.settings import BankSettings, Choose, Interpolate, Lines, Project, Prune, Threshold
    from sculptor.errors import SculptorError
    from sculptor.jobs.harm import harm
    from sculptor.methods.kinds import Kind
    from sculptor.methods.settings import AnalyzeSettings
    from sculptor.planning.settings import EstimateSettings
    from sculptor.tasks.adapter import merge_adapter
    from sculptor.tasks.analyze import analyze
    from sculptor.tasks.bank import add_to_bank, export_task, route
    from sculptor.tasks.callback import SculptorCallback
    from sculptor.tasks.card import card
    from sculptor.tasks.chat import chat
    from sculptor.tasks.convert import convert
    from sculptor.tasks.data import preview
    from sculptor.tasks.edit import edit
    from sculptor.tasks.estimate import estimate
    from sculptor.tasks.evaluate import evaluate
    from sculptor.tasks.inspect_archive import inspect
    from sculptor.tasks.prune import prune
    from sculptor.tasks.push import push
    from sculptor.tasks.stream import stream
    from sculptor.tasks.train import train
    from sculptor.tasks.verify import verify
    from sculptor.training.merging import merge
    from sculptor.training.protect import protect
    from sculptor.training.rates import parameter_groups
    from sculptor.training.settings import TrainSettings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sculptor' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
