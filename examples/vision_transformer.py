"""A vision transformer: image classification under a budget.

A small ViT with random weights learns to tell where in an image a bright patch is. Its DoRA adapter
starts above the budget and is pruned to it, patch embedding (a convolution) included.

    python examples/vision_transformer.py
"""

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import rankflow as rf

SIZE, PATCH = 8, 4
PLACES = (SIZE // PATCH) ** 2


def build_base() -> ViTForImageClassification:
    """Return the same random model at every call."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=PATCH,
        num_channels=1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=PLACES,
        initializer_range=0.1,
    )
    return ViTForImageClassification(config)


def build_images(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noisy images, ``(rows, 1, 8, 8)``, and the place of the bright patch in each."""
    generator = torch.Generator().manual_seed(rows)
    places = torch.arange(rows) % PLACES
    patches = 0.5 * torch.randn(rows, PLACES, PATCH, PATCH, generator=generator)
    patches[torch.arange(rows), places] += 2
    grid = SIZE // PATCH
    images = patches.view(rows, grid, grid, PATCH, PATCH).transpose(2, 3)
    return images.reshape(rows, 1, SIZE, SIZE), places


def main() -> None:
    images, places = build_images(320)
    config = LoraConfig(
        r=8,
        use_dora=True,
        target_modules=["projection", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
        modules_to_save=["classifier"],
    )
    model = get_peft_model(build_base(), config)
    callback = rf.RankFlowCallback(rf.load_budget("hybrid", rank=3))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=120,
                per_device_train_batch_size=32,
                learning_rate=1e-2,
                logging_steps=40,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(
                {"pixel_values": images.tolist(), "labels": places.tolist()}
            ),
            callbacks=[callback],
        )
        trainer.train()
        flow = callback.flow
        print(f"{flow.spent:,} of {flow.limit:,} parameters")
        for site, rank in flow.ranks.items():
            print(f"  {site:55} {rank}")
        adapter = rf.export_adapter(model, f"{folder}/adapter", facts=flow.facts())
        loaded = PeftModel.from_pretrained(build_base(), adapter).eval()
    unseen, places = build_images(64)
    with torch.no_grad():
        here, there = (m.eval()(pixel_values=unseen).logits for m in (model, loaded))
    print(f"{(there.argmax(-1) == places).float().mean():.0%} of unseen images are told right")
    print(f"stock PEFT differs by at most {(here - there).abs().max():.1e}")


if __name__ == "__main__":
    main()
