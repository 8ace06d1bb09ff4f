"""One operation, one numeric contract: `reference.py` states it, faster implementations must agree with it."""
