"""The Hybrid Model Switch and the pruned U-Nets it can take."""
