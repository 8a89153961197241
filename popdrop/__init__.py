"""Popdrop: a POP3 server for people who own their mail spools."""

__version__ = "0.1.0"
