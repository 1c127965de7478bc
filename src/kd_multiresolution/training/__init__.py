"""What a training of either model is made of beside its steps: caches, seeds, epochs, optimisers, when it stops.

Each part is a Lightning callback, an optimiser or a function, and knows nothing of the models.
"""
