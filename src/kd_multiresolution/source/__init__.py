"""The source: the frozen network whose features a cloner learns to imitate, its critical points, and its weights.

``network`` has the source, ``stages`` what it is made of, ``weights`` how they are had, ``images`` what it takes.
"""
