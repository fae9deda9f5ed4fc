"""Configuration from other programs' objects: their own classes, mappings, dataclasses."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections import OrderedDict
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pydantic
import pytest

from recap_fast.config import (
    AdamConfig,
    AdamWConfig,
    EmbeddingAdamConfig,
    EmbeddingLambConfig,
    EmbeddingOptimizerConfig,
    GroupConfig,
    LearningRate,
    OptimizerConfig,
    RecapAdamWConfig,
    RecapOptimizerConfig,
    as_embedding_config,
    as_learning_rate,
    as_optimizer_config,
)
from tests.support.original_configs import CLASSES, OriginalConfigs

RECAP = {
    "adam": {"beta_1": 0.95, "beta_2": 0.999, "epsilon": 1e-7},
    "multi_task_learning_rates": {
        "backbone_learning_rate": {
            "linear_ramp_to_constant": {"learning_rate": 1e-4, "num_ramp_steps": 10}
        },
        "tower_learning_rates": {
            "recap.liked": {
                "piecewise_constant": {
                    "learning_rate_boundaries": [3],
                    "learning_rate_values": [0.5, 0.25],
                }
            },
            "recap.replied": {"constant": 0.125},
        },
    },
}
GENERIC = {"adagrad": {"lr": 0.5}, "learning_rate": {"constant": 0.25}}


@pytest.fixture(params=CLASSES)
def original(request: pytest.FixtureRequest) -> OriginalConfigs:
    return CLASSES[request.param]


# The original's classes


def test_the_originals_own_configuration(original: OriginalConfigs) -> None:
    config = original.recap_optimizer(**RECAP)
    expected = RecapOptimizerConfig.model_validate(RECAP)
    assert as_optimizer_config(config) == expected
    assert list(expected.multi_task_learning_rates.tower_learning_rates) == [
        "recap.liked",
        "recap.replied",
    ]


def test_the_originals_defaults_are_ours(original: OriginalConfigs) -> None:
    rate = {"constant": 0.5}
    single = original.recap_optimizer(adam={}, single_task_learning_rate=rate)
    assert as_optimizer_config(single) == RecapOptimizerConfig.model_validate(
        {"adam": {}, "single_task_learning_rate": rate}
    )
    for algorithm in ("adam", "sgd", "adagrad"):
        generic = original.optimizer(**{algorithm: {"lr": 0.5}})
        assert as_optimizer_config(generic) == OptimizerConfig(**{algorithm: {"lr": 0.5}})


def test_what_the_originals_classes_coerce_is_taken(original: OriginalConfigs) -> None:
    config = original.recap_optimizer(
        adam={"epsilon": "1e-7"},
        multi_task_learning_rates={
            "tower_learning_rates": {},
            "backbone_learning_rate": {
                "linear_ramp_to_constant": {"learning_rate": "1e-3", "num_ramp_steps": "10"}
            },
        },
    )
    rates = as_optimizer_config(config).multi_task_learning_rates
    ramp = rates.backbone_learning_rate.linear_ramp_to_constant
    assert (ramp.learning_rate, ramp.num_ramp_steps) == (1e-3, 10)
    assert rates.tower_learning_rates == {}


def test_the_originals_configuration_of_tables(original: OriginalConfigs) -> None:
    config = original.embedding_optimizer(learning_rate={"constant": 0.5}, init_learning_rate=0.25)
    assert as_embedding_config(config) == EmbeddingOptimizerConfig.model_validate(
        {"learning_rate": {"constant": 0.5}, "init_learning_rate": 0.25}
    )


def test_the_originals_schedules(original: OriginalConfigs) -> None:
    assert as_learning_rate(original.learning_rate(constant=0.5)) == LearningRate(constant=0.5)


# Other objects


@dataclasses.dataclass
class Rate:
    constant: float | None = None


@dataclasses.dataclass
class Settings:
    adam: dict[str, Any]
    single_task_learning_rate: Any
    multi_task_learning_rates: Any = None
    comment: str | None = None


class DictLike:
    """What has the methods of a mapping that `dict` asks for, and is none."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields

    def keys(self) -> Any:
        return self._fields.keys()

    def __getitem__(self, key: str) -> Any:
        return self._fields[key]


class Mode(enum.Enum):
    L2 = "l2"


SINGLE = RecapOptimizerConfig.model_validate(
    {"adam": {"beta_1": 0.5}, "single_task_learning_rate": {"constant": 0.25}}
)
FORMS: dict[str, Any] = {
    "dict": SINGLE.model_dump(),
    "mapping": MappingProxyType(SINGLE.model_dump()),
    "like a mapping": DictLike(
        adam=DictLike(beta_1=0.5), single_task_learning_rate=DictLike(constant=0.25)
    ),
    "dataclass": Settings(adam={"betas": (0.5, 0.999)}, single_task_learning_rate=Rate(0.25)),
    "our own class inside": OrderedDict(
        adam={"beta_1": 0.5}, single_task_learning_rate=LearningRate(constant=0.25)
    ),
    "a model inside": {
        "adam": {"beta_1": 0.5},
        "single_task_learning_rate": pydantic.create_model("Rate", constant=(float, 0.25))(),
    },
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms(form: Any) -> None:
    assert as_optimizer_config(form) == SINGLE


def test_our_own_are_returned_as_they_are() -> None:
    embeddings = EmbeddingOptimizerConfig()
    assert as_optimizer_config(SINGLE) is SINGLE
    assert as_embedding_config(embeddings) is embeddings
    assert as_embedding_config(None) is None


def test_the_generic_form_is_what_has_no_field_of_the_other() -> None:
    assert as_optimizer_config(GENERIC) == OptimizerConfig.model_validate(GENERIC)
    with pytest.raises(ValueError, match="read as RecapOptimizerConfig as it has multi_task_learn"):
        as_optimizer_config({**GENERIC, "single_task_learning_rate": None})


def test_an_enumeration_is_its_value() -> None:
    config = as_embedding_config(
        {"rowwise_adagrad": {"weight_decay": 0.5, "weight_decay_mode": Mode.L2}}
    )
    assert config.rowwise_adagrad.weight_decay_mode == "l2"


def test_fields_of_a_models_own_class_count() -> None:
    """Not only those of the class that a field is declared with, all that `model_dump` returns."""

    class Algorithm(pydantic.BaseModel):
        pass

    class Adam(Algorithm):
        beta_1: float = 0.5

    class Rates(pydantic.RootModel[dict[str, Rate]]):
        pass

    class Towers(pydantic.BaseModel):
        tower_learning_rates: Rates

        @pydantic.computed_field
        @property
        def number(self) -> int:
            return len(self.tower_learning_rates.root)

    class Config(pydantic.BaseModel):
        adam: Algorithm
        multi_task_learning_rates: Towers
        clip_grad_norm: float = pydantic.Field(1.0, exclude=True)

    towers = Towers(tower_learning_rates=Rates({"a": Rate(0.5)}))
    config = Config(adam=Adam(), multi_task_learning_rates=towers)
    assert as_optimizer_config(config) == RecapOptimizerConfig.model_validate(
        {
            "adam": {"beta_1": 0.5},
            "multi_task_learning_rates": {"tower_learning_rates": {"a": {"constant": 0.5}}},
            "clip_grad_norm": 1.0,
        }
    )


def test_a_models_own_way_to_dump_itself_counts() -> None:
    class Dumped(pydantic.BaseModel):
        rate: float = 0.25

        def model_dump(self, **options: Any) -> dict[str, Any]:
            return {"constant": self.rate}

    class Serialized(pydantic.BaseModel):
        rate: float = 0.25

        @pydantic.model_serializer
        def fields(self) -> dict[str, Any]:
            return {"constant": self.rate}

    for config in (Dumped(), Serialized()):
        assert as_learning_rate(config) == LearningRate(constant=0.25)


def test_numbers_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    for step, rate in ((numpy.int64(3), numpy.float32(0.25)), (numpy.float64(3), numpy.int8(1))):
        fields = {"learning_rate": rate, "num_ramp_steps": step}
        schedule = as_learning_rate({"linear_ramp_to_constant": fields}).linear_ramp_to_constant
        assert (schedule.learning_rate, schedule.num_ramp_steps) == (float(rate), 3)
        assert (type(schedule.learning_rate), type(schedule.num_ramp_steps)) == (float, int)
    with pytest.raises(ValueError, match="valid integer"):
        as_learning_rate(
            {"linear_ramp_to_constant": {"learning_rate": 1, "num_ramp_steps": numpy.float32(2.5)}}
        )


@pytest.mark.parametrize(
    ("config_class", "field", "section"),
    [
        (OptimizerConfig, "adam", AdamWConfig(lr=0.5)),
        (OptimizerConfig, "adamw", AdamConfig(lr=0.5)),
        (RecapOptimizerConfig, "adam", RecapAdamWConfig()),
        (GroupConfig, "adam", AdamWConfig(lr=0.5)),
        (EmbeddingOptimizerConfig, "partial_rowwise_adam", EmbeddingLambConfig()),
        (EmbeddingOptimizerConfig, "partial_rowwise_adam", EmbeddingAdamConfig()),
    ],
)
def test_the_section_of_another_algorithm_is_refused(
    config_class: type[Any], field: str, section: Any
) -> None:
    with pytest.raises(ValueError, match=f"{field}\n.*valid dictionary or instance of"):
        config_class(**{field: section})


def test_an_unknown_field_that_is_none_is_not_there() -> None:
    rates = {"tower_learning_rates": {"a": {"constant": 0.5, "cyclic": None}}, "comment": None}
    config = {"adam": {"fused": None}, "multi_task_learning_rates": rates, "name": None}
    assert as_optimizer_config(config) == RecapOptimizerConfig.model_validate(
        {
            "adam": {},
            "multi_task_learning_rates": {"tower_learning_rates": {"a": {"constant": 0.5}}},
        }
    )
    assert rates["comment"] is None  # what was given is left alone
    with pytest.raises(ValueError, match=r"multi_task_learning_rates.tower_learning_rates.a\n"):
        as_optimizer_config(
            {"adam": {}, "multi_task_learning_rates": {"tower_learning_rates": {"a": None}}}
        )


# What is refused


class Other:
    def __repr__(self) -> str:  # in the names of tests, which all workers must find alike
        return "Other()"


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (None, "NoneType"),
        (3, "int"),
        ([GENERIC], "list"),
        ("adam", "str"),
        (SimpleNamespace(adam={}), "types.SimpleNamespace"),
        (Other(), f"{__name__}.Other"),
        (OptimizerConfig, "the class recap_fast.config.dense.OptimizerConfig"),
    ],
    ids=str,
)
def test_something_else_is_refused_by_its_class(config: Any, found: str) -> None:
    pattern = re.escape(found) + "$"
    with pytest.raises(TypeError, match=f"optimizer_config must be a RecapOptimizer.*{pattern}"):
        as_optimizer_config(config)
    if config is not None:
        with pytest.raises(TypeError, match=f"emb_optimizer_config must be a .*{pattern}"):
            as_embedding_config(config)


@dataclasses.dataclass
class Whole:
    optimizer: Any


class WholeModel(pydantic.BaseModel):
    optimizer: dict[str, Any]


@pytest.mark.parametrize(
    ("config", "section"),
    [
        ({"optimizer": {"adam": {"lr": 1.0}}, "model": {}}, "config['optimizer']"),
        (MappingProxyType({"optimizer": RECAP}), "config['optimizer']"),
        (Whole(RECAP), "config.optimizer"),
        (
            WholeModel(optimizer=RECAP),
            "config.optimizer",
        ),
    ],
    ids=["dict", "mapping", "dataclass", "pydantic"],
)
def test_a_whole_configuration_is_not_its_section(config: Any, section: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"'optimizer': pass the section, {section}")):
        as_optimizer_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adam": {"lr": 1, "betta": 2}}, "adam.betta\n  Extra inputs"),
        ({"adam": {}}, "adam.lr\n  Field required"),
        ({}, "set exactly one of adam, adamw, adagrad, sgd, rmsprop, lion; found none"),
        (Settings(adam={"lr": 1.0}, single_task_learning_rate=Rate(0.5)), "adam.lr\n  Extra"),
        (Settings(adam={}, single_task_learning_rate=Rate()), "set exactly one of constant"),
        (Settings(adam={}, single_task_learning_rate=Rate(1), comment="x"), "comment\n  Extra"),
    ],
)
def test_wrong_fields_are_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        as_optimizer_config(config)
    kind = type(config).__qualname__ if isinstance(config, dict) else f"{__name__}.Settings"
    assert str(error.value).startswith(f"optimizer_config ({kind}), read as ")
