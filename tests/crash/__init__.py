"""Crash campaigns: kills, power cuts and errors at every file call."""
