"""The command line ``resnest-fused``: one file for each command, and ``app.py`` that joins them."""

from resnest_fused.cli.app import main

__all__ = ["main"]
