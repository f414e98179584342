"""Sequence to sequence: BART in transformers' Seq2SeqTrainer, judged by what it generates.

A small BART with random weights learns to repeat its input backwards. Encoder, decoder and the
attention between them share one budget, and keep what they need of it.

    python examples/seq2seq_bart.py
"""

import tempfile
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

import rankflow as rf

START, END, LENGTH = 1, 2, 4
ROWS = torch.randint(3, 16, (256, LENGTH), generator=torch.Generator().manual_seed(0))


def build_base() -> BartForConditionalGeneration:
    """Return the same random model at every call."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=16,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=16,
        dropout=0.0,
        init_std=0.1,
        pad_token_id=0,
        bos_token_id=START,
        eos_token_id=END,
        decoder_start_token_id=START,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config)


def build_data(rows: torch.Tensor) -> Dataset:
    """Return rows, and the same rows backwards as what to say."""
    labels = [[*row.tolist(), END] for row in rows.flip(1)]
    return Dataset.from_dict({"input_ids": rows.tolist(), "labels": labels})


def share_of_right_rows(judged: Any) -> dict[str, float]:
    """Count the rows that were generated without a fault, the start token left out."""
    said = judged.predictions[:, 1 : LENGTH + 1]
    return {"right": float(np.mean((said == judged.label_ids[:, :LENGTH]).all(axis=1)))}


def main() -> None:
    config = LoraConfig(
        r=16,
        use_dora=True,
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        task_type=TaskType.SEQ_2_SEQ_LM,
    )
    model = get_peft_model(build_base(), config)
    callback = rf.RankFlowCallback(rf.load_budget("hybrid", rank=8))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Seq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(
                output_dir=folder,
                max_steps=300,
                per_device_train_batch_size=64,
                learning_rate=1e-2,
                logging_steps=100,
                predict_with_generate=True,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=build_data(ROWS[:192]),
            eval_dataset=build_data(ROWS[192:]),
            compute_metrics=share_of_right_rows,
            callbacks=[callback],
        )
        trainer.train()
        flow = callback.flow
        print(f"{flow.spent:,} of {flow.limit:,} parameters")
        for site, rank in flow.ranks.items():
            print(f"  {site:45} {rank}")
        metrics = trainer.evaluate(max_new_tokens=LENGTH + 1)
        print(f"{metrics['eval_right']:.0%} of unseen rows come out right")
        adapter = rf.export_adapter(model, f"{folder}/adapter", facts=flow.facts())
        loaded = PeftModel.from_pretrained(build_base(), adapter).eval()
    batch = {"input_ids": ROWS, "labels": ROWS}
    with torch.no_grad():
        here, there = (m.eval()(**batch).logits for m in (model, loaded))
    print(f"stock PEFT differs by at most {(here - there).abs().max():.1e}")


if __name__ == "__main__":
    main()
