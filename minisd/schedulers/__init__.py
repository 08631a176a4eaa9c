"""One file per inference scheduler; the folder listing is the registry.

A scheduler is a module with SETTINGS (the keys of scheduler_config.json that it reads, and their defaults),
A1111 (its name in AUTOMATIC1111's web UI) and `sample(problem)`, which yields x after each step.
"""
