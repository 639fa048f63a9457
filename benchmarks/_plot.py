"""Line charts as small SVG files, without a plotting library: limits over time, and the best fixed one as a band."""

import itertools
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 36, 156, 34, 40
SVG = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
STYLES = {
    "gradient": ("#0b6e99", 2.4),
    "vegas": ("#b5651d", 1.4),
    "aimd": ("#7a4fa3", 1.4),
    "failsafe": ("#7d8793", 1.4),
}
LABELS = {"failsafe": "failsafe-go's rule"}


def picture(title: str, lines: Mapping[str, Sequence[float]], best: Sequence[float | None], *, top: float) -> str:
    """A chart of `lines`, one value a second; `best` is drawn dashed within a band of a fifth; higher is cut off."""
    seconds = len(best)

    def x(second: float) -> float:
        return LEFT + second / seconds * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - min(value, top) / top * (HEIGHT - TOP - BOTTOM)

    parts = [
        SVG,
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 20, title, weight="600"),
    ]
    for value in range(0, int(top) + 1, 20):
        parts += [
            f'<path d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}" stroke="#e3e6ea"/>',
            _text(LEFT - 8, y(value) + 4, str(value), anchor="end"),
        ]
    parts += [_text(x(second), HEIGHT - BOTTOM + 18, f"{second} s", anchor="middle") for second in range(0, 181, 30)]
    for start, end in _spans(best):
        parts.append(_band(best, start, end, x, y))
    for name, values in lines.items():
        colour, width = STYLES[name]
        points = " ".join(f"{x(second + 0.5):.1f},{y(value):.1f}" for second, value in enumerate(values))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
    for row, name in enumerate(lines):
        parts.append(_key(row, LABELS.get(name, name), f'stroke="{STYLES[name][0]}" stroke-width="{STYLES[name][1]}"'))
    parts.append(_key(len(lines), "best fixed, ± 20 %", 'stroke="#1d2733" stroke-dasharray="4 3"'))
    return "\n".join([*parts, "</svg>", ""])


def _spans(best: Sequence[float | None]) -> list[tuple[int, int]]:
    """Where `best` is known: start and end of each stretch."""
    edges = [second for second in range(1, len(best)) if (best[second] is None) != (best[second - 1] is None)]
    bounds = [0, *edges, len(best)]
    return [(start, end) for start, end in itertools.pairwise(bounds) if best[start] is not None]


def _band(best: Sequence[float | None], start: int, end: int, x: object, y: object) -> str:
    assert callable(x)
    assert callable(y)
    known = [(second, value) for second in range(start, end) if (value := best[second]) is not None]

    def stairs(factor: float) -> list[str]:
        return [f"{x(at):.1f},{y(value * factor):.1f}" for second, value in known for at in (second, second + 1)]

    band = " ".join(stairs(1.2) + stairs(0.8)[::-1])
    return (
        f'<polygon points="{band}" fill="#1d2733" fill-opacity="0.09"/>\n'
        f'<polyline points="{" ".join(stairs(1.0))}" fill="none" stroke="#1d2733" stroke-dasharray="4 3"/>'
    )


def _key(row: int, label: str, stroke: str) -> str:
    height = TOP + 16 + row * 20
    left = WIDTH - RIGHT + 10
    return f'<path d="M{left} {height - 4}h16" fill="none" {stroke}/>\n' + _text(left + 21, height, label)


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#1d2733" text-anchor="{anchor}" font-weight="{weight}">{text}</text>'
