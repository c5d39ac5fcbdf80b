"""Every tolerance of the test suite, declared once. None is loosened to get a test green."""

EXACT = 0.0  # the same operations in the same order: bit-equal
FP64 = 1e-12  # different formulas in float64
SHARED = 1e-10  # whole runs in float64 that several processes share
FP32 = 1e-5  # different formulas, or different batching, in float32
LEGACY_STEP = 1e-9  # whole runs of trl 0.11's PPO: Adam divides a zero gradient's rounding by 1e-8
