"""Throughput of optimizer steps on a CPU or a GPU, side by side with every peer.

What is timed:

* `workloads`: sets of param groups to step.
* `builders` and `peers`: the optimizers that step them.
* `clocks`: what times a step, on a CPU and on a GPU; `interleave` times peers in turn with it, and
  compares them round by round. `activity` counts what a step launches on a GPU.
* `plan`: what a run measures; `measurement`: one case of it, with peak memory (`memory`).
* `growth`: time over elements, tensors and groups; `sparse`: tables with sparse gradients;
  `state_formats`: parameters and states in fewer bytes; `breakdown`: where the time of a small step
  goes.
* `machine`, `card`: what a reader needs to know of the machine.

What is shown (`make bench`, `python -m benchmarks.report [--gpu]`):

* `documents` writes `page` or `gpu_page` (with `targets`, what the figures must reach), `headline`
  and one of `pictures` from the results of a run; the others, of growth, are drawn when asked.

More commands:

* `test_throughput` (`make bench-suite`): the same workloads and peers as a pytest-benchmark suite.
* `compare` (`make bench-compare BASE=<revision>`): another `revision` and the work tree, each in a
  process of its own (`side`), step by step in turn.
* `gpu_session.sh`: on a machine with a GPU, builds, tests and measures. Needs neither torchrec nor
  pydantic.
* `scaling`: training on several processes.
"""
