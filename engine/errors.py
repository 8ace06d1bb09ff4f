"""The one exception for a user's mistake; everything else that raises is a bug."""

from __future__ import annotations

# What a user typed, or what a file holds, may be of any length; a sentence keeps so many characters of both ends.
HEAD, TAIL = 420, 180


class SlipstreamError(ValueError):
    """Told in one sentence that names the node, the value and what to do."""

    def __init__(self, sentence: str) -> None:
        super().__init__(on_one_line(sentence))


def on_one_line(text: str) -> str:
    """The text without line breaks, control characters and half characters, and with its middle cut out if long."""
    text = "".join(c if c >= " " else " " for c in text.encode(errors="replace").decode())
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD]} ... {text[-TAIL:]}"
