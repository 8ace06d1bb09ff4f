"""Profiles as files, and inside workflows."""
