"""The one exception for a user's mistake; everything else that raises is a bug."""


class SlipstreamError(ValueError):
    """Told in one sentence that names the node, the value and what to do."""
