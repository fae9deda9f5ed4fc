"""Training on many processes: what was measured here, and what it comes to on many GPUs.

* `worker`: runs in each process: times the demo's training, counts the bytes that it sends.
* `neighbours`: whether other processes disturb a timing.
* `rows`: what FBGEMM allocates for a row of a table.
* `arithmetic`: memory and traffic of any number of GPUs, from these constants.
* `page`: `docs/scaling.md`.
"""
