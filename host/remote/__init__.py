"""A segment of a run on another server."""
