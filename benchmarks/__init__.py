"""Measurements beside the other ways to call a function of another process."""
