"""One file per inference scheduler; the folder listing is the registry.

A scheduler is a module with SETTINGS, the keys of scheduler_config.json that it takes, with their defaults;
with `sample(problem)`, which yields x after each step; and with A1111, its name there.
"""
