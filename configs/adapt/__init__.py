"""Pretrained models to make adaptive, one a file."""
