"""Throughput of optimizer steps on the CPU, side by side with every peer.

* `workloads`: sets of param groups to step; `peers`: the optimizers that step them.
* `interleave`: times peers in turn, cold or warm, and compares them round by round.
* `plan`: what a full run measures; `targets`: what its figures must reach.
* `report`: `python -m benchmarks.report` runs it all and writes results, page and pictures.
* `breakdown`: `python -m benchmarks.breakdown` shows where the time of a small step goes.
* `test_throughput`: the same workloads and peers as a pytest-benchmark suite.
"""
