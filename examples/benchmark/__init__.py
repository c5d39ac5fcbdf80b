"""The parts of ``benchmark_vs_trl.py``: workloads, our side, trl's side, and what compares them."""
