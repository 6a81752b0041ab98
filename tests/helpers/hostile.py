"""A label that Markdown, HTML and terminals would interpret."""

HOSTILE = "<script>x</script> ![a](http://b) [c](http://d) `e` *f* _g_ a|b & www.evil.org \x1b[31m \x9b2J \u202e"
FORMULA = f"=HYPERLINK(1) {HOSTILE}"


def is_inert(page: str) -> bool:
    """Return whether nothing of the label is interpreted on a page of Markdown."""
    return "&#60;script&#62;" in page and not any(
        part in page for part in ("<script", "](http", "`e`", "*f*", "a|b", "www.", "\x1b", "\x9b", "\u202e")
    )
