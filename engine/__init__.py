"""The mathematics of caching and forecasting: pure torch, no host."""
