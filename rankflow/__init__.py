"""RankFlow: LoRA and DoRA adapters whose ranks follow a parameter budget while they train."""
