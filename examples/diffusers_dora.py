"""DoRA on a diffusion model, its ranks under a budget, and loaded back by diffusers.

A small UNet with random weights learns to remove noise from pictures of bars, by adapters on its
attention and its convolutions. The result is a folder for `pipeline.load_lora_weights`.

    python examples/diffusers_dora.py
"""

import tempfile

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch.nn import functional

import rankflow as rf

STEPS = 120
TARGETS = ["conv1", "conv2", "to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv_in", "conv_out"]


def build_unet() -> UNet2DConditionModel:
    """Return the same random UNet at every call, of one channel and 8 by 8 pixels."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=8,
        norm_num_groups=4,
    )


def draw_bars(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pictures of one vertical bar each, and a prompt embedding that says where it is."""
    place = torch.randint(8, (count,), generator=generator)
    columns = functional.one_hot(place, 8).float()
    pictures = (2 * columns - 1).view(count, 1, 1, 8).expand(count, 1, 8, 8)
    return pictures, columns.unsqueeze(1)  # (count, 1 channel, 8, 8), (count, 1 token, 8)


def main() -> None:
    config = LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=TARGETS)
    model = get_peft_model(build_unet(), config)
    budget = rf.load_budget("hybrid", rank=4, every=10)
    flow = rf.RankFlow(model, budget, total_steps=STEPS)
    scheduler = DDPMScheduler(num_train_timesteps=100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    generator = torch.Generator().manual_seed(1)

    for step in range(1, STEPS + 1):
        pictures, prompts = draw_bars(16, generator)
        noise = torch.randn(pictures.shape, generator=generator)
        times = torch.randint(100, (16,), generator=generator)
        noisy = scheduler.add_noise(pictures, noise, times)
        loss = functional.mse_loss(model(noisy, times, prompts).sample, noise)
        loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        event = flow.step(optimizer)
        if event is not None:
            print(
                f"step {step}  loss {loss.item():.3f}  spent {event.spent:,} of {event.limit:,}  "
                f"pruned {len(event.pruned)}, born {len(event.born)}"
            )

    ranks = flow.ranks.values()
    print(f"ranks {min(ranks)} to {max(ranks)} at {len(ranks)} sites, loss {loss.item():.3f}")
    with tempfile.TemporaryDirectory() as folder:
        rf.export_adapter(model, folder, format="diffusers", facts=flow.facts())
        loaded = build_unet()  # of a pipeline: pipeline.load_lora_weights(folder)
        loaded.load_lora_adapter(folder, prefix="unet", use_safetensors=True)
    with torch.no_grad():
        here = model.eval()(noisy, times, prompts).sample
        there = loaded.eval()(noisy, times, prompts).sample
    print(f"diffusers differs by at most {(here - there).abs().max():.1e}")


if __name__ == "__main__":
    main()
