"""Small plots as inline SVG. Only numbers and fixed words go in, so nothing needs escaping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 34
_COLOURS = ("base", "tuned", "best_prompt", "tuned_best_prompt", "vote")
_SHAPES = ("", " hollow", " pale")
Points = Sequence[tuple[float, float]]


def loss_plot(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Returns a plot of training and validation loss over steps, empty when there is too little to show."""
    series: dict[str, list[tuple[float, float]]] = {"loss": [], "val_loss": []}
    for row in rows:
        for name, points in series.items():
            value = row.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                points.append((float(row["step"]), float(value)))
    points = [point for found in series.values() for point in found]
    if len(series["loss"]) < 2:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks, y_ticks = ticks(0.0, max(xs)), ticks(min(0.0, *ys), max(ys))
    scale = _Scale(0.0, max(max(xs), 1.0), y_ticks[0], max(y_ticks[-1], max(ys)))
    marks = [_grid_line(scale, tick) for tick in y_ticks]
    marks += [_x_tick(scale, tick) for tick in x_ticks if tick <= scale.x1]
    marks.append(_line("train", scale, series["loss"]))
    if series["val_loss"]:
        marks.append(_line("val", scale, series["val_loss"]))
        dots = [(scale.x(x), scale.y(y)) for x, y in series["val_loss"]]
        marks += [f'<circle class="val" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in dots]
    text = "Training loss per answer token over optimizer steps"
    return Markup(
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text}"><title>{text}</title>'
        f"{''.join(marks)}</svg>"
    )


class _Scale:
    """Data coordinates to pixels."""

    def __init__(self, x0: float, x1: float, y0: float, y1: float) -> None:
        self.x0, self.x1, self.y0, self.y1 = x0, x1, y0, y1 if y1 > y0 else y0 + 1.0

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (_HEIGHT - _TOP - _BOTTOM)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Returns round numbers that cover a range: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return [low, low + 1.0]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _grid_line(scale: _Scale, tick: float) -> str:
    y = scale.y(tick)
    return (
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    )


def _x_tick(scale: _Scale, tick: float) -> str:
    return f'<text x="{scale.x(tick):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{tick:,g}</text>'


def _line(name: str, scale: _Scale, points: Points) -> str:
    path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points)
    return f'<polyline class="{name}" points="{path}"/>'


def marks_of(names: Sequence[str]) -> dict[str, str]:
    """Returns the style classes of every answerer: a colour by its model, a shape by its way of asking.

    Args:
        names: Models, each with its way of asking behind a comma. A third way and more have one shape.
    """
    ways = list(dict.fromkeys(way for name in names for model, _, way in [name.partition(", ")] if model != "vote"))
    marks = {}
    for name in names:
        model, _, way = name.partition(", ")
        shape = _SHAPES[min(ways.index(way), 2)] if way in ways and model != "vote" else ""
        marks[name] = (model if model in _COLOURS else "base") + shape
    return marks


def interval_plot(models: Mapping[str, Mapping[str, float]], top: float) -> Markup:
    """Returns one row of dots with their intervals on an axis from 0, marked as ``marks_of`` says.

    Args:
        models: Model name to value, low and high.
        top: End of the axis; the same for all rows of a table.
    """
    width, height = 150, 11 * len(models) + 5
    scale = (width - 10) / (top or 1.0)
    marks = [f'<line class="axis" x1="5" x2="{width - 5}" y1="{height - 1.5}" y2="{height - 1.5}"/>']
    classes = marks_of(list(models))
    for place, (answerer, found) in enumerate(models.items()):
        y, mark = 6 + 11 * place, f"own {classes[answerer]}"
        low, high, x = (5 + scale * min(max(found[key], 0.0), top) for key in ("low", "high", "value"))
        marks.append(f'<line class="{mark}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
        marks.append(f'<circle class="{mark}" cx="{x:.1f}" cy="{y}" r="3.5"/>')
    return Markup(
        f'<svg class="dots" width="{width}" height="{height}" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f"{''.join(marks)}</svg>"
    )
