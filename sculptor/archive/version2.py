"""archive.json of version 2 as one of version 3. Tensors stay where they are; the RMS of the matrices is not known."""

from collections.abc import Mapping
from typing import Any

from sculptor.methods.moments import curvature_scales


def upgrade(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts as version 3 has them; validated by whoever reads that.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: if something is missing or of another form.
    """
    settings = dict(content["settings"])
    settings["row_groups"] = settings.pop("steps")
    weights = [float(weight) for task in content["tasks"] for weight in task["details"].get("weights", ())]
    records = list(content["matrices"].values())
    scales = curvature_scales([(record["traces"], record["output"] is not None) for record in records], weights)
    return {
        "created_by": content["created_by"],
        "model_class": content["model_class"],
        "base_identity": content["base_identity"],
        "settings": settings | {"rule": "staircase"},
        "tasks": [_task(task) for task in content["tasks"]],
        "matrices": {
            name: _record(record, scale)
            for (name, record), scale in zip(content["matrices"].items(), scales, strict=True)
        },
        "tensors": content["tensors"],
        "files": content["files"],
        "not_targeted": content.get("not_targeted", []),
        "sections": {},
    }


def _task(task: Mapping[str, Any]) -> dict[str, Any]:
    details = dict(task["details"])
    weights, calibration = details.pop("weights", []), details.pop("calibration", [])
    return {
        "name": task["name"],
        "kind": task["kind"],
        "weights": weights,
        "calibration": calibration,
        "details": details,
    }


def _record(record: Mapping[str, Any], scale: float) -> dict[str, Any]:
    same = ("parameter", "block", "index", "role", "transposed", "input_group", "base_dtype", "base_digest")
    tensors: dict[str, str] = {}
    sides: dict[str, Any] = {}
    moments = record["input"] is not None and record["input"]["values"] is not None
    for name in ("output", "input"):
        side = record[name]
        sides[name] = side and {key: side[key] for key in ("form", "directions", "rest")}
        if side:
            tensors[name] = side["tensor"]
            if moments:
                tensors |= {f"{name}.values": side["values"], f"{name}.profiles": side["profiles"]}
    if record["spectrum"] is not None:
        tensors["spectrum"] = record["spectrum"]
    facts = ("shape", "steps", "retention", "importance", "energy", "added", "traces")
    rule = {key: record[key] for key in facts} | sides
    rule |= {"moments": moments, "spectrum": "spectrum" in tensors, "scale": scale, "kind": "staircase"}
    return {key: record[key] for key in same} | {
        "tensor": record["name"],
        "part": None,
        "base_rms": None,
        "rule": rule,
        "tensors": tensors,
    }
