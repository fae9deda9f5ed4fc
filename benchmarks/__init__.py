"""Throughput of optimizer steps on the CPU, side by side with every peer.

What is timed:

* `workloads`: sets of param groups to step; `builders` and `peers`: the optimizers that step them.
* `interleave`: times peers in turn, cold or warm, and compares them round by round.
* `plan`: what a full run measures; `measurement`: one entry of it, with peak memory (`memory`).
* `growth`: time over elements, tensors and groups.

What is shown (`make bench`, `python -m benchmarks.report`):

* `documents` writes `page` (with `targets`, what the figures must reach), `bars` and `headline`
  from the results of a run; `pictures` draws growth, when asked.

More commands:

* `compare` (`make bench-compare BASE=<revision>`): another `revision` and the work tree, each in a
  process of its own (`side`), step by step in turn.
* `breakdown`: where the time of a small step goes.
* `test_throughput`: the same workloads and peers as a pytest-benchmark suite.
"""
