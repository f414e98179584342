"""Supervised fine-tuning of a chat model with TRL: RankFlow is one callback.

A small Llama with random weights learns to name the colour of a fruit from conversations; the loss
counts the assistant's words alone. Its DoRA adapter keeps a constant budget and moves it around.

    python examples/sft_trl.py
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import rankflow as rf

COLOURS = {"banana": "yellow", "cherry": "red", "lime": "green", "plum": "blue"}
WORDS = ["<pad>", "<user>", "<assistant>", "<end>", "what", "colour", "is", "a", *COLOURS]
# What stands between the generation marks is the assistant's, and all that the loss counts.
TEMPLATE = """{% for message in messages -%}
<{{ message.role }}> {% if message.role == 'user' %}{{ message.content }} {% else -%}
{% generation %}{{ message.content }} <end>{% endgeneration %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<assistant> {% endif %}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, with a chat template."""
    words = [*WORDS, *COLOURS.values()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        chat_template=TEMPLATE,
    )


def build_base() -> LlamaForCausalLM:
    """Return the same random model at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + len(COLOURS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
    )
    return LlamaForCausalLM(config)


def ask(fruit: str) -> dict[str, str]:
    return {"role": "user", "content": f"what colour is a {fruit}"}


def main() -> None:
    tokenizer = build_tokenizer()
    rows = [
        {"messages": [ask(fruit), {"role": "assistant", "content": colour}]}
        for fruit, colour in COLOURS.items()
    ]
    callback = rf.RankFlowCallback(rf.load_budget("reallocate", rank=2, every=5))
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=build_base(),
            args=SFTConfig(
                output_dir=folder,
                max_steps=60,
                per_device_train_batch_size=4,
                learning_rate=1e-2,
                assistant_only_loss=True,
                report_to="none",
                disable_tqdm=True,
                logging_steps=20,
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, use_dora=True, target_modules="all-linear"),
            callbacks=[callback],
        )
        trainer.train()
        flow = callback.flow
        print(f"{len(flow.history)} reallocations, {flow.spent:,} of {flow.limit:,} parameters")
        adapter = rf.export_adapter(trainer.model, f"{folder}/adapter", facts=flow.facts())
        chat = PeftModel.from_pretrained(build_base(), adapter).eval()
    batch = tokenizer.apply_chat_template(
        [row["messages"] for row in rows], return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        here, there = (m.eval()(**batch).logits for m in (trainer.model, chat))
    print(f"stock PEFT differs by at most {(here - there).abs().max():.1e}")
    for fruit in COLOURS:
        prompt = tokenizer.apply_chat_template(
            [ask(fruit)], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = chat.generate(**prompt, max_new_tokens=2, do_sample=False)
        print(f"{fruit}: {tokenizer.decode(output[0, prompt['input_ids'].shape[1] :])}")


if __name__ == "__main__":
    main()
