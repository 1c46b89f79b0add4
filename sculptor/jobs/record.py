"""How every sculptor.json begins."""

from typing import Any

import torch

from sculptor import __version__


def record_head(command: str, **versions: str) -> dict[str, Any]:
    """Program, versions and command; `versions` of what else was used."""
    import safetensors
    import transformers

    common = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }
    return {"created_by": f"sculptor {__version__}", "versions": common | versions, "command": command}
