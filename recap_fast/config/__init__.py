"""Configuration of optimizers and learning rates, checked when it is built.

Field names and defaults are those of the recap recommender's own `optimizer:` section, so that its
YAML loads unchanged. What is new here: all algorithms and options of `torch.optim`'s Adam, AdamW,
Adagrad and SGD for the dense groups, and others for some of them (`groups`); and a choice of
algorithm and schedule for the embeddings, table by table. This package imports neither torch,
torchrec nor FBGEMM.

`as_optimizer_config` and `as_embedding_config` take the same fields from other objects: mappings,
dataclasses and pydantic models of any version, such as the recap recommender's own.
"""

from recap_fast.config import algorithms
from recap_fast.config.algorithms import *  # noqa: F403
from recap_fast.config.base import BaseConfig
from recap_fast.config.convert import as_embedding_config, as_learning_rate, as_optimizer_config
from recap_fast.config.dense import (
    MultiTaskLearningRates,
    OptimizerConfig,
    RecapOptimizerConfig,
)
from recap_fast.config.embeddings import (
    EmbeddingAdagradConfig,
    EmbeddingAdamConfig,
    EmbeddingLambConfig,
    EmbeddingLarsSgdConfig,
    EmbeddingOptimizerConfig,
    EmbeddingPartialRowwiseAdamConfig,
    EmbeddingRowwiseRmspropArConfig,
    EmbeddingSection,
    EmbeddingSgdConfig,
    TableOptimizerConfig,
)
from recap_fast.config.files import load_optimizer_config
from recap_fast.config.groups import GroupConfig, GroupOptions, RecapGroupConfig
from recap_fast.config.rates import (
    LearningRate,
    LinearRampToConstant,
    LinearRampToCosine,
    PiecewiseConstant,
)
from recap_fast.config.row_decay import (
    EmbeddingCounterConfig,
    EmbeddingCowclipConfig,
    EmbeddingGlobalDecayConfig,
)
from recap_fast.config.rowwise_adagrad import (
    EmbeddingEmaRowwiseAdagradConfig,
    EmbeddingEnsembleRowwiseAdagradConfig,
    EmbeddingRowwiseAdagradConfig,
)

__all__ = [
    "BaseConfig",
    "EmbeddingAdagradConfig",
    "EmbeddingAdamConfig",
    "EmbeddingCounterConfig",
    "EmbeddingCowclipConfig",
    "EmbeddingEmaRowwiseAdagradConfig",
    "EmbeddingEnsembleRowwiseAdagradConfig",
    "EmbeddingGlobalDecayConfig",
    "EmbeddingLambConfig",
    "EmbeddingLarsSgdConfig",
    "EmbeddingOptimizerConfig",
    "EmbeddingPartialRowwiseAdamConfig",
    "EmbeddingRowwiseAdagradConfig",
    "EmbeddingRowwiseRmspropArConfig",
    "EmbeddingSection",
    "EmbeddingSgdConfig",
    "GroupConfig",
    "GroupOptions",
    "LearningRate",
    "LinearRampToConstant",
    "LinearRampToCosine",
    "MultiTaskLearningRates",
    "OptimizerConfig",
    "PiecewiseConstant",
    "RecapGroupConfig",
    "RecapOptimizerConfig",
    "TableOptimizerConfig",
    "as_embedding_config",
    "as_learning_rate",
    "as_optimizer_config",
    "load_optimizer_config",
    *algorithms.__all__,
]
