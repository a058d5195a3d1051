"""Runs ``resnest-fused train`` as ``python -m resnest_fused.training``, for torchrun."""

from resnest_fused.cli import train

if __name__ == "__main__":
    train.main()
