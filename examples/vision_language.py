"""A vision-language model: LLaVA's shape, with the vision tower left as it is.

A small CLIP tower and a small Llama with random weights learn to say, after an image, which of its
corners is bright. The DoRA adapter sits on the projector and on the language model, and both share
one budget.

    python examples/vision_language.py
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import rankflow as rf

SIZE, PATCH = 8, 4
CORNERS = (SIZE // PATCH) ** 2
IMAGE, WHERE, FIRST_ANSWER = 1, 2, 3  # tokens
STEPS = 80


def build_base() -> LlavaForConditionalGeneration:
    """Return the same random model at every call."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
    )
    text = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def build_batch(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Return noisy images with one bright corner, and the question and answer behind them.

    A sequence is a token for each patch of the image, "where", and the corner; only the corner
    counts in the loss.
    """
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, CORNERS, (rows,), generator=generator)
    images = 0.3 * torch.randn(rows, 3, SIZE, SIZE, generator=generator)
    for image, corner in zip(images, corners.tolist(), strict=True):
        row, column = divmod(corner, SIZE // PATCH)
        image[:, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)] += 2
    question = torch.tensor([IMAGE] * CORNERS + [WHERE]).expand(rows, -1)
    input_ids = torch.cat([question, FIRST_ANSWER + corners.unsqueeze(1)], dim=1)
    labels = input_ids.clone()
    labels[:, : CORNERS + 1] = -100
    return {"pixel_values": images, "input_ids": input_ids, "labels": labels}


def main() -> None:
    config = LoraConfig(
        r=8,
        use_dora=True,
        target_modules=r".*(language_model.*_proj|multi_modal_projector\.linear_\d)",
    )
    model = get_peft_model(build_base(), config)
    flow = rf.RankFlow(model, rf.load_budget("hybrid", rank=3), total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, STEPS + 1):
        loss = model(**build_batch(32, seed=step)).loss
        loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
        if step % 20 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    print(f"{flow.spent:,} of {flow.limit:,} parameters")
    for site, rank in flow.ranks.items():
        print(f"  {site:50} {rank}")

    with tempfile.TemporaryDirectory() as folder:
        adapter = rf.export_adapter(model, f"{folder}/adapter", facts=flow.facts())
        loaded = PeftModel.from_pretrained(build_base(), adapter).eval()
    unseen = build_batch(64, seed=0)
    with torch.no_grad():
        here, there = (m.eval()(**unseen).logits for m in (model, loaded))
    right = there[:, -2].argmax(-1) == unseen["input_ids"][:, -1]
    print(f"{right.float().mean():.0%} of unseen images are described right")
    print(f"stock PEFT differs by at most {(here - there).abs().max():.1e}")


if __name__ == "__main__":
    main()
