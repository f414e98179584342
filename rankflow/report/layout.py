"""Where each site stands in a heatmap: a row for each layer, a column for each type of module.

The first number in a site's name is its layer; what stands before it is the stack, and what
stands behind it the type, further numbers included. A site without a number has a row to itself
and spans all columns.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Segments = tuple[str, ...]
Row = tuple[Segments, int | None]


@dataclass(frozen=True, slots=True)
class SitePosition:
    """A site's name, taken apart.

    Attributes:
        stack: Segments before the layer's number; all segments where there is none.
        layer: The layer's number, None where the name has none.
        type: Segments behind the number.
    """

    stack: Segments
    layer: int | None
    type: Segments


@dataclass(frozen=True, slots=True)
class Cell:
    """Place of one site: its row, its first column, and the number of columns it spans."""

    row: int
    column: int
    span: int


@dataclass(frozen=True, slots=True)
class GridLayout:
    """A grid of sites.

    Attributes:
        rows: Label of each row, from the top.
        columns: Label of each column, from the left; empty for a type without a name, as
            for the sites of ``layers.0``, ``layers.1``.
        groups: Number of each row's group, ascending from 0: a stack, or a row without a layer.
        cells: Place of each site, by its name.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    groups: tuple[int, ...]
    cells: dict[str, Cell]


def parse_site(name: str) -> SitePosition:
    """Take a site's name apart at its first number.

    >>> parse_site("model.layers.3.self_attn.q_proj")
    SitePosition(stack=('model', 'layers'), layer=3, type=('self_attn', 'q_proj'))
    >>> parse_site("layers.0.experts.3.w1")
    SitePosition(stack=('layers',), layer=0, type=('experts', '3', 'w1'))
    >>> parse_site("lm_head")
    SitePosition(stack=('lm_head',), layer=None, type=())
    """
    path = tuple(name.split("."))
    for index, segment in enumerate(path):
        if segment.isdecimal():
            return SitePosition(path[:index], int(segment), path[index + 1 :])
    return SitePosition(path, None, ())


def lay_out(names: Iterable[str]) -> GridLayout:
    """Give each site its place.

    Stacks and columns stand in the order of their first site, the layers of a stack by number.

    Args:
        names: Site names, e.g. the keys of ``flow.ranks``.

    >>> grid = lay_out(["embed", "layers.0.attn.q", "layers.0.mlp.up", "layers.1.attn.q"])
    >>> grid.rows, grid.columns
    (('embed', '0', '1'), ('q', 'up'))
    >>> grid.cells["embed"], grid.cells["layers.1.attn.q"]
    (Cell(row=0, column=0, span=2), Cell(row=2, column=0, span=1))
    >>> lay_out(["m.encoder.layers.0.fc", "m.decoder.layers.0.fc"]).rows
    ('encoder 0', 'decoder 0')
    """
    positions = {name: parse_site(name) for name in names}
    rows = _order_rows(positions.values())
    types = list(dict.fromkeys(p.type for p in positions.values() if p.layer is not None))
    return GridLayout(
        rows=_label_rows(rows, types),
        columns=shortest_endings(types) or ("",),
        groups=_number_groups(rows),
        cells={name: _place(position, rows, types) for name, position in positions.items()},
    )


def shortest_endings(paths: Sequence[Segments]) -> tuple[str, ...]:
    """Shorten each path to its fewest last segments that no other path ends with.

    No label begins with a number unless its path does; a path that ends another stays whole.

    >>> shortest_endings([("self_attn", "q_proj"), ("mlp", "up_proj")])
    ('q_proj', 'up_proj')
    >>> shortest_endings([("attention", "output", "dense"), ("output", "dense")])
    ('attention.output.dense', 'output.dense')
    >>> shortest_endings([("mlp", "experts", "0", "w1"), ("mlp", "experts", "1", "w1")])
    ('experts.0.w1', 'experts.1.w1')
    """
    return tuple(_shortest_ending(path, [p for p in paths if p != path]) for path in paths)


def shortest_beginnings(paths: Sequence[Segments]) -> tuple[str, ...]:
    """Drop what all paths begin with, then shorten each to what no other begins with.

    >>> shortest_beginnings([("model", "encoder", "layers"), ("model", "decoder", "layers")])
    ('encoder', 'decoder')
    >>> shortest_beginnings([("down_blocks",), ("mid_block", "attentions")])
    ('down_blocks', 'mid_block')
    """
    shared = _count_shared(paths)
    rests = [path[shared:] for path in paths]
    return tuple(_shortest_beginning(rest, [r for r in rests if r != rest]) for rest in rests)


def _order_rows(positions: Iterable[SitePosition]) -> list[Row]:
    layers: dict[Segments, set[int | None]] = {}
    for position in positions:
        layers.setdefault(position.stack, set()).add(position.layer)
    return [
        (stack, layer)
        for stack, numbers in layers.items()
        for layer in sorted(numbers, key=lambda number: -1 if number is None else number)
    ]


def _label_rows(rows: Sequence[Row], types: Sequence[Segments]) -> tuple[str, ...]:
    stacks = list(dict.fromkeys(stack for stack, layer in rows if layer is not None))
    single = [stack for stack, layer in rows if layer is None]
    beginnings = shortest_beginnings(stacks) if len(stacks) > 1 else [""] * len(stacks)
    stack_label = dict(zip(stacks, beginnings, strict=True))
    single_label = dict(zip(single, shortest_endings([*single, *types]), strict=False))
    return tuple(
        single_label[stack] if layer is None else f"{stack_label[stack]} {layer}".strip()
        for stack, layer in rows
    )


def _number_groups(rows: Sequence[Row]) -> tuple[int, ...]:
    numbers = {stack: n for n, stack in enumerate(dict.fromkeys(stack for stack, _ in rows))}
    return tuple(numbers[stack] for stack, _ in rows)


def _place(position: SitePosition, rows: Sequence[Row], types: Sequence[Segments]) -> Cell:
    row = rows.index((position.stack, position.layer))
    if position.layer is None:
        return Cell(row=row, column=0, span=max(len(types), 1))
    return Cell(row=row, column=types.index(position.type), span=1)


def _shortest_ending(path: Segments, others: Sequence[Segments]) -> str:
    for length in range(1, len(path)):
        ending = path[-length:]
        if not ending[0].isdecimal() and all(other[-length:] != ending for other in others):
            return ".".join(ending)
    return ".".join(path)


def _shortest_beginning(path: Segments, others: Sequence[Segments]) -> str:
    for length in range(1, len(path)):
        if all(other[:length] != path[:length] for other in others):
            return ".".join(path[:length])
    return ".".join(path)


def _count_shared(paths: Sequence[Segments]) -> int:
    """Return how many first segments all paths share."""
    count = 0
    for segments in zip(*paths, strict=False):
        if len(set(segments)) > 1:
            break
        count += 1
    return count
