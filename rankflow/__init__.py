"""RankFlow: LoRA and DoRA adapters whose ranks follow a parameter budget while they train."""

from rankflow.engine import RankFlow as RankFlow
from rankflow.specs.budget import load_budget as load_budget
