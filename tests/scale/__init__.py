"""Several servers on one machine, balanced, rolled and scaled under a load that doesn't wait: ``make scale-test``."""
