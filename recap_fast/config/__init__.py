"""Configuration of optimizers and learning rates, checked when it is built.

Field names and defaults are those of the recap recommender's own `optimizer:` section, so that its
YAML loads unchanged. What is new here: adagrad and sgd for the dense groups, and a choice of
algorithm and schedule for the embeddings, table by table. This package imports neither torch,
torchrec nor FBGEMM.
"""

from recap_fast.config.base import BaseConfig
from recap_fast.config.dense import (
    AdagradConfig,
    AdamConfig,
    MultiTaskLearningRates,
    OptimizerConfig,
    RecapAdagradConfig,
    RecapAdamConfig,
    RecapOptimizerConfig,
    RecapSgdConfig,
    SgdConfig,
)
from recap_fast.config.embeddings import (
    EmbeddingAdagradConfig,
    EmbeddingAdamConfig,
    EmbeddingLambConfig,
    EmbeddingLarsSgdConfig,
    EmbeddingOptimizerConfig,
    EmbeddingPartialRowwiseAdamConfig,
    EmbeddingSection,
    EmbeddingSgdConfig,
    TableOptimizerConfig,
)
from recap_fast.config.files import load_optimizer_config
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
    "AdagradConfig",
    "AdamConfig",
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
    "EmbeddingSection",
    "EmbeddingSgdConfig",
    "LearningRate",
    "LinearRampToConstant",
    "LinearRampToCosine",
    "MultiTaskLearningRates",
    "OptimizerConfig",
    "PiecewiseConstant",
    "RecapAdagradConfig",
    "RecapAdamConfig",
    "RecapOptimizerConfig",
    "RecapSgdConfig",
    "SgdConfig",
    "TableOptimizerConfig",
    "load_optimizer_config",
]
