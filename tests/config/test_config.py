"""The configuration: what loads, what is refused, and that the refusal says why."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from recap_fast.config import (
    AdagradConfig,
    AdamConfig,
    AdamWConfig,
    BaseConfig,
    EmbeddingOptimizerConfig,
    EmbeddingSgdConfig,
    LearningRate,
    LinearRampToConstant,
    LinearRampToCosine,
    MultiTaskLearningRates,
    OptimizerConfig,
    PiecewiseConstant,
    RecapAdagradConfig,
    RecapAdamConfig,
    RecapAdamWConfig,
    RecapOptimizerConfig,
    RecapSgdConfig,
    SgdConfig,
    load_optimizer_config,
)

CONSTANT = LearningRate(constant=0.5)
COSINE = LinearRampToCosine(
    learning_rate=0.5, final_learning_rate=0.1, num_ramp_steps=10, final_num_steps=30
)

# The structure of a file shipped with the recap recommender: nulls for what is not chosen.
SHIPPED_FORM = """
training:
  num_train_steps: 10
  save_dir: ${HOME}/runs
model:
  tasks: null
optimizer:
  adam:
    beta_1: 0.91
    beta_2: 0.998
    epsilon: 2.0e-07
  multi_task_learning_rates:
    backbone_learning_rate:
      constant: null
      linear_ramp_to_constant:
        learning_rate: 0.004
        num_ramp_steps: 20
      linear_ramp_to_cosine: null
      piecewise_constant: null
    tower_learning_rates:
      zoo.was_liked:
        constant: null
        linear_ramp_to_constant:
          learning_rate: 0.003
          num_ramp_steps: 50
        linear_ramp_to_cosine: null
        piecewise_constant: null
      zoo.was_loved:
        constant: 0.25
        linear_ramp_to_constant: null
        linear_ramp_to_cosine: null
        piecewise_constant: null
      bar.was_hidden:
        constant: null
        linear_ramp_to_constant: null
        linear_ramp_to_cosine:
          final_learning_rate: 0.1
          final_num_steps: 30
          learning_rate: 0.5
          num_ramp_steps: 10
        piecewise_constant: null
  single_task_learning_rate: null
"""
SHIPPED = RecapOptimizerConfig(
    adam=RecapAdamConfig(beta_1=0.91, beta_2=0.998, epsilon=2e-7),
    multi_task_learning_rates=MultiTaskLearningRates(
        backbone_learning_rate=LearningRate(
            linear_ramp_to_constant=LinearRampToConstant(learning_rate=0.004, num_ramp_steps=20)
        ),
        tower_learning_rates={
            "zoo.was_liked": LearningRate(
                linear_ramp_to_constant=LinearRampToConstant(learning_rate=0.003, num_ramp_steps=50)
            ),
            "zoo.was_loved": LearningRate(constant=0.25),
            "bar.was_hidden": LearningRate(linear_ramp_to_cosine=COSINE),
        },
    ),
)


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


# Defaults

FORMATS = {
    "state_dtype": None,
    "master_weights": False,
    "stochastic_rounding": False,
    "rounding_seed": 0,
}
OFF = {"weight_decay": 0.0, "maximize": False, **FORMATS}
ADAM = {"amsgrad": False, **OFF}
ADAMW = {"weight_decay": 0.01}
SGD = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, **OFF}
ADAGRAD = {"initial_accumulator_value": 0.0, "lr_decay": 0.0, **OFF}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AdamConfig(lr=1), {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-7, **ADAM}),
        (AdamWConfig(lr=1), {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-7, **ADAM, **ADAMW}),
        (SgdConfig(lr=1), {"lr": 1.0, **SGD}),
        (AdagradConfig(lr=1), {"lr": 1.0, "eps": 0.0, **ADAGRAD}),
        (RecapAdamConfig(), {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, **ADAM}),
        (RecapAdamWConfig(), {"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, **ADAM, **ADAMW}),
        (RecapAdagradConfig(), {"epsilon": 1e-10, **ADAGRAD}),
        (RecapSgdConfig(), SGD),
    ],
    ids=lambda value: type(value).__name__,
)
def test_defaults(config: BaseConfig, expected: dict) -> None:
    assert config.model_dump() == expected


EMBEDDING_ALGORITHMS = (
    "sgd",
    "adagrad",
    "rowwise_adagrad",
    "ema_rowwise_adagrad",
    "ensemble_rowwise_adagrad",
    "adam",
    "partial_rowwise_adam",
    "lamb",
    "partial_rowwise_lamb",
    "lars_sgd",
)
# What FBGEMM has no number for: None is its default.
NO_DEFAULT = {"max_norm": 0.0, "weight_decay_mode": 0, "rowwise_bias_correction": False}
SECTIONS = {
    "counter": "counter_based_regularization",
    "cowclip": "cowclip_regularization",
    "decouple_global": "global_weight_decay",
}


@pytest.mark.parametrize("name", EMBEDDING_ALGORITHMS)
def test_embedding_defaults_are_those_of_fbgemm(name: str) -> None:
    pytest.importorskip("fbgemm_gpu")
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        SplitTableBatchedEmbeddingBagsCodegen,
    )
    from fbgemm_gpu.tbe.config.optimizer_config import (
        EmainplaceModeDefinition,
        EnsembleModeDefinition,
    )

    accepted = inspect.signature(SplitTableBatchedEmbeddingBagsCodegen.__init__).parameters
    defaults = {field: parameter.default for field, parameter in accepted.items()}
    if name == "ema_rowwise_adagrad":
        defaults |= vars(EmainplaceModeDefinition())
    if name == "ensemble_rowwise_adagrad":
        defaults |= vars(EnsembleModeDefinition())
        defaults["step_mode"] = defaults["step_mode"].name.lower()
    defaults["rowwise_bias_correction"] = False
    _, section = EmbeddingOptimizerConfig.model_validate({name: {}}).algorithm
    for field, default in section.model_dump().items():
        if default is None and field in SECTIONS:
            assert defaults[SECTIONS[field]] is None
            continue
        if default is None:
            default = NO_DEFAULT[field]
        assert defaults[field.replace("beta_", "beta")] == default


# Alternatives


RATES = ("constant", "piecewise_constant", "linear_ramp_to_constant", "linear_ramp_to_cosine")


@pytest.mark.parametrize(
    ("config_class", "fields", "group", "found"),
    [
        (LearningRate, {}, RATES, "found none"),
        (LearningRate, {"constant": None}, RATES, "found none"),
        (
            LearningRate,
            {"constant": 0.0, "linear_ramp_to_cosine": COSINE},
            RATES,
            "found constant and linear_ramp_to_cosine",
        ),
        (OptimizerConfig, {"learning_rate": CONSTANT}, ("adam", "sgd", "adagrad"), "found none"),
        (
            OptimizerConfig,
            {"adam": {"lr": 1.0}, "sgd": {"lr": 1.0}},
            ("adam", "sgd", "adagrad"),
            "found adam and sgd",
        ),
        (
            RecapOptimizerConfig,
            {"adam": {}},
            ("multi_task_learning_rates", "single_task_learning_rate"),
            "found none",
        ),
        (
            RecapOptimizerConfig,
            {
                "adam": {},
                "single_task_learning_rate": CONSTANT,
                "multi_task_learning_rates": {"tower_learning_rates": {"liked": CONSTANT}},
            },
            ("multi_task_learning_rates", "single_task_learning_rate"),
            "found multi_task_learning_rates and single_task_learning_rate",
        ),
        (
            RecapOptimizerConfig,
            {"single_task_learning_rate": CONSTANT},
            ("adam", "adamw", "adagrad", "sgd"),
            "found none",
        ),
        (
            RecapOptimizerConfig,
            {"single_task_learning_rate": CONSTANT, "adagrad": {}, "sgd": {}},
            ("adam", "adagrad", "sgd"),
            "found adagrad and sgd",
        ),
        (
            EmbeddingOptimizerConfig,
            {"sgd": {}, "lamb": {}},
            ("sgd", "rowwise_adagrad", "partial_rowwise_lamb", "lars_sgd"),
            "found sgd and lamb",
        ),
    ],
)
def test_alternatives_are_enforced_by_name(
    config_class: type[BaseConfig], fields: dict, group: tuple[str, ...], found: str
) -> None:
    with pytest.raises(ValidationError) as error:
        config_class(**fields)
    message = str(error.value)
    assert found in message
    for name in group:
        assert name in message


TABLES = EmbeddingOptimizerConfig.model_validate(
    {
        "learning_rate": {"constant": 0.5},
        "init_learning_rate": 0.25,
        "gradient_clipping": 2.0,
        "adagrad": {"eps": 0.125},
        "tables": {
            "rate": {"learning_rate": {"constant": 0.1}},
            "algorithm": {"rowwise_adagrad": {}},
            "same": {"adagrad": {}},
            "rounding": {"stochastic_rounding": False, "gradient_clipping": 1.0},
        },
    }
)


@pytest.mark.parametrize(
    ("table", "changes"),
    [
        ("another", {}),
        ("rate", {"learning_rate": {"constant": 0.1}}),
        ("algorithm", {"adagrad": None, "rowwise_adagrad": {}}),
        ("same", {"adagrad": {}}),
        ("rounding", {"stochastic_rounding": False, "gradient_clipping": 1.0}),
    ],
)
def test_what_holds_for_a_table(table: str, changes: dict) -> None:
    common = TABLES.model_dump(exclude_none=True, exclude={"tables"})
    expected = EmbeddingOptimizerConfig.model_validate({**common, **changes})
    assert TABLES.for_table(table) == expected
    assert TABLES.for_table(table).algorithm == expected.algorithm


def test_schedules_of_tables() -> None:
    assert TABLES.table_learning_rates == {"rate": LearningRate(constant=0.1)}
    assert EmbeddingOptimizerConfig().table_learning_rates == {}
    assert EmbeddingOptimizerConfig().algorithm_is_default
    assert not TABLES.algorithm_is_default


def test_the_chosen_algorithm() -> None:
    generic = OptimizerConfig(sgd=SgdConfig(lr=0.1))
    recap = RecapOptimizerConfig(single_task_learning_rate=CONSTANT, adagrad=RecapAdagradConfig())
    embedding = EmbeddingOptimizerConfig.model_validate({"adam": {"beta_1": 0.5}})
    assert generic.algorithm == ("sgd", generic.sgd)
    assert recap.algorithm == ("adagrad", recap.adagrad)
    assert embedding.algorithm == ("adam", embedding.adam)
    assert EmbeddingOptimizerConfig().algorithm == ("sgd", EmbeddingSgdConfig())


@pytest.mark.parametrize(
    ("config_class", "fields", "unset"),
    [
        (LearningRate, {"constant": 0.1, "piecewise_constant": None}, {"constant": 0.1}),
        (SgdConfig, {"lr": 0.1, "momentum": None}, {"lr": 0.1}),
        (RecapSgdConfig, {"momentum": None, "nesterov": None}, {}),
        (EmbeddingOptimizerConfig, {"learning_rate": None, "sgd": None, "lamb": None}, {}),
        (EmbeddingOptimizerConfig, {"tables": None, "gradient_clipping": None}, {}),
    ],
)
def test_null_counts_as_not_set(config_class: type[BaseConfig], fields: dict, unset: dict) -> None:
    config = config_class(**fields)
    assert config == config_class(**unset)
    assert config.model_fields_set == unset.keys()


# Nonsense


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        # unknown and missing fields
        (LearningRate, {"constant": 0.1, "cosntant": None}, "cosntant\n  Extra inputs"),
        (LinearRampToConstant, {"learning_rate": 0.1}, "num_ramp_steps\n  Field required"),
        (SgdConfig, {"lr": None}, "lr\n  Field required"),
        # rates
        (LearningRate, {"constant": -0.1}, "constant\n  Input should be greater than or equal to"),
        (LearningRate, {"constant": math.nan}, "constant\n  Input should be a finite number"),
        (LearningRate, {"constant": math.inf}, "constant\n  Input should be a finite number"),
        (LearningRate, {"constant": True}, "constant\n  Input should be a valid number"),
        (LearningRate, {"constant": "fast"}, "expected a number, found the text 'fast'"),
        (LearningRate, {"constant": "nan"}, "constant\n  Input should be a finite number"),
        (LearningRate, {"constant": 10**400}, "constant\n  Input should be a valid number"),
        (EmbeddingOptimizerConfig, {"init_learning_rate": -1.0}, "init_learning_rate"),
        # schedules
        (
            PiecewiseConstant,
            {"learning_rate_boundaries": [5, 5], "learning_rate_values": [1, 2, 3]},
            "learning_rate_boundaries must be strictly increasing; found 5 after 5",
        ),
        (
            PiecewiseConstant,
            {"learning_rate_boundaries": [-1], "learning_rate_values": [1, 2]},
            "learning_rate_boundaries.0\n  Input should be greater than or equal to 0",
        ),
        (
            PiecewiseConstant,
            {"learning_rate_boundaries": [5.5], "learning_rate_values": [1, 2]},
            "learning_rate_boundaries.0\n  Input should be a valid integer",
        ),
        (
            PiecewiseConstant,
            {"learning_rate_boundaries": [5, 9], "learning_rate_values": [1, 2]},
            "found 2 values for 2 boundaries",
        ),
        (
            PiecewiseConstant,
            {"learning_rate_boundaries": [], "learning_rate_values": []},
            "found 0 values for 0 boundaries",
        ),
        (
            PiecewiseConstant,
            {"learning_rate_boundaries": [5], "learning_rate_values": [1, -2]},
            "learning_rate_values.1\n  Input should be greater than or equal to 0",
        ),
        (LinearRampToConstant, {"learning_rate": 1, "num_ramp_steps": 0}, "num_ramp_steps"),
        (LinearRampToConstant, {"learning_rate": 1, "num_ramp_steps": True}, "num_ramp_steps"),
        (LinearRampToConstant, {"learning_rate": 1, "num_ramp_steps": "9.5"}, "num_ramp_steps"),
        (
            LinearRampToCosine,
            {**COSINE.model_dump(), "final_num_steps": 10},
            r"final_num_steps (10) must be greater than num_ramp_steps (10)",
        ),
        (
            LinearRampToCosine,
            {**COSINE.model_dump(), "final_learning_rate": -1e-9},
            "final_learning_rate",
        ),
        # hyperparameters
        (AdamConfig, {"lr": 1, "betas": [0.9, 1.0]}, "betas.1\n  Input should be less than 1"),
        (AdamConfig, {"lr": 1, "betas": [-0.1, 0.9]}, "betas.0"),
        (AdamConfig, {"lr": 1, "betas": [0.9]}, "betas.1\n  Field required"),
        (AdamConfig, {"lr": 1, "eps": -1e-9}, "eps"),
        (SgdConfig, {"lr": 1, "momentum": -0.9}, "momentum"),
        (RecapAdamConfig, {"beta_1": 1}, "beta_1"),
        (RecapAdamConfig, {"beta_2": math.nan}, "beta_2"),
        (RecapAdamConfig, {"epsilon": "1e-7x"}, "found the text '1e-7x'"),
        (RecapAdagradConfig, {"initial_accumulator_value": -1}, "initial_accumulator_value"),
        (RecapSgdConfig, {"nesterov": True}, "nesterov needs a momentum greater than 0"),
        (RecapSgdConfig, {"nesterov": "yes", "momentum": 0.9}, "nesterov"),
        # task towers
        (MultiTaskLearningRates, {"tower_learning_rates": {"": CONSTANT}}, "at least 1 character"),
        (MultiTaskLearningRates, {"tower_learning_rates": {"a.b": None}}, "a.b"),
        # embeddings
        (EmbeddingOptimizerConfig, {"sgd": {"momentum": 0.9}}, "sgd.momentum\n  Extra inputs"),
        (EmbeddingOptimizerConfig, {"adam": {"weight_decay": -0.1}}, "adam.weight_decay"),
        (EmbeddingOptimizerConfig, {"lars_sgd": {"eta": -0.1}}, "lars_sgd.eta"),
        (
            EmbeddingOptimizerConfig,
            {"rowwise_adagrad": {"weight_decay": 0.1}},
            "weight_decay needs a weight_decay_mode: l2, decouple, counter, cowclip or",
        ),
        (
            EmbeddingOptimizerConfig,
            {"ema_rowwise_adagrad": {"weight_decay": 0.1, "weight_decay_mode": "counter"}},
            "weight_decay_mode\n  Input should be 'l2' or 'decouple'",
        ),
        (EmbeddingOptimizerConfig, {"rowwise_adagrad": {"max_norm": 0.0}}, "max_norm"),
        (EmbeddingOptimizerConfig, {"adagrad": {"max_norm": 1.0}}, "max_norm\n  Extra inputs"),
        (EmbeddingOptimizerConfig, {"lars_sgd": {"eps": 1.0}}, "lars_sgd.eps\n  Extra inputs"),
        (EmbeddingOptimizerConfig, {"ema_rowwise_adagrad": {"step_ema": 0}}, "step_ema"),
        (
            EmbeddingOptimizerConfig,
            {"ema_rowwise_adagrad": {"step_ema_coef": 1.5}},
            "step_ema_coef",
        ),
        (EmbeddingOptimizerConfig, {"ensemble_rowwise_adagrad": {"step_swap": 0}}, "step_swap"),
        (EmbeddingOptimizerConfig, {"adam": {"rowwise_bias_correction": 1}}, "rowwise_bias_corr"),
        (EmbeddingOptimizerConfig, {"gradient_clipping": 0.0}, "gradient_clipping"),
        (EmbeddingOptimizerConfig, {"stochastic_rounding": "yes"}, "stochastic_rounding"),
        # tables
        (EmbeddingOptimizerConfig, {"tables": {"": {}}}, "at least 1 character"),
        (EmbeddingOptimizerConfig, {"tables": {"t": None}}, "tables.t"),
        (
            EmbeddingOptimizerConfig,
            {"tables": {"t": {"init_learning_rate": 0.5}}},
            "tables.t.init_learning_rate\n  Extra inputs",
        ),
        (
            EmbeddingOptimizerConfig,
            {"tables": {"t": {"sgd": {}, "adagrad": {}}}},
            "set at most one of sgd, adagrad",
        ),
    ],
)
def test_nonsense_is_refused_by_name(
    config_class: type[BaseConfig], fields: dict, message: str
) -> None:
    with pytest.raises(ValidationError) as error:
        config_class(**fields)
    assert message in str(error.value)


@pytest.mark.parametrize("number", [1, "1", "1e0", 1.0])
def test_whole_numbers_and_texts_are_rates(number: object) -> None:
    rate = LearningRate(constant=number).constant
    assert (rate, type(rate)) == (1.0, float)


@pytest.mark.parametrize("number", [5000, 5e3, "5000", "5e3"])
def test_steps_may_be_written_like_any_number(number: object) -> None:
    steps = LinearRampToConstant(learning_rate=1, num_ramp_steps=number).num_ramp_steps
    assert (steps, type(steps)) == (5000, int)


def test_scientific_notation_of_yaml_is_a_number(write) -> None:
    """YAML 1.1 reads 1e-3 as a text; the original's configuration takes it."""
    config = load_optimizer_config(write("optimizer: {sgd: {lr: 1e-3}}\n"))
    assert config == OptimizerConfig(sgd=SgdConfig(lr=0.001))


def test_configs_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        CONSTANT.constant = 0.1


# Round trips


@pytest.mark.parametrize(
    "config",
    [
        SHIPPED,
        OptimizerConfig(learning_rate=CONSTANT, adam=AdamConfig(lr=1e-5, betas=(0.5, 0.75))),
        EmbeddingOptimizerConfig.model_validate(
            {"rowwise_adagrad": {"weight_decay": 0.1, "weight_decay_mode": "l2"}}
        ),
        TABLES,
        PiecewiseConstant(learning_rate_boundaries=[3, 9], learning_rate_values=[1e-30, 0, 2]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_round_trips(config: BaseConfig) -> None:
    assert type(config).model_validate(config.model_dump()) == config
    assert type(config).model_validate(config.model_dump(exclude_none=True)) == config
    assert type(config).model_validate_json(config.model_dump_json()) == config
    assert type(config).model_validate(yaml.safe_load(config.pretty_print())) == config


def test_pretty_print_keeps_the_order_of_the_towers() -> None:
    loaded = yaml.safe_load(SHIPPED.pretty_print())
    towers = loaded["multi_task_learning_rates"]["tower_learning_rates"]
    assert list(towers) == ["zoo.was_liked", "zoo.was_loved", "bar.was_hidden"]


# Files


def test_the_shipped_form_loads(write) -> None:
    config = load_optimizer_config(write(SHIPPED_FORM))
    assert config == SHIPPED
    assert list(config.multi_task_learning_rates.tower_learning_rates) == [
        "zoo.was_liked",
        "zoo.was_loved",
        "bar.was_hidden",
    ]


def test_the_generic_form_loads_from_another_section(write) -> None:
    path = write("other: 1\ndense: {learning_rate: {constant: 0.5}, sgd: {lr: 1.0e-3}}\n")
    expected = OptimizerConfig(learning_rate=CONSTANT, sgd=SgdConfig(lr=0.001))
    assert load_optimizer_config(str(path), section="dense") == expected


def test_the_environment_is_substituted(write, monkeypatch) -> None:
    monkeypatch.setenv("RECAP_RATE", "0.125")
    monkeypatch.setenv("LOGNAME", "somebody")  # what getpass reads first
    monkeypatch.delenv("RECAP_UNSET", raising=False)
    path = write(
        "home: ${RECAP_UNSET}/x\n"
        "optimizer:\n"
        "  adam: {}\n"
        "  multi_task_learning_rates:\n"
        "    tower_learning_rates: {liked_by_${USER}: {constant: ${RECAP_RATE}}}\n"
    )
    towers = load_optimizer_config(path).multi_task_learning_rates.tower_learning_rates
    assert towers == {"liked_by_somebody": LearningRate(constant=0.125)}


ALIASES = "a0: &a0 [x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: 1\ntraining: 2\n", ["no section 'optimizer'", "'model', 'training'"]),
        ("{}", ["no section 'optimizer'", "none"]),
        ("", ["must be a mapping"]),
        ("- optimizer", ["must be a mapping"]),
        ("optimizer:\n", ["section 'optimizer'", "found NoneType"]),
        ("optimizer: [1]\n", ["section 'optimizer'", "found list"]),
        ("optimizer: {\n", ["not valid YAML"]),
        ("optimizer: {sgd: {lr: 1.0, lr: 2.0}}\n", ["the key 'lr' is given twice", "line 1"]),
        (ALIASES, ["aliases stand for more than 100000 nodes"]),
        ("optimizer: &a {sgd: *a}\n", ["aliases stand for more than 100000 nodes"]),
        (
            "optimizer: {sgd: {lr: 1e-3e}}\n",
            ["section 'optimizer'", "OptimizerConfig", "sgd.lr", "found the text '1e-3e'"],
        ),
        (
            "optimizer: {adam: {beta_1: 0.5}}\n",
            ["OptimizerConfig", "neither multi_task_learning_rates nor single_task_learning_rate"],
        ),
        (
            "optimizer: {adam: {lr: 0.5}, single_task_learning_rate: {constant: 1}}\n",
            ["RecapOptimizerConfig", "adam.lr"],
        ),
        (
            "optimizer: {adam: {}, single_task_learning_rate: null}\n",
            ["set exactly one of multi_task_learning_rates, single_task_learning_rate"],
        ),
    ],
)
def test_a_bad_file_is_refused_by_name(write, text: str, parts: list[str]) -> None:
    path = write(text)
    with pytest.raises(ValueError) as error:
        load_optimizer_config(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        load_optimizer_config(tmp_path / "absent.yaml")


def test_the_module_needs_no_torch() -> None:
    code = (
        "import sys, recap_fast.config\n"
        "print({'torch', 'torchrec', 'fbgemm_gpu'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
