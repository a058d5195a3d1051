"""Agreement, time and memory: what the command line and the benchmarks measure alike."""
