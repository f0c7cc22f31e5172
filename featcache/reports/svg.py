"""Charts of a page as SVG, from numbers: axes, points with intervals, bars, lines. Colours are classes of its style."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from featcache.display import tag

WIDTH, HEIGHT = 420, 290  # in units of the drawing, about a phone's width: letters stay legible where it is not scaled up
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 26, 46
_LETTER = 6.7  # the mean width of a letter of 12 units, for labels to make room for each other
_LINE = 14
COLOURS = 10


@dataclass(frozen=True)
class Axis:
    """One direction of a drawing: which value lies at which unit."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return where a value lies."""
        low, high, value = (math.log10(max(each, 1e-9)) if self.is_log else each for each in (self.low, self.high, value))
        return self.start + (value - low) / ((high - low) or 1) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values, some five of them."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            fine = [step * 10.0**power for power in powers for step in (1, 2, 5)]
            inside = [value for value in fine if self.low <= value <= self.high]
            return inside if len(inside) <= 7 else [value for value in inside if f"{value:e}"[0] == "1"]
        rough = (self.high - self.low) / 5 or 1
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [round(step * number, 10) for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Mark:
    """A value of a chart; ``low`` and ``high`` are its interval, ``label`` stands beside it, ``title`` is read of it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""
    title: str = ""
    colour: int = 0
    radius: float = 4.5


@dataclass(frozen=True)
class Series:
    """Points that a line joins; ``ringed`` is the one that was kept."""

    name: str
    points: tuple[Mark, ...]
    colour: int = 0
    is_dashed: bool = False
    ringed: int | None = None


@dataclass(frozen=True)
class Chart:
    """A chart's frame: what it shows, in a title and a sentence for who cannot see it, and how its axes are called."""

    key: str
    title: str
    about: str
    x_label: str
    y_label: str
    x_names: tuple[str, ...] = field(default=())

    def drawn(self, x: Axis, y: Axis, *content: Markup) -> Markup:
        """Return the drawing with its axes."""
        labelled = f"{self.key}-title {self.key}-about"
        return tag(
            "svg",
            tag("title", self.title, id=f"{self.key}-title"),
            tag("desc", self.about, id=f"{self.key}-about"),
            *self._axes(x, y),
            *content,
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            role="img",
            aria_labelledby=labelled,
        )

    def _axes(self, x: Axis, y: Axis) -> list[Markup]:
        across = [(float(place), name) for place, name in enumerate(self.x_names)] or [
            (value, f"{value:g}") for value in x.ticks()
        ]
        return [
            *(tag("path", d=f"M{_LEFT} {y(value):.1f}H{WIDTH - _RIGHT}", class_="grid") for value in y.ticks()),
            *(tag("text", f"{value:g}", x=_LEFT - 6, y=y(value) + 4, class_="tick end") for value in y.ticks()),
            *(_x_tick(x(value), name, slanted=len(self.x_names) > 6) for value, name in across),
            tag("path", d=f"M{_LEFT} {HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}", class_="base"),
            tag("text", self.x_label, x=(_LEFT + WIDTH - _RIGHT) / 2, y=float(HEIGHT - 4), class_="axis middle"),
            tag("text", self.y_label, x=2.0, y=12.0, class_="axis"),
        ]


def _x_tick(place: float, name: str, *, slanted: bool) -> Markup:
    y = HEIGHT - _BOTTOM + 14
    if slanted:
        return tag("text", name, transform=f"translate({place:.1f} {y - 4}) rotate(-35)", class_="tick end")
    return tag("text", name, x=place, y=float(y), class_="tick middle")


def _axis(values: Sequence[float], start: float, end: float, *, is_log: bool = False, margin: float = 0.06) -> Axis:
    low, high = min(values), max(values)
    if is_log:
        low, high = max(low, 1e-3), max(high, 1e-3)
        room = 1.4 if high > 3 * low else 2.5  # less would have no two round values to be read by
        return Axis(low / room, high * room, start, end, is_log=True)
    room = (high - low) * margin or 1.0
    return Axis(low - room, high + room, start, end)


def _across(values: Sequence[float], *, is_log: bool = False) -> Axis:
    return _axis(values, _LEFT + 4, WIDTH - _RIGHT - 4, is_log=is_log)


def _upward(values: Sequence[float], *, percent: bool) -> Axis:
    axis = _axis(values, HEIGHT - _BOTTOM, _TOP)
    # no accuracy lies above 100 %, though a margin would
    return Axis(max(axis.low, 0.0), min(axis.high, 100.0), axis.start, axis.end) if percent else axis


def _ends(points: Sequence[Mark]) -> list[float]:
    return [value for point in points for value in (point.y, point.low, point.high) if value is not None]


def cost_chart(chart: Chart, points: Sequence[Mark]) -> Markup:
    """Return accuracy (in percent) against seconds, with intervals, and the front of what nothing cheaper is better than."""
    x, y = _across([point.x for point in points], is_log=True), _upward(_ends(points), percent=True)
    front = pareto(points)
    steps = "".join(
        f"{'M' if place == 0 else 'H'}{x(point.x):.1f}{' ' if place == 0 else 'V'}{y(point.y):.1f}"
        for place, point in enumerate(front)
    )
    boxes = [(x(point.x) - 5, y(point.y) - 5, x(point.x) + 5, y(point.y) + 5) for point in points]
    labels = [_placed_label(point.label, x(point.x), y(point.y), boxes, is_good=point in front) for point in points]
    return chart.drawn(
        x, y, tag("path", d=f"{steps}H{x.end:.1f}", class_="front"), *(_dot(point, x, y) for point in points), *labels
    )


def pareto(points: Sequence[Mark]) -> list[Mark]:
    """Return the points than which no cheaper one is as good, the cheapest first."""
    front: list[Mark] = []
    for point in sorted(points, key=lambda each: (each.x, -each.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def _dot(point: Mark, x: Axis, y: Axis) -> Markup:
    across, up = x(point.x), y(point.y)
    parts = [tag("circle", cx=across, cy=up, r=point.radius, class_=f"f{point.colour % COLOURS}")]
    if point.low is not None and point.high is not None:
        ends = (max(min(y(end), y.start), y.end) for end in (point.low, point.high))
        low, high = ends
        line = f"M{across:.1f} {low:.1f}V{high:.1f}M{across - 3:.1f} {low:.1f}h6M{across - 3:.1f} {high:.1f}h6"
        parts.insert(0, tag("path", d=line, class_=f"s{point.colour % COLOURS} thin"))
    return tag("g", tag("title", point.title or point.label), *parts)


Box = tuple[float, float, float, float]


def _placed_label(text: str, across: float, up: float, boxes: list[Box], *, is_good: bool) -> Markup:
    """Return a label where it covers neither a point nor another label; else nothing, its point has a title."""
    text = text if len(text) <= 28 else f"{text[:27]}…"
    wide = _LETTER * len(text)
    places = [(across + 8, up + 4), (across - 8 - wide, up + 4)]
    places += [(across - wide / 2, up + shift) for shift in (-9, 17)]
    places += [(across + 8, up + shift) for shift in (-9, 17, -23, 31)] + [
        (across - 8 - wide, up + shift) for shift in (-9, 17)
    ]
    for start, base in places:
        box = (start, base - 10, start + wide, base + 3)
        inside = start >= _LEFT and start + wide <= WIDTH - 2 and base >= _TOP and base <= HEIGHT - _BOTTOM
        if inside and not any(_overlap(box, taken) for taken in boxes):
            boxes.append(box)
            return tag("text", text, x=start, y=base, class_="name strong" if is_good else "name")
    return Markup("")


def _overlap(box: Box, taken: Box) -> bool:
    return box[0] < taken[2] and taken[0] < box[2] and box[1] < taken[3] and taken[1] < box[3]


def line_chart(
    chart: Chart, series: Sequence[Series], *, percent: bool, diagonal: bool = False, is_log: bool = False
) -> Markup:
    """Return lines with intervals; ``diagonal`` draws where both axes are equal, from 0 to 100."""
    points = [point for each in series for point in each.points]
    square = [0.0, 100.0] if diagonal else []
    x = _across([*(point.x for point in points), *square, *map(float, range(len(chart.x_names)))], is_log=is_log)
    y = Axis(0, 100, HEIGHT - _BOTTOM, _TOP) if diagonal else _upward(_ends(points), percent=percent)
    content = [tag("path", d=f"M{x(0):.1f} {y(0):.1f}L{x(100):.1f} {y(100):.1f}", class_="front")] if diagonal else []
    for each in series:
        content += _line_marks(each, x, y)
    named = [each for each in series if each.name]
    return chart.drawn(x, y, *content, *_legend(named if len(named) > 1 else []))


def _line_marks(series: Series, x: Axis, y: Axis) -> list[Markup]:
    path = "".join(f"{'L' if place else 'M'}{x(point.x):.1f} {y(point.y):.1f}" for place, point in enumerate(series.points))
    style = f"s{series.colour % COLOURS} line{' dashed' if series.is_dashed else ''}"
    rings = [
        tag("circle", cx=x(point.x), cy=y(point.y), r=8.0, class_=f"s{series.colour % COLOURS} ring")
        for place, point in enumerate(series.points)
        if place == series.ringed
    ]
    return [tag("path", d=path, class_=style), *rings, *(_dot(point, x, y) for point in series.points)]


def _legend(series: Sequence[Series]) -> list[Markup]:
    """Return the names of lines, in the lower right, where curves that rise leave room."""
    rows = []
    wide = max((_LETTER * len(each.name) for each in series), default=0.0)
    start = WIDTH - _RIGHT - wide - 34
    for place, each in enumerate(series):
        y = HEIGHT - _BOTTOM - 8 - _LINE * (len(series) - 1 - place)
        style = f"s{each.colour % COLOURS} line{' dashed' if each.is_dashed else ''}"
        rows += [
            tag("path", d=f"M{start:.1f} {y - 4}h22", class_=style),
            tag("text", each.name, x=start + 28, y=float(y), class_="name"),
        ]
    return rows


@dataclass(frozen=True)
class Bar:
    """A step of a waterfall: from one accuracy to another, in percent, with its sign; one that was not kept is a cross."""

    name: str
    start: float
    end: float
    text: str
    colour: int
    is_kept: bool = True


def waterfall(chart: Chart, bars: Sequence[Bar]) -> Markup:
    """Return steps side by side, each from where the one before it that was kept has ended."""
    seen = [value for place, bar in enumerate(bars) for value in ((bar.end,) if place == 0 else (bar.start, bar.end))]
    y = _upward([*seen, min(seen) - 2, min(100.0, max(seen) + 2)], percent=True)
    x = Axis(-0.5, len(bars) - 0.5, _LEFT + 4, WIDTH - _RIGHT - 4)
    wide = min(34.0, (x.end - x.start) / len(bars) * 0.7)
    drawn = [_bar(place, bar, x, y, wide) for place, bar in enumerate(bars)]
    level: Callable[[int], float] = lambda place: [bar.end for bar in bars[: place + 1] if bar.is_kept][-1]  # noqa: E731
    links = [
        tag("path", d=f"M{x(place) + wide / 2:.1f} {y(level(place)):.1f}H{x(place + 1) - wide / 2:.1f}", class_="grid")
        for place in range(len(bars) - 1)
    ]
    return chart.drawn(x, y, *links, *drawn)


def _bar(place: int, bar: Bar, x: Axis, y: Axis, wide: float) -> Markup:
    title = tag("title", f"{bar.name}: {bar.text}")
    if not bar.is_kept:
        across, up = x(place), y(bar.end)
        cross = f"M{across - 4:.1f} {up - 4:.1f}l8 8m0 -8l-8 8"
        return tag("g", title, tag("path", d=cross, class_=f"s{bar.colour} line"))
    start = y.start if place == 0 else y(bar.start)
    top, tall = min(start, y(bar.end)), max(abs(start - y(bar.end)), 1.5)
    above = max(top - 5, _TOP)
    return tag(
        "g",
        title,
        tag("rect", x=x(place) - wide / 2, y=top, width=wide, height=tall, class_=f"f{bar.colour}"),
        tag("text", bar.text, x=x(place), y=above, class_="name middle"),
    )


@dataclass(frozen=True)
class Dot:
    """A sample of a map: where it lies, its colour, what is said of it, and its number in the sheet of thumbnails."""

    x: float
    y: float
    colour: int
    title: str
    tile: int | None = None
    is_wrong: bool = False


def map_chart(chart: Chart, dots: Sequence[Dot]) -> Markup:
    """Return samples as dots; wrong ones are ringed. Those with a thumbnail carry its number, for who points at them."""
    x = _axis([dot.x for dot in dots], 8, WIDTH - 8)
    y = _axis([dot.y for dot in dots], HEIGHT - 8, 8)
    drawn = [
        tag(
            "circle",
            tag("title", dot.title),
            cx=round(x(dot.x), 1),
            cy=round(y(dot.y), 1),
            r=3.2 if dot.tile is None else 3.6,
            class_=f"f{dot.colour % COLOURS}{' wrong' if dot.is_wrong else ''}",
            data_tile=dot.tile,
        )
        for dot in sorted(dots, key=lambda each: each.is_wrong)
    ]
    labelled = f"{chart.key}-title {chart.key}-about"
    frame = [tag("title", chart.title, id=f"{chart.key}-title"), tag("desc", chart.about, id=f"{chart.key}-about")]
    view = f"0 0 {WIDTH} {HEIGHT}"
    return tag("svg", *frame, *drawn, viewBox=view, role="img", aria_labelledby=labelled, class_="map")
