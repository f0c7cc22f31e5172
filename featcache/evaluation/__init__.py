"""Splits that are drawn honestly, and scores that say how far they can be trusted."""
