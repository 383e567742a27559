"""The plot of bench_moe.py's results, as an SVG written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple
from xml.sax.saxutils import escape

from figures import best_peer, share

PANELS_PER_ROW = 4
PANEL = (228, 350)  # width and height, labels included
PLOT_LEFT, PLOT_WIDTH = 40, 176
US_PLOT, SHARE_PLOT = (26, 142), (202, 112)  # top and height within the panel
TOP = 64  # for the title and the legend
COLOURS = {
    "ceiling": "#333333", "best peer": "#8a8a8a", "grouped_mm": "#2a9d5c", "vllm": "#e07b00",
    "sonicmoe": "#8e44ad", "flashinfer": "#c2185b", "eager": "#a67c52",
}  # fmt: skip
OURS_COLOURS = ("#1657d9", "#17a2b8", "#00695c")


class Series(NamedTuple):
    name: str
    colour: str
    style: str  # further SVG attributes of its line
    value: Callable[[dict], float | None]


class Box(NamedTuple):
    """A plot's area, and what it maps there."""

    left: float
    top: float
    height: float
    tokens: tuple[float, float]
    values: tuple[float, float]
    logarithmic: bool

    def x(self, tokens: float) -> float:
        return self.left + PLOT_WIDTH * _position(tokens, *self.tokens, True)

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - _position(value, *self.values, self.logarithmic))


def _position(value: float, low: float, high: float, logarithmic: bool) -> float:
    """0 at low, 1 at high."""
    if logarithmic:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def plot_series(results: dict) -> tuple[list[Series], list[Series]]:
    """Those of the microseconds, and those of the percent of the ceiling."""
    about, cells = results["about"], results["cells"]
    ours = about["backends"]

    def best(cell: dict) -> float | None:
        peer = best_peer(cell, ours)
        return peer and peer[1]

    us, shares = [], []
    for name, colour in zip(ours, OURS_COLOURS):
        thick = 'stroke-width="2.6"'
        us.append(Series(name, colour, thick, lambda cell, name=name: cell["us"].get(name)))
        shares.append(Series(name, colour, thick, lambda cell, name=name: share(cell, name)))
    dashed = 'stroke-width="1.4" stroke-dasharray="4 3"'
    us.append(Series("best peer", COLOURS["best peer"], 'stroke-width="1.8"', best))
    us.append(Series("ceiling", COLOURS["ceiling"], dashed, lambda cell: cell["ceiling_us"]))
    published = {name for cell in cells for name in cell["published"].get("us", {})}
    # One line for each peer: the one of this run where there is one.
    peers = about["peers"] + sorted(f"{name}*" for name in published - set(about["peers"]))
    for name in peers:
        colour = COLOURS.get(name.rstrip("*"), "#c2a000")
        shares.append(
            Series(name, colour, 'stroke-width="1.6"', lambda cell, name=name: share(cell, name))
        )
    return us, shares


def svg(results: dict) -> str:
    about, cells = results["about"], results["cells"]
    layers = list(dict.fromkeys(cell["layer"] for cell in cells))
    us, shares = plot_series(results)
    across = min(PANELS_PER_ROW, max(3, len(layers)))
    width = across * PANEL[0] + 12
    height = TOP + math.ceil(len(layers) / across) * PANEL[1]
    title = f"fused_moe on one {about['gpu']}, {about['dtype']}, {about['routing']} routing"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"',
        f'  viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif"',
        '  font-size="10.5">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(12, 20, title, 'font-size="14" font-weight="bold"'),
        *_legend(us + [series for series in shares if series not in us], about),
    ]
    for i, layer in enumerate(layers):
        corner = (i % across * PANEL[0], TOP + i // across * PANEL[1])
        parts += _panel(corner, [c for c in cells if c["layer"] == layer], us, shares)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(series: list[Series], about: dict) -> list[str]:
    parts, x = [], 12.0
    names = set()
    for name, colour, style, _ in series:
        if name in names:
            continue
        names.add(name)
        parts.append(f'<path d="M{x} 37h20" stroke="{colour}" {style}/>')
        parts.append(_text(x + 25, 41, name))
        x += 25 + 6.2 * len(name) + 16
    if about["published"]:
        parts.append(_text(12, 56, f"* published: {about['published']}", 'fill="#555"'))
    return parts


def _panel(
    corner: tuple[float, float], cells: list[dict], us: list[Series], shares: list[Series]
) -> list[str]:
    left, top = corner[0] + PLOT_LEFT, corner[1]
    first = cells[0]
    shape = (
        f"E {first['experts']}, K {first['topk']}, H {first['hidden']}, I {first['intermediate']}"
    )
    counts = sorted({cell["tokens"] for cell in cells})
    # Margins, so that the first and last points don't lie on the frame (or a lone one nowhere).
    tokens = (counts[0] / 1.8, counts[-1] * 1.8)
    times = [value for cell in cells for s in us if (value := s.value(cell))]
    highest = max([100.0] + [value for cell in cells for s in shares if (value := s.value(cell))])
    times_box = Box(left, top + US_PLOT[0], US_PLOT[1], tokens,
                    (min(times) / 1.4, max(times) * 1.4), True)  # fmt: skip
    share_box = Box(left, top + SHARE_PLOT[0], SHARE_PLOT[1], tokens, (0, highest * 1.04), False)
    parts = [
        _text(left, top + 9, first["layer"], 'font-weight="bold"'),
        _text(left, top + 21, shape, 'font-size="9" fill="#555"'),
    ]
    for box, series, ticks in (
        (times_box, us, _decades(*times_box.values)),
        (share_box, shares, [0, 25, 50, 75, 100]),
    ):
        for tick in ticks:
            y = box.y(tick)
            parts.append(f'<path d="M{left} {y:.1f}h{PLOT_WIDTH}" stroke="#e2e2e2"/>')
            parts.append(_text(left - 4, y + 3.5, _short(tick), 'text-anchor="end" fill="#555"'))
        bottom = box.top + box.height
        for count in _apart(counts, box):
            x = box.x(count)
            parts.append(f'<path d="M{x:.1f} {bottom}v3" stroke="#999"/>')
            parts.append(_text(x, bottom + 13, _short(count), 'text-anchor="middle" fill="#555"'))
        parts.append(f'<rect x="{left}" y="{box.top}" width="{PLOT_WIDTH}" height="{box.height}"'
                     ' fill="none" stroke="#999"/>')  # fmt: skip
        for line in reversed(series):  # ours on top
            parts += _line(box, cells, line)
    parts.append(_text(left + 4, top + US_PLOT[0] + 12, "µs", 'fill="#555"'))
    above = top + SHARE_PLOT[0] - 5  # where no curve is
    parts.append(_text(left, above, "% of the ceiling, over tokens", 'fill="#555"'))
    return parts


def _line(box: Box, cells: list[dict], series: Series) -> list[str]:
    values = sorted((cell["tokens"], series.value(cell)) for cell in cells)
    points = [(box.x(tokens), box.y(value)) for tokens, value in values if value]
    if not points:
        return []
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    parts = [f'<path d="M{path}" fill="none" stroke="{series.colour}" {series.style}/>']
    if series.name != "ceiling" or len(points) == 1:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{series.colour}"/>'
                  for x, y in points]  # fmt: skip
    return parts


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, and where those are few their multiples by 2 and 5."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def ticks(multiples: Iterable[int]) -> list[float]:
        every = [10.0**exponent * multiple for exponent in exponents for multiple in multiples]
        return [tick for tick in every if low <= tick <= high]

    return ticks([1]) if len(ticks([1])) >= 3 else ticks([1, 2, 5])


def _apart(counts: list[int], box: Box) -> list[int]:
    """Those whose labels don't touch."""
    kept: list[int] = []
    for count in counts:
        if not kept or box.x(count) - box.x(kept[-1]) > 20:
            kept.append(count)
    return kept


def _short(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}k"
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'
