import gc
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, OFTConfig, VeraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from rankflow import RankFlowCallback, load_budget
from rankflow.ablation.planted import (
    Design,
    PlantedModel,
    PlantedRows,
    excess_share,
    magnitude_recovery,
    plant,
    rank_recovery,
)
from rankflow.errors import RankFlowError

DESIGN = Design()
BUDGET = 2 * sum(n + m for n, m in DESIGN.shapes)
STEPS, BATCH = 400, 64
SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] if seed else []) for seed in range(5)]
METHODS = {  # whether DoRA, preset, learning rate
    "hybrid": (True, "hybrid", 8e-2),
    "LoRA": (False, "fixed", 2e-2),
    "DoRA": (True, "fixed", 4e-2),
    "dynamic LoRA": (False, "reallocate", 2e-2),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost these small tensors many times their arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # every Trainer collects garbage when it begins
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def arguments(tmp_path):
    def make(steps, rate):
        return TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
        )

    return make


def fit(model, problem, args, callbacks=()):
    rows = PlantedRows(problem, range(BATCH * args.max_steps))
    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def adapted(problem, **config):
    config = {"r": 4, "lora_alpha": 4, "target_modules": list(DESIGN.names)} | config
    return get_peft_model(PlantedModel(problem), LoraConfig(**config))


def scrambled(problem, **config):
    """An adapted model with factors as after some training."""
    model = adapted(problem, **config)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 0.5 + torch.rand_like(parameter)
        elif ".lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return model


def run(seed, method, args):
    use_dora, preset, _ = METHODS[method]
    torch.manual_seed(seed)
    problem = plant(seed)
    model = adapted(problem, use_dora=use_dora)
    steering = RankFlowCallback(load_budget(preset, rank=2, seed=seed), sinks=[])
    fit(model, problem, args, [steering])
    assert steering.flow.spent <= steering.flow.limit == BUDGET
    return excess_share(model), steering.flow


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_beside_magnitudes_find_the_truth_under_a_stock_trainer(seed, arguments):
    share, flow = run(seed, "hybrid", arguments(STEPS, METHODS["hybrid"][2]))
    assert share < 0.05
    assert rank_recovery(flow.ranks, DESIGN.true_ranks) > 0.8
    on = [name for name, trains in flow.magnitudes.items() if trains]
    assert magnitude_recovery(on, DESIGN.true_magnitudes).recall == 1


@pytest.mark.parametrize(
    ("method", "seed"),
    [pytest.param("DoRA", 0)]
    + [
        pytest.param(method, seed, marks=[pytest.mark.slow])
        for method in ("LoRA", "DoRA", "dynamic LoRA")
        for seed in range(5)
        if (method, seed) != ("DoRA", 0)
    ],
)
def test_each_part_alone_fails(method, seed, arguments):
    assert run(seed, method, arguments(STEPS, METHODS[method][2]))[0] > 0.2


@pytest.mark.parametrize(
    ("config", "rate"),
    [(None, 1e-2), (VeraConfig(r=8), 5e-2), (OFTConfig(oft_block_size=8), 1e-2)],
    ids=["full", "VeRA", "OFT"],
)
def test_it_hosts_other_methods(config, rate, arguments):
    problem = plant(0)
    model = PlantedModel(problem)
    if config is not None:
        config.target_modules = list(DESIGN.names)
        model = get_peft_model(model, config)
    fit(model, problem, arguments(60, rate))
    assert excess_share(model) < 0.97


def test_the_budget_holds_the_truth_with_all_magnitudes_and_not_one_component_more():
    others = sum(m for i, (_, m) in enumerate(DESIGN.shapes) if i not in DESIGN.rescaled)
    cheapest = min(sum(DESIGN.shapes[i]) for i in DESIGN.ranks)
    assert DESIGN.true_parameters + others <= BUDGET < DESIGN.true_parameters + others + cheapest


@pytest.mark.parametrize("seed", range(5))
def test_no_lora_of_that_budget_could_succeed_whatever_its_ranks(seed):
    problem = plant(seed)
    gains, costs = [], []
    for weight, truth in zip(problem.weights, problem.truths, strict=True):
        values = torch.linalg.svdvals((truth - weight).double())  # Eckart and Young
        gains += (values.square() / len(truth)).tolist()
        costs += [sum(truth.shape)] * len(values)
    gains, costs = np.array(gains), np.array(costs)
    best_first = np.argsort(-gains / costs)
    paid = np.cumsum(costs[best_first]) - costs[best_first]
    bought = np.clip((BUDGET - paid) / costs[best_first], 0, 1)  # of the last one, a part
    assert gains.sum() == pytest.approx(PlantedModel(problem).excess_at_start, rel=1e-4)
    assert 1 - (gains[best_first] * bought).sum() / gains.sum() > 0.25


def test_the_truth_is_made_of_the_planted_parts():
    problem = plant(3)
    weights, truths = ([w.double() for w in part] for part in (problem.weights, problem.truths))
    for i, (weight, truth) in enumerate(zip(weights, truths, strict=True)):
        if i not in DESIGN.rescaled:
            values = torch.linalg.svdvals(truth - weight)
            expected = torch.zeros_like(values)
            expected[: DESIGN.ranks.get(i, 0)] = 1
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
        elif i not in DESIGN.ranks:
            scales = truth.norm(dim=1) / weight.norm(dim=1)
            torch.testing.assert_close(truth.abs(), (scales[:, None] * weight).abs())
            assert 0.25 < scales.std() < 0.55


def test_row_scales_act_on_the_updated_weights():
    scaled, updated = plant(0).truths[7], plant(0, Design(spread=0)).truths[7]
    ratios = scaled / updated
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-3, atol=0)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_excess_share_is_that_of_the_merged_weights(use_dora):
    problem = plant(1)
    model = scrambled(problem, use_dora=use_dora)
    share = excess_share(model)
    merged = model.merge_and_unload()

    def excess(weights):
        pairs = zip(weights, problem.truths, strict=True)
        return sum(((w - t).double().square().sum() / len(t)).item() for w, t in pairs)

    weights = [layer.weight.detach() for layer in merged.layers]
    assert share == pytest.approx(excess(weights) / excess(problem.weights), rel=1e-5)


def test_the_excess_share_is_what_many_rows_show():
    problem = plant(2)
    model, base = scrambled(problem, use_dora=True), PlantedModel(problem)
    rows = next(iter(DataLoader(PlantedRows(problem, range(4000)), batch_size=4000)))
    floor = len(DESIGN.shapes) * DESIGN.noise**2
    with torch.no_grad():
        after, before = (m(**rows)["loss"].item() - floor for m in (model, base))
    assert excess_share(model) == pytest.approx(after / before, rel=0.05)


class Shifted(nn.Module):
    """The model with a constant added to its outputs."""

    def __init__(self, planted, shift):
        super().__init__()
        self.planted, self.shift = planted, shift

    def forward(self, inputs):
        return {"logits": self.planted(inputs)["logits"] + self.shift}


def test_a_constant_error_counts_in_full():
    model = PlantedModel(plant(0))
    shift = torch.randn(sum(m for _, m in DESIGN.shapes))
    each = torch.cat([torch.full((m,), 1 / m) for _, m in DESIGN.shapes])
    more = (shift.square() * each).sum().item() / model.excess_at_start
    assert excess_share(Shifted(model, shift)) == pytest.approx(1 + more, rel=1e-5)


def test_the_excess_share_is_one_at_the_start_and_zero_at_the_truth():
    problem = plant(0)
    model = PlantedModel(problem)
    assert excess_share(model) == pytest.approx(1, rel=1e-5)
    for layer, truth in zip(model.layers, problem.truths, strict=True):
        layer.weight.data = truth
    assert excess_share(model) < 1e-10


def test_the_excess_share_leaves_the_model_and_the_random_numbers_as_they_were():
    model = adapted(plant(0), lora_dropout=0.5).train()
    model.base_model.model.layers[1].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    assert excess_share(model) == pytest.approx(1, rel=1e-5)  # without dropout
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_a_truth_has_no_excess():
    with pytest.raises(RankFlowError, match="Linear holds no PlantedModel"):
        excess_share(nn.Linear(2, 2))


def test_rows_depend_on_the_seed_and_their_number_alone():
    problem = plant(0)
    rows, later = PlantedRows(problem, range(10)), PlantedRows(problem, range(6, 8))
    batch = rows.__getitems__([6, 3])
    assert len(rows) == 10
    for key in ("inputs", "labels"):
        torch.testing.assert_close(later[0][key], batch[0][key])
        assert not torch.allclose(batch[0][key], batch[1][key])
        assert not torch.allclose(PlantedRows(plant(1), range(10))[6][key], batch[0][key])
        assert torch.equal(PlantedRows(plant(0), range(10))[6][key], rows[6][key])


def test_labels_are_the_outputs_of_the_truth_with_noise():
    problem = plant(0)
    rows = next(iter(DataLoader(PlantedRows(problem, range(500)), batch_size=500)))
    slices = rows["inputs"].double().split([n for n, _ in DESIGN.shapes], dim=1)
    outputs = [x @ t.double().T for x, t in zip(slices, problem.truths, strict=True)]
    noise = rows["labels"] - torch.cat(outputs, dim=1)
    assert noise.std().item() == pytest.approx(DESIGN.noise, rel=0.01)
    assert abs(noise.mean().item()) < 0.001
    assert rows["inputs"].std().item() == pytest.approx(1, rel=0.01)
    assert abs(torch.corrcoef(torch.stack([noise[:, 0], rows["inputs"][:, 0]]))[0, 1]) < 0.15


def test_the_loss_is_the_sum_of_the_layers_mean_squared_errors():
    problem = plant(0)
    model = PlantedModel(problem)
    rows = next(iter(DataLoader(PlantedRows(problem, range(5)), batch_size=5)))
    outputs = model(**rows)
    widths = [m for _, m in DESIGN.shapes]
    pairs = zip(outputs.logits.split(widths, 1), rows["labels"].split(widths, 1), strict=True)
    expected = sum(nn.functional.mse_loss(y, target) for y, target in pairs)
    torch.testing.assert_close(outputs.loss, expected)
    assert model(rows["inputs"]).loss is None


def test_only_the_layers_are_saved_and_trained():
    model = PlantedModel(plant(0))
    weights = [f"{name}.weight" for name in DESIGN.names]
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()] == weights


def test_recovery_is_undefined_where_nothing_was_chosen():
    assert math.isnan(rank_recovery(dict.fromkeys(DESIGN.names, 2), DESIGN.true_ranks))
    assert math.isnan(rank_recovery({"a": 1, "b": 2}, {"a": 3, "b": 3}))
    assert math.isnan(magnitude_recovery([], {"a"}).precision)


def test_recovery_counts_what_is_right():
    assert rank_recovery({"b": 1, "a": 2, "c": 3}, {"a": 0, "b": 1, "c": 2}) == pytest.approx(0.5)
    recovery = magnitude_recovery(["a", "b", "c"], {"a", "b", "d", "e"})
    assert (recovery.precision, recovery.recall) == (pytest.approx(2 / 3), 0.5)
