"""Prompts to pictures: the assembled model, guidance, what sample.py does."""
