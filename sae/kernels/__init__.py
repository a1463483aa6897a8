"""One exact training step, several engines: see ``interface`` for what they share.

``dense`` multiplies whole matrices, its gradients written out; ``sparse_cpu`` and ``triton_sparse`` visit active
entries only; ``reference`` is plain autograd, which tests compare all of them with. Nothing is imported here: the
sparse engines' compilers take a second to import, and a dense run does without them.
"""
