"""Token classification: a tag for every word, with RankFlow in transformers' Trainer.

A small BERT with random weights learns to tag the words of a sequence by their kind. Its DoRA
adapter starts above its budget and is pruned to it; the head that is trained beside it, and is no
part of the budget, is saved with it.

    python examples/token_classification.py
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import BertConfig, BertForTokenClassification, TrainingArguments

import rankflow as rf

TAGS = 3
ROWS = torch.randint(1, 64, (128, 12), generator=torch.Generator().manual_seed(0))
LABELS = ROWS % TAGS


def build_base() -> BertForTokenClassification:
    """Return the same random model at every call."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        num_labels=TAGS,
    )
    return BertForTokenClassification(config)


def main() -> None:
    config = LoraConfig(
        r=8,
        use_dora=True,
        target_modules=["query", "key", "value", "dense"],
        task_type=TaskType.TOKEN_CLS,  # PEFT trains and saves the classifier for this task
    )
    model = get_peft_model(build_base(), config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = rf.RankFlowTrainer(
            budget=rf.load_budget("hybrid", rank=3),
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=80,
                per_device_train_batch_size=32,
                learning_rate=1e-2,
                logging_steps=40,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(
                {"input_ids": ROWS.tolist(), "labels": LABELS.tolist()}
            ),
        )
        trainer.train()
        flow = trainer.rankflow.flow
        print(f"{flow.spent:,} of {flow.limit:,} parameters, at ranks {list(flow.ranks.values())}")
        adapter = rf.export_adapter(model, f"{folder}/adapter", facts=flow.facts())
        loaded = PeftModel.from_pretrained(build_base(), adapter).eval()
    with torch.no_grad():
        here, there = (m.eval()(input_ids=ROWS).logits for m in (model, loaded))
    print(f"{(there.argmax(-1) == LABELS).float().mean():.0%} of the tags are right")
    print(f"stock PEFT differs by at most {(here - there).abs().max():.1e}")


if __name__ == "__main__":
    main()
