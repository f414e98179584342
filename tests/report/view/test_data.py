import json
from dataclasses import replace

from rankflow.records import ComponentChange
from rankflow.report.layout import lay_out
from rankflow.report.view.data import encode, view_grid, view_run


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def shown(events):
    return json.loads(encode(view_run("a run", events)), parse_constant=refuse_constant)


def test_every_column_stands_over_the_sites(event):
    sites = list(event.ranks)
    told = replace(
        event,
        magnitudes=dict.fromkeys(sites, True),
        parameters={site: 10 * i for i, site in enumerate(sites)},
    )
    view = shown([told])
    assert (view["name"], view["sites"]) == ("a run", sites)
    (row,) = view["events"]
    for column in ("ranks", "ranks_before", "importance", "magnitudes", "parameters"):
        assert row[column] == list(getattr(told, column).values())
    for field in ("index", "step", "limit", "spent", "spent_before"):
        assert row[field] == getattr(told, field)


def test_what_an_old_log_does_not_tell_is_null_at_every_site(event):
    (row,) = shown([event])["events"]
    assert row["parameters"] == row["magnitudes"] == row["magnitude_change"] == [None] * 3


def test_an_event_without_a_site_of_another_one_has_null_there(event):
    sites = list(event.ranks)
    fewer = replace(event, ranks={sites[1]: 5}, importance={})
    view = shown([fewer, event])
    assert view["sites"] == [sites[1], sites[0], sites[2]]
    assert view["events"][0]["ranks"] == [5, None, None]
    assert view["events"][0]["importance"] == [None] * 3


def test_numbers_that_json_cannot_spell_are_strings(event):
    sites = list(event.ranks)
    odd = dict(zip(sites, (float("nan"), float("inf"), float("-inf")), strict=True))
    (row,) = shown([replace(event, importance=odd)])["events"]
    assert row["importance"] == ["NaN", "Infinity", "-Infinity"]


def test_changes_of_one_kind_and_reason_are_counted_together(event):
    query, value, head = event.ranks
    pruned = (
        *event.pruned,
        ComponentChange(value, None, 0.5, "below the threshold"),
        ComponentChange(value, 2, 0.5, "another reason"),
    )
    (row,) = shown([replace(event, pruned=pruned)])["events"]
    place = {site: i for i, site in enumerate((query, value, head))}
    changes = {
        (c["site"], c["born"], c["magnitude"], c["reason"]): c["count"] for c in row["changes"]
    }
    assert changes == {
        (place[value], False, False, "below the threshold"): 2,
        (place[query], False, False, "below the threshold"): 1,
        (place[value], False, True, "below the threshold"): 1,
        (place[value], False, False, "another reason"): 1,
        (place[query], True, False, "demand"): 1,
    }


def test_the_places_are_those_of_the_heatmaps():
    names = ["embed", "m.0.q", "m.0.v", "m.1.q", "embed"]
    layout, grid = lay_out(names), view_grid(names)
    assert (grid.rows, grid.columns) == (list(layout.rows), list(layout.columns))
    assert grid.groups == list(layout.groups)
    assert grid.cells == {
        site: (cell.row, cell.column, cell.span) for site, cell in layout.cells.items()
    }
