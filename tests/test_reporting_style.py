"""How plots look: colours that are seen, lines that do not hide one another, axes with ticks that can be read."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from graftlm.reporting import distributions, style
from graftlm.reporting.layers import plot_shares
from graftlm.reporting.style import CONTROL, RUN, colours, figure, headline_of, lines, log_axis, save

CONTRAST = 3.0
"""Of graphics on white, at least (WCAG 2.1, 1.4.11)."""


def contrast_on_white(colour) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 1.05 / (0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05)


def test_every_colour_is_seen_on_white():
    named = (RUN, CONTROL, style.BEFORE, style.STRONG, style.WEAK, style.INK)
    layers = [distributions.LAYERS(at) for at in np.linspace(0, 1, 11)]
    for colour in (*named, *style._OTHERS, *(one[:3] for one in layers)):
        assert contrast_on_white(colour) >= CONTRAST, colour
    assert len({*named, *style._OTHERS}) >= len(style._OTHERS) + 5


def test_lines_that_coincide_are_all_seen():
    look = lines(colours(["before", "apex", "control"]))
    assert list(look) == ["before", "apex", "control"]
    order = sorted(look.values(), key=lambda line: line["zorder"])
    assert [line["label"] for line in order] == ["control", "before", "apex"]
    assert [line["linestyle"] for line in order] == ["-", "--", ":"]
    widths = [line["linewidth"] for line in order]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 3
    assert lines({"alone": RUN})["alone"]["linestyle"] == "-"
    many = lines(colours([str(number) for number in range(9)]))
    seen = [(line["color"], line["linestyle"]) for line in many.values()]
    assert len(set(seen)) == 9 and len({line["linewidth"] for line in many.values()}) == 2
    assert [dash for _, dash in seen[:5]] == ["-"] * 5  # no colour has come again


@pytest.mark.parametrize(
    ("values", "logarithmic", "ticks"),
    [
        ([20, 25], False, None),  # narrow
        ([0, 50], False, None),
        ([-1, 50], False, None),
        ([20, 70], True, {"20", "30", "50", "70"}),
        ([20, 600], True, {"20", "50", "100", "200", "500"}),
        ([0.002, 90_000], True, {"0.01", "1", "100", "10 k"}),
    ],
)
def test_log_axes_have_plain_numbers_and_narrow_ranges_none(values, logarithmic, ticks):
    made = figure("t")
    axes = made.subplots()
    axes.plot([0, 1], values)
    assert log_axis(axes.yaxis) is logarithmic
    assert axes.get_yscale() == ("log" if logarithmic else "linear")
    made.draw_without_rendering()
    low, high = axes.get_ylim()
    shown = {t.get_text() for t, at in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True) if low <= at <= high}
    assert ticks is None or ticks <= shown
    assert not any("$" in text for text in shown) and not any(t.get_text() for t in axes.get_yticklabels(minor=True))


def test_a_picture_tells_its_title(tmp_path):
    made = figure("What was seen: σ fell, and the title is longer than a line of the figure can be, so it is broken")
    assert "\n" in made.get_suptitle()
    path = save(made, tmp_path / "a.png")
    assert headline_of(path) == " ".join(made.get_suptitle().split())


def test_models_of_the_same_shares_have_one_line(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("graftlm.reporting.layers.save", lambda figure, path: made.append(figure) or path)

    def shapes(groups, channels):
        return [{"num_key_value_heads": groups, "intermediate_size": channels}] * 3

    models = {"a": shapes(2, 8), "b": shapes(1, 8), "c": shapes(2, 8), "gone": shapes(2, 8)[:2]}
    plot_shares(models, shapes(4, 16), "t", tmp_path / "x.png", {"a": RUN, "b": CONTROL, "c": "#000000"})
    for axes in made[0].axes:
        found = {line.get_label(): line for line in axes.lines}
        assert list(found) == ["a = c", "b"] and found["a = c"].get_color() == RUN
    assert found["b"].get_zorder() < found["a = c"].get_zorder()
