"""Parts of benchmarks.gpu_report that only a GPU runs."""
