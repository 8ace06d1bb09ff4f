"""What the canvas is told while a run goes on, and its colours."""
