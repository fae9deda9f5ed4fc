"""Steps on a CUDA device, side by side with every peer: `python -m benchmarks.gpu`.

* `peers`: the optimizers that step a workload of `benchmarks.workloads`, on rotating copies.
* `timing`: times them in turn; `activity`: counts what a step launches and copies.
* `plan`: what a run measures; `card`: what a reader needs to know of the device.
* `report`: runs it all and writes results; `page`: shows them, with the figures to reach.

`benchmarks/gpu_session.sh` builds the package, runs the tests on the device and then this.
Needs neither torchrec nor pydantic.
"""
