import pytest

from malleable.datamodules.recommendation.titles import clean_title, merge_titles, with_year


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("Lion King, The", "The Lion King"),
        ("Lion King, The (1994)", "The Lion King (1994)"),
        ("Simple Twist of Fate, A", "A Simple Twist of Fate"),
        ("Awfully Big Adventure, An (1995)", "An Awfully Big Adventure (1995)"),
        ("Misérables, Les (1995)", "Les Misérables (1995)"),
        ("Uomo delle stelle, L' (1995)", "L'Uomo delle stelle (1995)"),
        ("Boot, Das", "Das Boot"),
        ("Return of Martin Guerre, The (Retour de Martin Guerre, Le) (1982)", "The Return of Martin Guerre (Le Retour de Martin Guerre) (1982)"),
        ("Double vie de Véronique, La (Double Life of Veronique, The)", "La Double vie de Véronique (The Double Life of Veronique)"),
        ("Seven (a.k.a. Seventh, The)", "Seven (a.k.a. The Seventh)"),
        ("Beans of Egypt, Maine, The (1994)", "The Beans of Egypt, Maine (1994)"),
        ("Wonderful, Horrible Life of Leni Riefenstahl, The", "The Wonderful, Horrible Life of Leni Riefenstahl"),
    ],
)
def test_trailing_articles_move_to_the_front(given, clean):
    assert clean_title(given) == clean


@pytest.mark.parametrize(
    "title",
    [
        "Paris, Texas (1984)",
        "Corrina, Corrina (1994)",
        "Mystery, Alaska",
        "Moby-Dick or, The Whale",
        "Good, The Bad and The Ugly",
        "I <3 You",
        "1 < 2",
        "<M shirt",
        "Shirt <M> blue",
        "Shirt <S>",
        "A <body of work",
        "Emma <3 Anna> Lena",
        "<Untitled>",
    ],
)
def test_other_commas_and_signs_are_kept(title):
    assert clean_title(title) == title


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("Elton John &lrm;&ndash; Honky Ch&acirc;teau", "Elton John – Honky Château"),
        ("Bang, Zoom, Crazy&hellip;Hello", "Bang, Zoom, Crazy…Hello"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ('<span class="a-size-medium a-color-secondary a-text-normal', ""),
        ("<b>Abbey</b> Road<!-- x -->", "Abbey Road"),
        ("  A Clash of Kings  (A Song of Ice\tand Fire, #2)\n", "A Clash of Kings (A Song of Ice and Fire, #2)"),
        ('"Heroes"', "Heroes"),
        ('A Child Called "It"', 'A Child Called "It"'),
        ('"Weird Al" and "Friends"', '"Weird Al" and "Friends"'),
        ("\u201cHeroes\u201d and Ain\u2019t", '"Heroes" and Ain\'t'),
        ("Cafe\u0301", "Café"),
        ("zero\u200bwidth", "zerowidth"),
        ("", ""),
    ],
)
def test_markup_and_invisible_characters_are_removed(given, clean):
    assert clean_title(given) == clean


def test_cleaning_twice_changes_nothing():
    title = "Umbrellas of Cherbourg, The (Parapluies de Cherbourg, Les) (1964)"
    assert clean_title(clean_title(title)) == clean_title(title)


@pytest.mark.parametrize(
    ("title", "year", "expected"),
    [
        ("Heat", "1995", "Heat (1995)"),
        ("Heat (1995)", "1995", "Heat (1995)"),
        ("Time III (1995)", "V", "Time III (1995)"),
        ("unknown", "", "unknown"),
    ],
)
def test_with_year(title, year, expected):
    assert with_year(title, year) == expected


def test_equal_titles_are_merged_and_empty_ones_dropped():
    assert merge_titles(["Heat", "Chasing Amy", "", "Heat"]) == (["Heat", "Chasing Amy"], [0, 1, -1, 0])
