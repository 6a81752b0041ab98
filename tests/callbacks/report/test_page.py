import math

from malleable.callbacks.report.page import Section, figure_names, format_cell, markdown, markdown_table, plain_table


def test_numbers():
    assert [format_cell(value) for value in (0.12345678, 0.0, 123.4567, 1e-6, math.nan, None, 7, "x")] == [
        "0.1235",
        "0.0000",
        "123.46",
        "1e-06",
        "–",
        "–",
        "7",
        "x",
    ]


def test_tables_escape_bars():
    assert markdown_table(("title", "n"), [("Tea | green", 3)]).splitlines() == [
        "| title | n |",
        "| --- | ---: |",
        "| Tea &#124; green | 3 |",
    ]


def test_plain_tables_are_aligned():
    assert plain_table(("metric", "ours"), [("hr", 0.5), ("ndcg_10", None)]).splitlines() == [
        "metric     ours",
        "hr       0.5000",
        "ndcg_10       –",
    ]


def test_a_page_has_its_sections_in_order():
    page = markdown(
        "Run",
        [
            Section("Most: recommended!", text="Some words.", table=(("a",), [(1,)]), figure=lambda figure: None),
            Section("Most recommended", figure=lambda figure: None),
            Section("最"),
        ],
    )
    assert page == (
        "# Run\n\n## Most: recommended!\n\nSome words.\n\n![Most: recommended!](most_recommended.png)\n\n| a |\n| --- |\n| 1 |\n\n"
        "## Most recommended\n\n![Most recommended](most_recommended_2.png)\n\n## 最\n"
    )


def test_figure_names_are_distinct():
    assert figure_names([Section("A b"), Section("a-b"), Section("A b c"), Section("A B"), Section("?")]) == [
        "a_b.png",
        "a_b_2.png",
        "a_b_c.png",
        "a_b_3.png",
        "figure.png",
    ]
