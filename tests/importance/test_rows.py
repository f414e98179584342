import torch

from rankflow.importance.rows import Rows


def test_rows_are_the_components_of_every_site_in_table_order(steer):
    steered = steer()
    steered.backward(0)
    numbers = torch.rand(10, dtype=torch.float64)
    for rows, side in ((Rows.of_A(steered.sites), 1), (Rows.of_B(steered.sites), 2)):
        components = list(steered.components())
        sums = rows.per_component([w.sum(dim=1) for w in rows.weights()])
        torch.testing.assert_close(sums, torch.stack([c[side].sum() for c in components]))
        products = zip(rows.weights(), rows.gradients(), strict=True)
        dots = rows.per_component([(w * g).sum(dim=1) for w, g in products])
        expected = torch.stack([c[side].dot(c[side + 2]) for c in components])
        torch.testing.assert_close(dots, expected)
        assert len(dots) == len(numbers)


def test_one_stack_holds_all_rows_of_a_width(steer):
    steered = steer()
    rows = Rows.of_A(steered.sites)  # widths 12, 6 (dead), 5, 5, 12
    assert [tuple(w.shape) for w in rows.weights()] == [(6, 12), (4, 5)]
    assert rows.ranks == [2, 0, 3, 1, 4]
    assert rows.widths == [12, 6, 5, 5, 12]


def test_split_and_join_undo_each_other(steer):
    steered = steer()
    rows = Rows.of_B(steered.sites)
    parts = rows.split(rows.weights())
    assert [tuple(p.shape) for p in parts] == [(2, 6), (0, 5), (3, 5), (1, 4), (4, 4)]
    for part, site in zip(parts, steered.sites, strict=True):
        assert part.numel() == 0 or torch.equal(part, site.B.detach().flatten(1).T)
    for joined, stacked in zip(rows.join(parts.__getitem__), rows.weights(), strict=True):
        assert torch.equal(joined, stacked)


def test_a_missing_gradient_counts_as_zero(steer):
    steered = steer()
    steered.backward(0)
    steered.sites[2].A.grad = None
    norms = Rows.of_A(steered.sites).per_component(
        [g.norm(dim=1) for g in Rows.of_A(steered.sites).gradients()]
    )
    assert norms[2:5].tolist() == [0, 0, 0]
    assert (norms[[0, 1, 5, 6, 7, 8, 9]] > 0).all()


def test_low_precision_is_read_as_float32_and_nothing_is_written_through(steer):
    for dtype, read in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        steered = steer(
            dtype=dtype, ranks={"embed": 0, "fan": 1, "first": 0, "second": 0, "conv": 0}
        )
        rows = Rows.of_A(steered.sites)
        (weights,) = rows.weights()
        assert weights.dtype == read
        before = steered.sites[1].A.detach().clone()
        weights.zero_()  # a stack of one matrix must be a copy too
        assert torch.equal(steered.sites[1].A.detach(), before)


def test_a_model_of_dead_sites_has_no_rows(steer):
    steered = steer(ranks=dict.fromkeys(("embed", "fan", "first", "second", "conv"), 0))
    rows = Rows.of_A(steered.sites)
    assert rows.weights() == []
    assert rows.per_component([]).shape == (0,)
