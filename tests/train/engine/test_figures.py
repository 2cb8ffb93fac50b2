"""Names in figures are drawn as they are."""

from matplotlib.figure import Figure

from train.engine.figures import to_png

ODD = ["under $5", "over $5", "x^2 $\\frac{$", "$$", "a_b", "<b>&amp;", "100 %"]


def test_dollars_make_no_formulas() -> None:
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.barh(ODD, range(len(ODD)), label=ODD[2])
    axes.set_title(ODD[2])
    axes.set(xlabel=ODD[0], ylabel="a $b$ c")
    axes.annotate(ODD[2], (0, 0))
    axes.legend(title=ODD[2])
    figure.suptitle(ODD[2])
    assert to_png(figure).startswith(b"\x89PNG")
    assert not any(text.get_parse_math() for text in [*axes.get_yticklabels(), axes.title, axes.xaxis.label])
