"""Bad budgets, of runs and of loops of one's own: refused with the key and the fix."""

from pathlib import Path

import numpy as np
import peft
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import rankflow
from rankflow.errors import RankFlowError

# What is set in a run spec; words that name the key; words that give the fix.
RUN_MISTAKES = [
    ("budget=3", "budget = 3", "must be a table"),
    ("budget.preset=hybird", "budget.preset", "did you mean 'hybrid'?"),
    ("budget.preset=none.toml", "none.toml cannot be read", "name a TOML file that exists"),
    ("budget.rank=0", "budget.rank = 0", "must be greater than 0"),
    ("budget.rank=nan", "budget.rank = NaN", "must be a finite number"),
    ("budget.rank=1e300", "budget.rank = 1e+300", "must be less than 1000000000"),
    ("budget.rank=100", "rank = 100: the target budget", "choose a budget in between"),
    ("budget.rank=0.01", "rank = 0.01: the target budget", "choose a budget in between"),
    ("budget.rank=0.2", "rank = 0.2: the target budget", "(their minimum ranks and magnitudes)"),
    ("budget.params=1", "params = 1: the target budget", "choose a budget in between"),
    ("budget.params=99999999", "params = 1e+08: the target", "choose a budget in between"),
    ("budget.fraction=1e-9", "fraction = 1e-09: the target", "choose a budget in between"),
    ("budget.fraction=1", "budget.fraction = 1", "must be less than 1"),
    ("budget.bytes=3", "bytes = 3: the target budget", "choose a budget in between"),
    ("budget.bytes=-8", "budget.bytes = -8", "must be greater than 0"),
    ("budget.bytes='4 kB'", 'budget.bytes = "4 kB"', "must be a valid integer"),
    ("budget.start=99", "start = 99: the start budget", "choose a budget in between"),
    ("budget.start=0.01", "start = 0.01: the start budget", "choose a budget in between"),
    ("budget.start=nan", "budget.start = NaN", "must be a finite number"),
    ("budget.schedule=constant", "budget.start", "set start = 1, or another schedule"),
    ("budget.schedule=cubik", "budget.schedule", "did you mean 'cubic'?"),
    ("budget.stages=2", "budget.stages = 2", "set schedule = 'step'"),
    ("budget.warmup=12", "warmup_steps=12", "shorten one of them"),
    ("budget.cooldown=12", "cooldown_steps=12", "shorten one of them"),
    ("budget.warmup=1.5", "budget.warmup = 1.5", "a whole number of steps"),
    ("budget.every=0", "budget.every = 0", "must be greater than 0"),
    ("train.max_steps=4", "total_steps=4", "shorten one of them"),
    ("budget.min_rank=3", "need at least", "or other bounds"),
    ("budget.max_rank=0", "hold at most", "or other bounds"),
    ("budget.bounds={qeury={min_rank=1}}", "'qeury' in bounds", "the first is 'bert."),
    ("budget.bounds={query={min_rnk=1}}", "bounds.query.min_rnk", "did you mean 'min_rank'?"),
    ("budget.bounds={query={}}", "budget.bounds.query", "set min_rank or max_rank"),
    ("budget.policy=frozen", "budget.ranks", "the frozen policy needs ranks, such as"),
    ("budget.ranks={query=2}", "budget.ranks", "set policy = 'frozen'"),
    (("budget.policy=frozen", "budget.ranks={qeury=2}"), "'qeury' in ranks", "the first is"),
    (("budget.policy=frozen", "budget.ranks={query=2}"), "frozen ranks", "give every site a rank"),
    (("budget.policy=frozen", "budget.ranks={'.*'=99}"), "rank 99", "must lie between 0 and"),
    (("budget.policy=frozen", "budget.ranks={'.*'=4}"), "frozen rank", "raise the budget or use"),
    (
        ("adapter.use_dora=false", "budget.policy=frozen", "budget.ranks={'.*'=0}"),
        "ranks: all are 0",
        "give a site a rank",
    ),
    (
        ("adapter.use_dora=false", "budget.magnitude=budgeted"),
        "magnitude = 'budgeted'",
        "use_dora = true under [adapter]",
    ),
    (("budget.components=vera",), "rank = 1.5: the target budget", "choose a budget in between"),
]

# What is passed to rankflow.load_budget after its preset.
KEY_MISTAKES = [
    ({"rank": None}, "rank, params, fraction, bytes", "no target; set one of these"),
    ({"rank": "8"}, 'rank = "8"', "must be a valid number"),
    ({"rank": [8]}, "rank = [8]", "must be a valid number"),
    ({"rank": 2, "params": 9}, "rank = 2.0, params = 9", "keep one of these"),
    ({"params": np.float64(3.5)}, "params = 3.5", "must be a valid integer"),
    ({"rnak": 2}, "rnak = 2", "did you mean 'rank'?"),
    ({"score": len}, "score", "did you mean"),
    ({"ranks": {3: 2}}, "ranks.3", "must be a valid string"),
    ({"bounds": {"(": {"min_rank": 1}}}, "bounds", "must be the end of a module path or a regex"),
    ({"seed": 2**32}, "seed = 4294967296", "must be less than 4294967296"),
]

# What stands in place of a preset's name.
SOURCE_MISTAKES = [
    (None, "NoneType", "as in load_budget('hybrid', rank=8)"),
    ({"rank": 8}, "dict", "as in load_budget('hybrid', rank=8)"),
    (b"hybrid", "bytes", "as in load_budget('hybrid', rank=8)"),
    ("", "no such preset", "The presets are"),
    (Path("/"), "Is a directory", "name a TOML file that exists"),
]

# What stands in place of a sound argument of rankflow.RankFlow.
ENGINE_MISTAKES = [
    ({"model": None}, "received NoneType", "call peft.get_peft_model"),
    ({"model": "llama"}, "received str", "call peft.get_peft_model"),
    ({"budget": "hybrid"}, "budget must be a BudgetSpec", "use rankflow.load_budget"),
    ({"budget": {"rank": 2}}, "budget must be a BudgetSpec", "use rankflow.load_budget"),
    ({"total_steps": 0}, "total_steps must be a positive", "whole number of optimizer steps"),
    ({"total_steps": -5}, "total_steps must be a positive", "whole number of optimizer steps"),
    ({"total_steps": 9.0}, "total_steps must be a positive", "whole number of optimizer steps"),
    ({"total_steps": "9"}, "total_steps must be a positive", "whole number of optimizer steps"),
    ({"total_steps": 1}, "total_steps=1", "shorten one of them"),
    ({"adapter_name": "defualt"}, "no adapter 'defualt'", "pass one of them as adapter_name"),
    ({"adapter_name": None}, "no adapter None", "pass one of them as adapter_name"),
]


@pytest.mark.fault("bad spec, data or budget", quick=len(RUN_MISTAKES), full=len(RUN_MISTAKES))
def test_a_bad_budget_is_refused_before_anything_is_fitted(injection, refuse, monkeypatch):
    fit = "rankflow.training.job.fit_baseline"
    monkeypatch.setattr(fit, lambda *_: pytest.fail("the baseline is fitted"))
    settings, key, fix = RUN_MISTAKES[injection]
    message = refuse(*([settings] if isinstance(settings, str) else settings))
    assert key in message
    assert fix in message


@pytest.mark.fault("bad spec, data or budget", quick=len(KEY_MISTAKES), full=len(KEY_MISTAKES))
def test_a_bad_key_of_a_budget_is_refused(injection):
    keys, key, fix = KEY_MISTAKES[injection]
    with pytest.raises(RankFlowError) as caught:
        rankflow.load_budget("fixed", **keys)
    assert key in str(caught.value)
    assert fix in str(caught.value)


@pytest.mark.fault(
    "bad spec, data or budget", quick=len(SOURCE_MISTAKES), full=len(SOURCE_MISTAKES)
)
def test_what_is_no_preset_and_no_path_is_refused(injection):
    source, received, fix = SOURCE_MISTAKES[injection]
    with pytest.raises(RankFlowError) as caught:
        rankflow.load_budget(source, rank=8)
    assert received in str(caught.value)
    assert fix in str(caught.value)


@pytest.mark.fault(
    "bad spec, data or budget", quick=len(ENGINE_MISTAKES), full=len(ENGINE_MISTAKES)
)
def test_a_bad_argument_of_the_engine_is_refused_and_the_model_left_alone(injection):
    wrong, key, fix = ENGINE_MISTAKES[injection]
    config = LlamaConfig(
        vocab_size=7,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = peft.get_peft_model(
        LlamaForCausalLM(config), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    )
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    budget = rankflow.load_budget("reallocate", rank=2)
    sound = {"model": model, "budget": budget, "total_steps": 10, "adapter_name": "default"}
    with pytest.raises(RankFlowError) as caught:
        rankflow.RankFlow(**sound | wrong)
    assert key in str(caught.value)
    assert fix in str(caught.value)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
