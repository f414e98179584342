import peft
import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import SFTConfig, SFTTrainer

from rankflow.errors import RankFlowError
from rankflow.export.peft import export_adapter
from rankflow.integrations.huggingface import RankFlowCallback
from rankflow.report.events import read_events
from rankflow.specs.budget import BudgetSpec

# TRL's own default is an argument that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "the", "rank", "of", "a", "site", "moves", "and", "stays"]
BUDGET = BudgetSpec(
    rank=1.5, start=2, schedule="cubic", warmup=2, cooldown=3, every=3, recycle=0.2, protect=1
)


def make_tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def make_base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def make_data():
    texts = ["the rank of a site moves", "a site stays and the rank moves", "the site moves"]
    return Dataset.from_dict({"text": texts * 6})


def make_trainer(folder, callback, *, use_dora, **settings):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=use_dora
    )
    return SFTTrainer(
        model=make_base(),
        args=SFTConfig(
            **{
                "output_dir": str(folder),
                "max_steps": 12,
                "per_device_train_batch_size": 3,
                "gradient_accumulation_steps": 2,
                "learning_rate": 0.02,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "bf16": False,
                "max_length": 16,
            }
            | settings
        ),
        train_dataset=make_data(),
        processing_class=make_tokenizer(),
        peft_config=config,
        callbacks=[callback],
    )


def adapter_parameters(model):
    return [p for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad]


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[1, 4, 5, 6, 7, 8, 9, 2]])).logits


def test_sft_ends_within_the_budget_and_its_adapter_loads_in_stock_peft(tmp_path, use_dora):
    callback = RankFlowCallback(BUDGET)
    trainer = make_trainer(tmp_path, callback, use_dora=use_dora)
    trainer.train()
    flow = callback.flow
    assert flow.steps == 12
    assert [event.step for event in flow.history] == [2, 5, 8, 9]
    assert flow.spent == sum(p.numel() for p in adapter_parameters(trainer.model)) <= flow.limit
    assert flow.limit == flow.resolved.target
    assert len(set(flow.ranks.values())) > 1
    assert read_events(tmp_path / "events.jsonl") == flow.history
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    folder = export_adapter(trainer.model, tmp_path / "adapter", facts=flow.facts())
    stock = peft.PeftModel.from_pretrained(make_base(), folder)
    assert (logits_of(stock) - logits_of(trainer.model)).abs().max() <= 1e-5


def test_sft_checkpoints_load_in_stock_peft_and_are_not_resumed_silently(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    callback = RankFlowCallback(BUDGET)
    make_trainer(tmp_path, callback, use_dora=False, **settings).train()
    stock = peft.PeftModel.from_pretrained(make_base(), tmp_path / "checkpoint-8")
    held = {n: m.r["default"] for n, m in stock.named_modules() if hasattr(m, "lora_A")}
    at_8 = next(event.ranks for event in callback.flow.history if event.step == 8)
    alive = {f"base_model.model.{site}": rank for site, rank in at_8.items() if rank > 0}
    assert held == alive
    again = make_trainer(tmp_path, RankFlowCallback(BUDGET), use_dora=False, **settings)
    with pytest.raises(RankFlowError, match="resume with RankFlowTrainer"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
