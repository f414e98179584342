"""A training step with DoRA: RankFlow's forward against PEFT's DoRA and PEFT's LoRA.

The same as the command ``rankflow bench``.

    python examples/benchmarks/dora_step.py
"""

from rich.console import Console

from rankflow.bench.cases import choose_cases
from rankflow.bench.run import run_bench

if __name__ == "__main__":
    run_bench(choose_cases(), console=Console())
