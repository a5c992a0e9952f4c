"""Mixed load for a long time, and whether any process grows or gets slower: ``make soak``."""
