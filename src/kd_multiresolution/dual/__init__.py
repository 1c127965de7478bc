"""The dual model, not the paper's: a local and a global cloner, fed by the source's features; a forward-only map.

It keeps the paper's source, critical points and terms of the discrepancy; ``docs/method.md`` says what else it is.
"""
