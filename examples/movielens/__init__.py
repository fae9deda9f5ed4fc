"""The demo: a multi-task ranker trained on MovieLens-100K with recap_fast and with the reference.

* `data_files`: gets the three files of the data set and checks them; `movielens` reads them.
* `data`: features, labels, the split by time, batches; a synthetic data set of the same schema.
* `model`: a MaskNet backbone with a tower per task, and the schedules it is trained with.
* `train`: one loop that trains any number of optimizers side by side.
* `share`, `sharding`: how several processes divide batches and tables.
* `processes`, `launch`: how they join and what they tell each other; how the demo starts them.
* `report`, `picture`: the table and `results.json`; the losses and learning rates drawn.
* `run`: all of it, as the command line, `cli`, calls it; `arguments`: types for its options.
* `train_distributed`: the training on several processes in one file, to copy from.

Modules import each other relative to this folder, which may be copied as a whole: see its README.

Needs torchrec, fbgemm_gpu, torchmetrics, matplotlib and tqdm (`pip install recap-fast[demo]`).
"""
