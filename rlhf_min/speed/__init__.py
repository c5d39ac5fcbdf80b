"""The same numbers, faster. Skip it at first reading: ``plain=True`` computes without it."""
