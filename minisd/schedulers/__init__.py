"""One file per inference scheduler; the folder listing is the registry.

A scheduler is a module with SETTINGS (the keys of scheduler_config.json that it reads, and their defaults),
A1111 (its name in AUTOMATIC1111's web UI), DIFFUSERS (the class in diffusers, if it has one of its own) and
`sample(problem)`, which yields x after each step.
"""
