"""The benchmarks behind `tools/bench_*`: one module each."""
