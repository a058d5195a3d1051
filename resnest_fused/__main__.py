"""Runs the command line as ``python -m resnest_fused``."""

from resnest_fused.cli import main

main()
