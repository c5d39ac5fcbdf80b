"""Our side of a comparison: the functions that are shipped, on the rows that trl had."""
