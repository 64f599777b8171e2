"""The command `vit`. Importing this package loads nothing else."""
