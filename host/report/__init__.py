"""The Report: runs beside the plain one, and their picture."""
