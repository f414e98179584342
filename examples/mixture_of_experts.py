"""A mixture of experts: every expert is a site, and the budget goes where tokens go.

A layer with eight experts, each a linear layer, serves two kinds of input of which one is nine
times as frequent. An expert without tokens in a step has no gradient there. The budget, rank 2 a
site, ends at the experts that are used.

transformers keeps the experts of its own models in stacked tensors, which no adapter on layers
reaches; shared_experts.py shows what is adapted there.

    python examples/mixture_of_experts.py
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import rankflow as rf

SIZE, EXPERTS, STEPS = 32, 8, 200
FREQUENT, RARE = (0, 1, 2), (3, 4)  # the experts that each kind of input is sent to
COMMON_SHARE = 0.9


class MixtureOfExperts(nn.Module):
    """Adds to each token what its expert says of it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(EXPERTS))

    def forward(self, x: Tensor, expert_of: Tensor) -> Tensor:
        """Return the outputs, shape ``(tokens, SIZE)``, of tokens with an expert each."""
        y = x.clone()
        for number in expert_of.unique().tolist():
            chosen = (expert_of == number).nonzero().flatten()
            y = y.index_add(0, chosen, self.experts[number](x[chosen]))
        return y


def build_base() -> MixtureOfExperts:
    """Return the same random model at every call."""
    torch.manual_seed(0)
    return MixtureOfExperts()


def route(tokens: int) -> Tensor:
    """Return an expert for each token, shape ``(tokens,)``; rare inputs come in few batches."""
    kind = FREQUENT if torch.rand(()) < COMMON_SHARE else RARE
    return torch.tensor(kind)[torch.randint(len(kind), (tokens,))]


def build_teacher() -> MixtureOfExperts:
    """Return the base with a change of rank 4 in every expert."""
    teacher = build_base()
    with torch.no_grad():
        for expert in teacher.experts:
            expert.weight += torch.randn(SIZE, 4) @ torch.randn(4, SIZE) / SIZE
    return teacher


def main() -> None:
    teacher = build_teacher()
    config = LoraConfig(r=8, use_dora=True, target_modules=r"experts\.\d")
    model = get_peft_model(build_base(), config)
    flow = rf.RankFlow(model, rf.load_budget("reallocate", rank=2), total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    served = torch.zeros(EXPERTS, dtype=torch.long)
    for step in range(1, STEPS + 1):
        x, expert_of = torch.randn(64, SIZE), route(64)
        served += expert_of.bincount(minlength=EXPERTS)
        with torch.no_grad():
            target = teacher(x, expert_of)
        loss = (model(x, expert_of) - target).square().mean()
        loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    print(f"{flow.spent:,} of {flow.limit:,} parameters")
    for (site, rank), tokens in zip(flow.ranks.items(), served.tolist(), strict=True):
        print(f"  {site}  {tokens:5} tokens  rank {rank}")

    with tempfile.TemporaryDirectory() as folder:
        adapter = rf.export_adapter(model, f"{folder}/adapter", facts=flow.facts())
        loaded = PeftModel.from_pretrained(build_base(), adapter)
    with torch.no_grad():
        batch = torch.randn(64, SIZE), torch.arange(64) % EXPERTS
        difference = (model.eval()(*batch) - loaded.eval()(*batch)).abs().max()
    print(f"stock PEFT differs by at most {difference:.1e}")


if __name__ == "__main__":
    main()
