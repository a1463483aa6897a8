"""One exact training step, several engines: see ``interface`` for what they share.

``dense`` is plain autograd, the reference; ``sparse_cpu`` visits active entries only. Nothing is imported here: the
sparse engine's compiler takes a second to import, and a dense run does without it.
"""
