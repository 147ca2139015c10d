"""Assembles, checks and uploads a model repository. The command is upload_to_hub.py."""
