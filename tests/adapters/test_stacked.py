import peft
import pytest
import transformers
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rankflow.adapters.sites import find_sites
from rankflow.adapters.stacked import find_stacked_weights
from rankflow.engine import RankFlow
from rankflow.errors import SiteError
from rankflow.specs.budget import load_budget

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def qwen():
    """PEFT leaves its routed experts out of "all-linear" without a word."""
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=12, shared_expert_intermediate_size=8
    )
    return transformers.Qwen2MoeForCausalLM(config)


def mixtral():
    """PEFT turns "all-linear" into target_parameters for its experts."""
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def test_stacked_experts_are_found_with_their_parameters():
    experts = "model.layers.{}.mlp.experts.{}"
    assert find_stacked_weights(qwen()) == {
        experts.format(layer, name): size
        for layer in range(2)
        for name, size in (("gate_up_proj", 4 * 24 * 16), ("down_proj", 4 * 16 * 12))
    }


@pytest.mark.parametrize(
    "base",
    [
        nn.Sequential(nn.Conv1d(2, 3, 4), nn.Linear(3, 3)),
        nn.Sequential(weight_norm(nn.Conv1d(2, 3, 4)), nn.Linear(3, 3)),
        transformers.ViTModel(transformers.ViTConfig(**{**SIZES, "image_size": 32})),
    ],
    ids=["convolution", "convolution under a weight norm", "class token and positions"],
)
def test_other_weights_of_three_dimensions_are_no_stack(base):
    assert any(parameter.ndim >= 3 for parameter in base.parameters())
    assert find_stacked_weights(base) == {}


def test_the_engine_names_experts_that_stay_frozen():
    model = peft.get_peft_model(qwen(), peft.LoraConfig(r=2, target_modules="all-linear"))
    said = r"4 stacked weights, 4,608 parameters.*layers\.0\.mlp\.experts\.gate_up_proj.*1 more"
    with pytest.warns(UserWarning, match=said):
        flow = RankFlow(model, load_budget("prune", rank=1), total_steps=20)
    assert any("shared_expert" in site for site in flow.ranks)
    assert not any(".experts" in site for site in flow.ranks)


# PEFT sets patterns for what it turns into target_parameters, and then warns of them.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_an_adapter_on_stacked_experts_is_refused_with_what_to_write_instead():
    model = peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(SiteError, match=r"no linear layer.*leave target_parameters out.*q_proj"):
        find_sites(model)
