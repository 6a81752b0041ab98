import pytest
import torch
from matplotlib.figure import Figure

from malleable.callbacks.report import fonts, plots
from malleable.callbacks.report.plots import (
    draw_curves,
    draw_exposure,
    draw_exposure_curve,
    draw_phases,
    draw_uncertainty,
    running_mean,
    save_figure,
    short_title,
)

TITLES = [f"Title {item}" for item in range(6)]


def axes():
    return Figure().subplots()


def test_bars_show_the_shares_of_the_largest_items():
    place = axes()
    versions = {"before": torch.tensor([5, 1, 0, 4, 0, 0]), "after": [0, 0, 6, 2, 2, 0]}
    draw_exposure(place, versions, TITLES, top=3)
    # Largest share in any version: 2 (60 %), 0 (50 %), 3 (40 %); the first version orders them.
    assert [label.get_text() for label in place.get_yticklabels()] == ["Title 0", "Title 3", "Title 2"]
    before, after = ([bar.get_width() for bar in bars] for bars in place.containers)
    assert before == pytest.approx([50, 40, 0])
    assert after == pytest.approx([0, 20, 60])
    assert [text.get_text() for text in place.get_legend().get_texts()] == ["before", "after"]
    assert place.yaxis_inverted()


def test_concentration_is_a_cumulative_share():
    place = axes()
    draw_exposure_curve(place, {"recommended": [1, 0, 6, 3]})
    assert list(place.lines[0].get_ydata()) == pytest.approx([60, 90, 100, 100])
    assert list(place.lines[0].get_xdata()) == [1, 2, 3, 4]


def test_medians_of_degree_bins(monkeypatch):
    place, degree = axes(), torch.tensor([1, 100, 1, 1, 100, 10_000])
    draw_uncertainty(place, degree, torch.tensor([3.0, 8.0, 1.0, 2.0, 7.0, 5.0]), -0.5)
    assert [list(values) for values in (place.lines[0].get_xdata(), place.lines[0].get_ydata())] == [[1, 100, 10_000], [2, 7, 5]]
    assert "Uncertainty of entities (Spearman -0.50)" in (place.get_title(), place.get_title(loc="left"))
    assert len(place.collections[0].get_offsets()) == 6
    monkeypatch.setattr(plots, "MAX_DOTS", 3)
    few, equal = axes(), axes()
    draw_uncertainty(few, degree, degree.float(), 1.0)
    assert [x for x, _ in few.collections[0].get_offsets().tolist()] == [1, 1, 10_000]
    draw_uncertainty(equal, torch.full((4,), 7), torch.arange(4.0), float("nan"))
    assert (list(equal.lines[0].get_xdata()), list(equal.lines[0].get_ydata())) == ([7], [1])


def test_curves_have_labels_and_a_legend_when_there_are_several():
    place = axes()
    draw_curves(place, {"val": ([1, 2], [0.5, 0.25])}, title="loss", y_label="nats")
    assert place.get_legend() is None
    assert (place.get_title(loc="left") or place.get_title(), place.get_xlabel(), place.get_ylabel()) == ("loss", "optimizer step", "nats")
    draw_curves(place, {"a": ([1], [1.0]), "b": ([1], [2.0])})
    assert place.get_legend() is not None


def test_titles_are_shortened_and_dollar_signs_escaped():
    assert short_title("Sugar $5 and $6") == r"Sugar \$5 and \$6"
    assert short_title("a" * 40 + " (1995)") == "a" * 30 + "… (1995)"


def test_figures_are_written_atomically(tmp_path):
    path = tmp_path / "deep" / "figure.png"
    save_figure(path, lambda figure: draw_exposure(figure.subplots(), {"recommended": [1] * 6}, ["$x$", "日本", *TITLES[2:]]))
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")

    def broken(figure):
        raise RuntimeError("no drawing")

    with pytest.raises(RuntimeError, match="no drawing"):
        save_figure(path, broken)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


def test_refusals():
    with pytest.raises(ValueError, match=r"all versions must count the same items, got \{'a': 1, 'b': 2\}"):
        draw_exposure(axes(), {"a": [1], "b": [1, 2]}, TITLES)
    with pytest.raises(ValueError, match="versions is empty"):
        draw_exposure_curve(axes(), {})


def test_a_short_logarithmic_axis_has_plain_numbers():
    figure = Figure()
    axes = figure.subplots()
    draw_uncertainty(axes, torch.tensor([3, 4, 5, 6, 8, 9] * 3), torch.rand(18, generator=torch.Generator().manual_seed(0)), -0.5)
    figure.canvas.draw()
    labels = [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_xticklabels(minor=True)) if label.get_text()]
    assert labels
    assert all(label.isdigit() for label in labels)


def test_legend_does_not_cover_the_plot():
    curves = {f"val @{k}": ([1, 2, 3], [k, 5.0, 10.0 - k]) for k in (1, 3, 5, 10)}
    drawings = {
        "curves": lambda place: (draw_curves(place, curves, title="hr"), draw_phases(place, [(0, "supervised"), (2, "preference")], 3)),
        "exposure": lambda place: draw_exposure_curve(place, {"before self-play": [5, 1, 1], "training interactions": [1, 1, 1]}),
        "titles": lambda place: draw_exposure(place, {"before": [5, 1, 0], "after": [0, 1, 5]}, TITLES),
        "uncertainty": lambda place: draw_uncertainty(place, torch.tensor([3, 4, 50]), torch.rand(3), 0.5),
    }
    for name, draw in drawings.items():
        figure = Figure(layout="constrained")
        place = figure.subplots()
        draw(place)
        figure.canvas.draw()
        legend = place.get_legend().get_window_extent()
        title = max((text.get_window_extent() for text in (place.title, place._left_title) if text.get_text()), key=lambda box: box.y0)
        assert place.get_window_extent().y1 <= legend.y0 + 2, name
        assert legend.y1 <= title.y0 + 2, name


def test_a_running_mean_stops_at_gaps():
    nan = float("nan")
    means = running_mean([1.0, 2.0, 6.0, nan, 10.0, 20.0], 3)
    assert means[:3] == [1.5, 3.0, 4.0]
    assert means[3] != means[3]
    assert means[4:] == [15.0, 15.0]


def test_noisy_curves_are_smoothed():
    place, steps = axes(), list(range(100))
    values = [float(step % 2) for step in steps]
    draw_curves(place, {"train": (steps, values), "val": (steps, values)}, smoothed=["train"])
    faint, mean, other = place.lines
    assert (list(faint.get_ydata()), faint.get_alpha(), list(other.get_ydata())) == (values, 0.25, values)
    assert all(0.4 < value < 0.6 for value in list(mean.get_ydata())[10:-10])
    assert place.get_legend_handles_labels()[1] == ["train", "val"]
    for plain in (values[:30], [float(step) for step in steps]):
        calm = axes()
        draw_curves(calm, {"train": (steps[: len(plain)], plain)}, smoothed=["train"])
        assert len(calm.lines) == 1


def test_characters_that_no_font_has_are_replaced(monkeypatch, caplog):
    monkeypatch.setattr(fonts, "_characters", lambda: frozenset(range(0x100)))
    fonts._log_missing.cache_clear()
    with caplog.at_level("INFO"):
        assert fonts.drawable("Café", "7") == "Café"
        assert not caplog.records
        assert fonts.drawable("Tea \U0001f375 (2 g)", "7") == "Tea (2 g)"
        assert fonts.drawable("I \u2764\ufe0f Tea", "7") == "I Tea"
        assert fonts.drawable("\U0001f381", "7") == "[wrapped present]"
        assert fonts.drawable("\U0001f381" * 3, "7") == "id 7"
        assert fonts.drawable("\uff34ea \u2116 1", "7") == "Tea No 1"
        assert fonts.drawable("\u8336 Tea", "7") == "\u25a1 Tea"
        assert fonts.drawable("日本の茶", "7") == "id 7"
        assert fonts.drawable("日本の茶") == "\u25a1" * 4
    assert [record.levelname for record in caplog.records] == ["INFO"]
    place = axes()
    draw_exposure(place, {"recommended": [2, 1]}, ["日本の茶", "Tea"], keys=["P-1", "P-2"])
    assert [label.get_text() for label in place.get_yticklabels()] == ["id P-1", "Tea"]


def test_titles_are_not_changed_if_a_font_has_their_characters(monkeypatch):
    monkeypatch.setattr(fonts, "_characters", lambda: frozenset(map(ord, "日本の茶 \U0001f381Tea")))
    for title in ("日本の茶", "Tea \U0001f381"):
        assert fonts.drawable(title, "7") == title


def test_default_font_comes_first():
    assert fonts.installed_families()[0] == fonts.DEFAULT
    assert fonts.drawable("Crème & Teapot → ½") == "Crème & Teapot → ½"
