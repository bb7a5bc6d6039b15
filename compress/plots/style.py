"""What all plots share: palette, fonts, words for numbers, and PNG without a trace of the day."""

from __future__ import annotations

import functools
import io
import logging
import math
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

PALETTE: Mapping[str, str] = {
    "float32": "#0072b2",
    "bfloat16": "#56b4e9",
    "float16": "#009e73",
    "int8": "#d55e00",
    "float8": "#cc79a7",
    "mixed": "#7a5195",
    "convert": "#e6a800",
    "move": "#9a9a9a",
    "inserted": "#4a4a4a",
}
"""Colours of precisions, and of kernels that compute nothing of the model.

After Okabe and Ito, "Color Universal Design" (2008): told apart with every kind of colour vision.
"""
FAMILIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e6a800", "#56b4e9", "#4a4a4a")
"""Colours of curves that are no precisions."""
INK, FAINT, PAPER = "#24292f", "#6e7781", "#ffffff"
"""Text, secondary text and grid, background. The background is opaque, for pages of any colour."""

WIDTH = 8.0
"""Of every plot in inches of 100 CSS pixels; files have twice as many."""
_CSS_DPI, _DENSITY = 100, 2
_TITLE_LETTERS, _REMARK_LETTERS = 104, 158
"""That fit into a line."""
LONGEST = 38
"""Letters of a name; longer ones lose their middle."""
_MISSING = "\N{REPLACEMENT CHARACTER}"


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib with its own defaults whatever the user set, silent, and without TeX in names."""
    import matplotlib

    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # it would tell of font caches and of folders that it cannot write
    try:
        with warnings.catch_warnings(), matplotlib.rc_context():
            warnings.simplefilter("ignore")
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(
                {
                    "text.parse_math": False,
                    "font.family": ["DejaVu Sans"],
                    "font.size": 8,
                    "text.color": INK,
                    "axes.labelcolor": INK,
                    "axes.edgecolor": FAINT,
                    "axes.titlesize": 8.5,
                    "axes.titlelocation": "left",
                    "axes.spines.top": False,
                    "axes.spines.right": False,
                    "axes.axisbelow": True,
                    "xtick.color": INK,
                    "ytick.color": INK,
                    "grid.color": "#d8dee4",
                    "grid.linewidth": 0.6,
                    "hatch.linewidth": 0.6,
                    "legend.frameon": False,
                    "legend.fontsize": 8,
                }
            )
            yield
    finally:
        log.setLevel(level)


def new_figure(
    height: float,
    title: str,
    remark: str = "",
    *,
    legend: Sequence[Artist] = (),
    width: float = WIDTH,
) -> Figure:
    """An empty figure with its title and legend on top and, smaller, a remark at its foot.

    It belongs to no window and to no global state. Call it inside `drawing`.

    Args:
        height: inches between them.
        title: says what is to be seen; broken into lines where it is long.
        remark: what the reader has to know besides.
        legend: labelled samples; they stand above the plot, where they hide nothing.
        width: inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wrapped = textwrap.wrap(printable(title), int(_TITLE_LETTERS * width / WIDTH))
    notes = textwrap.wrap(printable(remark), int(_REMARK_LETTERS * width / WIDTH))
    lines = _legend_lines(legend, width)
    head, foot = 0.14 + 0.185 * len(wrapped) + 0.17 * len(lines), 0.1 + 0.135 * len(notes)
    total = head + height + foot
    figure = Figure(figsize=(width, total), dpi=_CSS_DPI, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    side = 0.1 / width
    figure.get_layout_engine().set(  # type: ignore[union-attr]
        rect=(side, foot / total, 1 - 2 * side, height / total)  # type: ignore[call-arg]
    )
    figure.suptitle(
        "\n".join(wrapped), x=side, y=1 - 0.09 / total, ha="left", va="top", fontsize=10,
        in_layout=False,
    )  # fmt: skip
    for index, line in enumerate(lines):
        top = 0.1 + 0.185 * len(wrapped) + 0.17 * index
        figure.add_artist(_legend_line(figure, line, (side, 1 - top / total)))
    if notes:
        figure.text(
            side, 0.07 / total, "\n".join(notes), ha="left", va="bottom", fontsize=7,
            color=FAINT, in_layout=False,
        )  # fmt: skip
    return figure


def legend_texts(figure: Figure) -> list[str]:
    """What the legend above a plot says, in order."""
    from matplotlib.legend import Legend

    found = [one for one in figure.get_children() if isinstance(one, Legend)]
    return [text.get_text() for one in found for text in one.get_texts()]


def _legend_lines(legend: Sequence[Artist], width: float) -> list[list[Artist]]:
    """The samples, broken into lines that fit."""
    lines: list[list[Artist]] = []
    room = 0.0
    for one in legend:
        needed = 0.42 + 0.062 * len(str(one.get_label()))
        if not lines or needed > room:
            lines.append([])
            room = width - 0.2
        lines[-1].append(one)
        room -= needed
    return lines


def _legend_line(figure: Figure, line: Sequence[Artist], corner: tuple[float, float]) -> Legend:
    from matplotlib.legend import Legend

    # A label that begins with an underscore would be left out, so texts are set afterwards.
    made = Legend(
        figure, list(line), ["x"] * len(line), loc="upper left", bbox_to_anchor=corner,
        bbox_transform=figure.transSubfigure, ncols=len(line), borderpad=0, borderaxespad=0,
        handletextpad=0.5, columnspacing=1.2,
    )  # fmt: skip
    for text, one in zip(made.get_texts(), line, strict=True):
        text.set_text(printable(str(one.get_label())))
    made.set_in_layout(False)
    return made


def png(figure: Figure) -> bytes:
    """The figure as a PNG file of double density; the same figure gives the same bytes.

    With a palette of 255 colours it has a third of the size; flat colours stay what they are.
    """
    from PIL import Image

    full, stream = io.BytesIO(), io.BytesIO()
    with drawing():
        figure.savefig(
            full, format="png", dpi=_CSS_DPI * _DENSITY, facecolor=PAPER,
            pil_kwargs={"compress_level": 1},
        )  # fmt: skip
    with Image.open(full) as image:
        few = image.convert("RGB").quantize(
            255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
    few.save(stream, "PNG", optimize=True, dpi=(_CSS_DPI * _DENSITY,) * 2)
    return stream.getvalue()


def number(value: Any, what: str) -> float:
    """A finite number that is not negative.

    Raises:
        UsageError: it is something else; `what` says where it stands.
    """
    proper = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not proper or not math.isfinite(value) or value < 0:
        raise UsageError(
            f"{what} is {value!r}, and a plot takes finite numbers from 0 on. Measure it again, or "
            f"leave the row out."
        )
    return float(value)


def colour(precision: str) -> str:
    """Of a precision or a kind of kernel; unknown ones look inserted."""
    return PALETTE.get(precision, PALETTE["inserted"])


def printable(text: str) -> str:
    """The text with a sign in place of whatever the font does not have."""
    known = _glyphs()
    return "".join(one if ord(one) in known and one.isprintable() else _MISSING for one in text)


def shortened(name: str, longest: int = LONGEST) -> str:
    """A name that can be drawn, without its middle where it is long."""
    name = printable(name)
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[: longest - 1 - half]}…{name[-half:]}"


def short_names(names: Iterable[str], longest: int = LONGEST) -> dict[str, str]:
    """Names that can be drawn, by name: of long ones the parts go first that most others share.

    `/model/encoder/encoder.0/conv/Conv` becomes `…/encoder.0/…` beside `encoder.1`, so that what
    tells names apart stays. Names without parts lose their middle.
    """
    given = list(dict.fromkeys(names))
    parts = {name: re.split(r"([./])", printable(name)) for name in given}
    common = Counter(part for found in parts.values() for part in set(found[::2]))
    return {name: _fitted(found, common, longest) for name, found in parts.items()}


def _fitted(parts: Sequence[str], common: Mapping[str, int], longest: int) -> str:
    """The name without its most common parts, the earlier ones first, until it fits."""
    kept = list(parts)
    places = sorted(range(0, len(parts), 2), key=lambda at: (-common[parts[at]], at))
    for place in places[:-1]:
        if len("".join(kept)) <= longest:
            break
        kept[place] = "…"
        text = re.sub(r"…(?:[./]…)+", "…", "".join(kept))
        if len(text) <= longest:
            return text
    return shortened("".join(parts), longest)


def microseconds(value: float) -> str:
    """`834 ns`, `12.3 µs`, `4.56 ms` or `1.23 s`."""
    for unit, size in (("s", 1e6), ("ms", 1e3), ("µs", 1.0)):
        if value >= 0.9995 * size:
            return f"{plain(value / size)} {unit}"
    return f"{plain(value * 1e3)} ns" if value else "0 µs"


def rate(gmacs: float) -> str:
    """`56.8 GMAC/s`."""
    return f"{plain(gmacs)} GMAC/s"


def plain(value: float) -> str:
    """Three digits, never with an exponent between 0.001 and a million."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def log_axis(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if which == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    decades = math.log10(high / low)
    marks = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
    axis.set_major_locator(LogLocator(subs=marks, numticks=15))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def padded(values: Sequence[float], by: float = 1.6) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values."""
    return min(values) / by, max(values) * by


@functools.cache
def _glyphs() -> frozenset[int]:
    """Code points of the font that comes with Matplotlib."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return frozenset(FT2Font(str(path)).get_charmap())
