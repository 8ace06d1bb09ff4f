"""The four nodes that quantise."""
