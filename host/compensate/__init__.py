"""The Error Compensator."""
