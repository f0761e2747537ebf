"""Decoders of experts, and a dense twin of equal active FLOPs."""
