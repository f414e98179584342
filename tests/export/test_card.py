import pytest
import yaml

from rankflow.export.card import AdapterFacts, rank_markdown, write_card
from rankflow.specs.budget import BudgetSpec

RANKS = {
    "model.layers.0.q_proj": 3,
    "model.layers.0.v_proj": 0,
    "model.layers.1.q_proj": 12,
    "model.layers.1.v_proj": 1,
}


def make_facts(**changes):
    facts = {
        "spent": 12345,
        "target": 12346,
        "steps": 2000,
        "budget": BudgetSpec(rank=4, start=1.5, schedule="cubic", score="fisher").model_dump(),
        "metrics": {"accuracy": 0.87654, "loss": 12.0},
    }
    return AdapterFacts(**facts | changes)


def make_card(*, base_model="org/base", is_dora=True, trained=1040, facts=None):
    return write_card(
        RANKS,
        library="diffusers",
        loading="pipeline.load_lora_weights('here')",
        base_model=base_model,
        is_dora=is_dora,
        trained=trained,
        stored=1040,
        facts=facts,
    )


def front_matter(card):
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


def test_the_front_matter_is_what_model_hubs_read():
    assert front_matter(make_card()) == {
        "base_model": "org/base",
        "library_name": "diffusers",
        "tags": ["rankflow", "dora"],
    }


def test_an_unknown_base_model_is_left_out():
    card = make_card(base_model="", is_dora=False)
    assert front_matter(card) == {"library_name": "diffusers", "tags": ["rankflow", "lora"]}
    assert "None" not in card


@pytest.mark.parametrize(
    ("is_dora", "title"), [(True, "# DoRA adapter"), (False, "# LoRA adapter")]
)
def test_the_title_names_the_method(is_dora, title):
    assert title in make_card(is_dora=is_dora)


def test_the_card_says_on_what_it_was_trained_and_how_it_is_loaded():
    card = make_card()
    assert "Trained with RankFlow on `org/base`. Stock `diffusers` loads it:" in card
    assert card.split("```python\n")[1].split("\n```")[0] == "pipeline.load_lora_weights('here')"


def test_the_ranks_are_a_table_of_layers_by_modules():
    lines = make_card().split("## Ranks\n\n")[1].splitlines()
    assert lines == [
        "| layer | q_proj | v_proj |",
        "| --- | --- | --- |",
        "| 0 | 3 | 0 |",
        "| 1 | 12 | 1 |",
    ]


def test_a_module_that_a_layer_lacks_leaves_its_cell_empty():
    table = rank_markdown({"h.0.q": 1, "h.1.q": 2, "h.1.k": 3})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0][0] == "layer"
    assert dict(zip(rows[0], rows[2], strict=True)) == {"layer": "0", "q": "1", "k": ""}
    assert dict(zip(rows[0], rows[3], strict=True)) == {"layer": "1", "q": "2", "k": "3"}


def test_the_budget_and_how_it_was_spent_are_told():
    card = make_card(facts=make_facts())
    assert "12,345 trainable adapter parameters of 12,346 allowed, after 2,000 steps" in card
    assert "Score `fisher`, policy `knapsack`, schedule `cubic` from 1.5x" in card


def test_metrics_are_a_table():
    card = make_card(facts=make_facts())
    assert "| accuracy | 0.8765 |" in card
    assert "| loss | 12 |" in card


def test_without_metrics_there_is_no_table_of_them():
    assert "Metrics" not in make_card(facts=make_facts(metrics={}))


def test_without_a_run_nothing_is_claimed_about_one():
    card = make_card()
    assert "Budget" not in card
    assert "Metrics" not in card


def test_what_is_stored_and_not_trained_is_told():
    assert "The file holds 1,040 parameters and 940 are trained" in make_card(trained=940)
    assert "The file holds" not in make_card(trained=1040)
