"""Keep the measured plan in the folder of a run: a restart reads it instead of measuring again."""

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from ..harness.machine import describe_machine
from ..harness.run_folder import read_json_or_none, write_json
from ..training.sharding import sharded_by
from .plan import RunPlan

PLAN = "plan.json"
"""Name of the file."""
_FORMAT = 1


def circumstances(device: torch.device, processes: int, data: dict[str, str]) -> dict[str, Any]:
    """Return what a plan depends on besides the recipe and its sources, which `run.json` holds.

    Args:
        device: device of the run.
        processes: number of processes.
        data: fingerprints of the texts.
    """
    return {
        **describe_machine(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "sharded_by": sharded_by(),
        "data": data,
    }


def read_plan(folder: Path, here: dict[str, Any]) -> RunPlan | None:
    """Return the plan that a run keeps in its folder; None if there is none, or one of other :func:`circumstances`."""
    kept = read_json_or_none(folder / PLAN)
    if not isinstance(kept, dict) or kept.get("format") != _FORMAT or kept.get("circumstances") != here:
        return None
    try:
        return TypeAdapter(RunPlan).validate_python(kept.get("plan"))
    except ValidationError:
        return None


def keep_plan(folder: Path, plan: RunPlan, here: dict[str, Any]) -> None:
    """Write the plan of a run into its folder; the file appears complete or not at all."""
    write_json(folder / PLAN, {"format": _FORMAT, "circumstances": here, "plan": plan.as_mapping()})
