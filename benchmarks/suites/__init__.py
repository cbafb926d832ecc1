"""One file for each op or model that is measured; see benchmarks/suite.py."""
