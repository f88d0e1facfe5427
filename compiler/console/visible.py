"""Strangers' names made harmless to print: the one place that renders them for messages, terminals, pages and files."""


def visible(text: str) -> str:
    """The text with every unprintable character (controls, line ends, U+202E, lone surrogates) as \\uXXXX.

    What comes out is one line that UTF-8 can encode.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
