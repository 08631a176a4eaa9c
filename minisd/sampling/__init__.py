"""Prompts to images: the assembled model, guidance, and the work of sample.py."""
