"""The pages can be read at the first reading: the README's sentences are short, and words that mislead are absent."""

import re

import pytest

from tests.docs.pages import FENCE, PAGES, README

ABSENT = ("beside", "anew", "goes on", "is told", "can not", "to be had", "it is nothing", "what is due")
"""Words for which there is a plainer one: next to, again, continues, is said, cannot."""

LONGEST = 45
"""Words in a sentence of the README."""


def prose(text):
    """Return the paragraphs and items of a page, without code, tables, headings and the markup of links."""
    text = re.sub(r"\]\([^)]*\)", "]", FENCE.sub("\n\n", text))
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    items = (re.sub(r"^\s*(?:[-*]|\d+\.) ", "", part) for part in parts)
    return [" ".join(part.split()) for part in items if not part.lstrip().startswith(("|", "#", "<"))]


def misleading(text):
    """Return what stands in a page, in its code and tables too, that has a plainer word."""
    found = [word for word in ABSENT if re.search(rf"\b{word}\b", text, re.IGNORECASE)]
    dots = re.findall(r"\w+, \.\.(?!\.)", re.sub(r"`[^`]*`", "", text))
    return found + dots


def too_long(text):
    """Return the sentences of a page with more words than `LONGEST`."""
    sentences = (sentence for part in prose(text) for sentence in re.split(r"(?<=[.!?:;])[*_)]* ", part))
    return [sentence for sentence in sentences if len(sentence.split()) > LONGEST]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem if page != README else "readme")
def test_a_page_has_no_misleading_words(page):
    assert misleading(page.read_text("utf8")) == []


def test_the_readmes_sentences_are_short():
    assert too_long(README.read_text("utf8")) == []


def test_a_fault_is_found():
    text = (
        "Beside it a run goes on, ..\n\n```python\nf(..., 2)  # anew\n```\n\n- " + "word " * 45 + "end.\n- a short one."
    )
    assert misleading(text) == ["beside", "anew", "goes on", "on, .."]
    assert [len(sentence.split()) for sentence in too_long(text)] == [46]
    assert too_long("word " * 30 + "end. " + "word " * 30) == []
