"""The demonstration: a small trained model, the real host, one page of results."""
