"""Training by the published recipe, on one process or many, and runs that never lose a step.

``resnest-fused train`` and ``python -m resnest_fused.training``, the latter under ``torchrun``
too, are :func:`resnest_fused.training.run.train` with a
:class:`resnest_fused.training.config.Config`. They need the extra ``train``. Nothing is imported
here, as the command line shows its help without torch.
"""
