"""What tests of the planner share: configs of well-known models, written from public knowledge."""

import json
from pathlib import Path
from typing import Any

import pytest

from torchinfer.planner.options import PlanOptions
from torchinfer.planner.planner import Placement, Plan, plan

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"


class Models:
    """Plans of these models, whole or changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str, **changes: Any) -> Path:
        """The config of a model, with some keys changed."""
        raw = json.loads((CONFIGS / f"{name}.json").read_text())
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(raw | changes))
        return path

    def plan(self, name: str, **options: Any) -> Plan:
        return plan(PlanOptions(model=CONFIGS / f"{name}.json", **{"dtype": "bfloat16", **options}))

    def placement(self, name: str, accelerator: str, topology: str, **options: Any) -> Placement:
        return self.plan(name, accelerator=accelerator, topology=topology, **options).placements[0]


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)
