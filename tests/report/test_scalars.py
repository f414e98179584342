from dataclasses import replace

from rankflow.records import ComponentChange
from rankflow.report.scalars import event_scalars


def test_magnitudes_are_counted_apart_from_components(event):
    off = tuple(ComponentChange(site, None, 0.5, "the budget fell") for site in event.ranks)
    covered = replace(
        event,
        pruned=(*event.pruned, *off[:2]),
        born=(*event.born, off[2]),
        magnitudes=dict.fromkeys(event.ranks, True),
    )
    scalars = event_scalars(covered)
    assert scalars.pop("rankflow/magnitudes") == 3
    assert scalars == event_scalars(event)


def test_an_event_that_turns_off_more_magnitudes_than_there_are_components_is_shown(event):
    sites = dict.fromkeys(event.ranks, 0)
    off = tuple(ComponentChange(site, None, 0.5, "the budget fell") for site in sites)
    scalars = event_scalars(
        replace(event, ranks=sites, ranks_before=sites, pruned=off, born=(), magnitudes=sites)
    )
    assert scalars["rankflow/churn"] == scalars["rankflow/magnitudes"] == 0
