"""`python -m recap_fast`, or `recap-fast`: examines this build on this machine.

* `versions`: what it runs with;
* `bits`: steps every update on every engine, and compares;
* `speed`: times steps against `torch.optim`;
* `missing`: what is not there, and how to get it;
* `main`: prints all of it.
"""
