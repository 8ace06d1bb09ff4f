"""What a full run teaches: measured, searched, chosen, kept."""
