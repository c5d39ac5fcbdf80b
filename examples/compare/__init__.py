"""Our runs beside trl's: what `compare_with_trl.py` consists of."""
