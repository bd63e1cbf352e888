"""The numerical core: models, layers, heads, local units, memory, plans. No I/O, no Ray."""
