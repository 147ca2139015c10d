"""Conversions of checkpoints. The command is tools/convert_checkpoint.py."""
