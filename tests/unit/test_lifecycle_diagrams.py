"""The drawn lifecycles are the tables."""

from tools.lifecycle_diagrams import TARGET, document


def test_the_page_is_up_to_date():
    assert TARGET.read_text() == document()
