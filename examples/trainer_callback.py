"""RankFlow in any transformers Trainer: one callback.

A small BERT with random weights learns which of two tokens a sequence repeats, under a budget that
falls from 1.5 times the target to the target.

    python examples/trainer_callback.py
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import rankflow as rf

STEPS = 60


def build_data(rows: int = 256) -> Dataset:
    """Return sequences of one repeated token; the label tells which half it is from."""
    tokens = torch.arange(rows) % 64
    return Dataset.from_dict(
        {"input_ids": [[int(t)] * 8 for t in tokens], "labels": (tokens >= 32).long().tolist()}
    )


def main() -> None:
    torch.manual_seed(0)
    base = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    targets = ["query", "key", "value", "dense"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type=TaskType.SEQ_CLS)
    model = get_peft_model(base, config)

    with tempfile.TemporaryDirectory() as folder:
        callback = rf.RankFlowCallback(rf.load_budget("prune", rank=2))
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, max_steps=STEPS, learning_rate=1e-2, use_cpu=True
            ),
            train_dataset=build_data(),
            callbacks=[callback],
        )
        trainer.train()
    flow = callback.flow
    print(f"{len(flow.history)} reallocations, {flow.spent:,} of {flow.limit:,} parameters")
    for site, rank in flow.ranks.items():
        print(f"  {site:45} {rank}")


if __name__ == "__main__":
    main()
