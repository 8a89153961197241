"""Speed of Popdrop and of its peers, measured side by side: `python -m benchmarks --help`."""
