"""Contrastive training: data pipeline, losses, DeepSpeed engine, loop, checkpoints, export.

Nothing is imported here: the command line loads this package without torch.
"""
