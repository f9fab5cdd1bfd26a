"""What would make a model faster, as text for a person. Computes nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from onnxcompress.findings import Explanation, Family, ModelExplanation, Option
from onnxcompress.tables import columns, milliseconds, plural, section

__all__ = ["explanation"]

_SHOWN = 0.9
"""Share of the time in the layers shown by default."""
_STYLES = {"gains": "green", "same": "", "loses": "red", "impossible": "yellow"}


def explanation(what: ModelExplanation, *, verbose: bool = False) -> RenderableType:
    """A summary, then the layers that make up 90 % of the time, equal ones as one; all, one by one, if ``verbose``."""
    by_name = {layer.name: layer for layer in what.layers}
    spent = ", ".join(f"{part} {share:.0%}" for part, share in what.spent.items() if share >= 0.005)
    dearest = [
        (layer.name, layer.op, milliseconds(1e3 * layer.seconds), f"{layer.share:.1%}", layer.helps or "nothing seen")
        for layer in map(by_name.__getitem__, what.matters)
    ]
    parts: list[RenderableType] = [
        Text(f"{milliseconds(1e3 * what.seconds)} predicted on {what.profile}", style="bold"),
        Text(f"looked at after tidying: {what.nodes[1]} of {plural(what.nodes[0], 'node')}; the time goes to: {spent}"),
        section("What could help", columns(map(_family, what.families), _FAMILY_HEADS, right=[1, 2, 3])),
        section("What matters", columns(dearest, ("layer", "op", "time", "share", "helps most"), right=[2, 3])),
    ]
    if what.regions:
        parts.append(section("int8 regions", Group(*map(Text, _regions(what)))))
    shown = what.layers if verbose else _most(what.layers, _SHOWN * sum(layer.seconds for layer in what.layers))
    hidden = {family.kind for family in what.families if family.why}
    groups = [[layer] for layer in shown] if verbose else _alike(shown, hidden)
    title = f"All {plural(len(shown), 'layer')}" if len(shown) == len(what.layers) else (
        f"{plural(len(shown), 'layer')} of {len(what.layers)}, {_SHOWN:.0%} of the time; -v shows all"
    )  # fmt: skip
    parts.append(section(title, Group(*(_layer(group, hidden) for group in groups))))
    if what.unknown:
        names = ", ".join(what.unknown[:5]) + (", ..." if len(what.unknown) > 5 else "")
        message = f"the cost of {plural(len(what.unknown), 'node')} is not known, so the sum is too low: {names}"
        parts += [Text(), Text(message, style="yellow")]
    return Group(*parts)


_FAMILY_HEADS = ("", "possible in", "gains in", "model", "")


def _family(one: Family) -> tuple[str, str, str, str, str]:
    if one.why:
        return one.kind, "", "", "", one.why
    note = {"channels": "half of them, everywhere", "rank": "half of it, everywhere"}.get(one.kind, "")
    return one.kind, f"{one.touches:.1%}", f"{one.gains:.1%}", f"{one.speed_up:.2f}x faster", note


def _regions(what: ModelExplanation) -> list[str]:
    lines: list[str] = []
    many = [r for r in what.regions if len(r.layers) > 1]
    for number, region in sorted(enumerate(what.regions), key=lambda item: item[1].seconds_best - item[1].seconds):
        saved = region.seconds - region.seconds_best
        if len(region.layers) > 1 and saved > 0 and len(lines) < _REGIONS:
            now, then, mix = (milliseconds(1e3 * s) for s in (region.seconds, region.seconds_all, region.seconds_best))
            lines.append(
                f"#{number}: {len(region.layers)} layers from {region.layers[0]!r}: {now} now, {then} all int8, "
                f"{mix} with {len(region.best)} of them int8"
            )
    alone = len(what.regions) - len(many)
    left = len(many) - len(lines)
    rest = [f"{plural(left, 'more region')}"] if left else []
    rest += [f"{plural(alone, 'layer')} with an int8 kernel and no such neighbour"] if alone else []
    return [*lines, *(["; ".join(rest)] if rest else [])]


_REGIONS = 5


def _most(layers: Sequence[Explanation], seconds: float) -> list[Explanation]:
    """The dearest layers that together take this long, dearest first."""
    found: list[Explanation] = []
    for layer in sorted(layers, key=lambda layer: -layer.seconds):
        if seconds <= 0:
            break
        found.append(layer)
        seconds -= layer.seconds
    return found


def _alike(layers: Sequence[Explanation], hidden: Collection[str]) -> list[list[Explanation]]:
    """Layers about which the same is to be said, dearest first."""
    groups: dict[tuple[object, ...], list[Explanation]] = {}
    for layer in layers:
        said = tuple(line.plain for line in _lines(layer, hidden))
        groups.setdefault((layer.op, layer.kind, layer.note, milliseconds(1e3 * layer.seconds), said), []).append(layer)
    return sorted(groups.values(), key=lambda group: -sum(layer.seconds for layer in group))


def _layer(group: Sequence[Explanation], hidden: Collection[str]) -> RenderableType:
    first = group[0]
    kernel = first.kind if first.precision == "f32" else f"{first.kind} {first.precision}"
    share = f"{sum(layer.share for layer in group):.1%}"
    each = f"{plural(len(group), 'layer')} like it, {share} together" if len(group) > 1 else share
    head = Text.assemble((first.name, "bold"), f"  {first.op} ({kernel})  {milliseconds(1e3 * first.seconds)}, {each}")
    if first.note:
        head.append(f"; {first.note}", style="yellow")
    return Group(head, *(Padding(line, (0, 0, 0, 4)) for line in _lines(first, hidden)))


def _lines(layer: Explanation, hidden: Collection[str]) -> list[Text]:
    """What is said about a layer, one line a kind of change."""
    lines = []
    for kind, found in groupby(layer.options, key=lambda option: option.kind):
        if kind in hidden:
            continue
        line = Text(f"{kind:<9}")
        for number, option in enumerate(found):
            line.append("; " if number else "")
            line.append(_words(option), style=_STYLES[option.verdict])
        lines.append(line)
    return lines


def _words(option: Option) -> str:
    if option.ratio is None or option.kind in ("int8", "f16"):  # their reasons name the ratios
        return option.why
    shown = f"{option.ratio:.2f}x"
    what = f"{option.detail}: {shown}" if option.detail else shown
    return f"{what} ({option.why})" if option.why else what
