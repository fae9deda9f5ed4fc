"""Configuration files of whoever: small in time, memory and errors, which name file and line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from recap_fast.config import load_optimizer_config, yaml_text

RATE = "learning_rate: {constant: 1.0}"


def with_rate(text: str) -> str:
    """A configuration with a text in place of the rate of Adam, in line 3."""
    return f"optimizer:\n  adam:\n    lr: {text}\n  {RATE}\n"


def bomb(levels: int, width: int) -> str:
    """Aliases of aliases, at the place of a number."""
    lines = ["a0: &a0 [x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join([*lines, f"optimizer: {{adam: {{lr: *a{levels - 1}}}, {RATE}}}"])


def towers(count: int, rate: str) -> str:
    rates = ", ".join(f"t{number}: {rate}" for number in range(count))
    inner = f"multi_task_learning_rates: {{tower_learning_rates: {{{rates}}}}}"
    return f"optimizer:\n  adam: {{}}\n  {inner}\n"


# A text, in which line it is wrong, and what is said of it.
HOSTILE: dict[str, tuple[str, int, str]] = {
    "aliases, wide": (bomb(9, 9), 1, "aliases stand for more than 100000 nodes"),
    "aliases, deep": (bomb(40, 2), 1, "aliases stand for more than 100000 nodes"),
    "merged aliases": (
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9))
        + "optimizer: {<<: *a8}\n",
        1,
        "aliases stand for more than 100000 nodes",
    ),
    "itself": ("optimizer: &a {sgd: *a}\n", 1, "aliases stand for more than 100000 nodes"),
    "an unknown alias": ("\noptimizer: *x\n", 2, "found undefined alias 'x'"),
    "a date": (with_rate("2020-13-45"), 3, "'2020-13-45' is no timestamp: month must be in"),
    "a time": (with_rate("2020-01-01 25:00:00"), 3, "is no timestamp: hour must be in 0..23"),
    "a good date": (with_rate("2020-01-01"), 3, "Input should be a valid number"),
    "a huge number": (with_rate("9" * 5_000), 3, "a number of more than 300 digits"),
    "a huge float": (with_rate("9" * 5_000 + ".0"), 3, "a number of more than 300 digits"),
    "a huge binary": (with_rate("0b" + "1" * 20_000), 3, "a number of more than 300 digits"),
    "a huge time": (with_rate("1:" * 10_000 + "1"), 3, "a number of more than 300 digits"),
    "a large number": (with_rate("0x" + "f" * 290), 3, "Input should be a valid number"),
    "infinity": (with_rate("1.0e+999"), 3, "Input should be a finite number"),
    "no bool": (with_rate("!!bool x"), 3, "'x' is no bool"),
    "no int": (with_rate("!!int ''"), 3, "'' is no int"),
    "no float": (with_rate("!!float x"), 3, "'x' is no float"),
    "no timestamp": (with_rate("!!timestamp x"), 3, "'x' is no timestamp"),
    "no bytes": (with_rate("!!binary x"), 3, "failed to decode base64 data"),
    "code": (with_rate("!!python/object/apply:os.system [id]"), 3, "could not determine a cons"),
    "a long tag": (with_rate(f"!<{'t' * 50_000}> x"), 3, "could not determine a constructor"),
    "deep lists": ("\n\noptimizer: " + "[" * 100_000, 3, "nested in more than 50 others"),
    "deep mappings": ("".join(f"{' ' * n}a:\n" for n in range(900)), 50, "nested in more than 50"),
    "an odd character": ("a: 1\n\noptimizer: \x00\n", 3, "unacceptable character 0x0000"),
    "a key twice": (
        f"optimizer: {{sgd: {{}}, {RATE},\n  {RATE}}}",
        2,
        "the key 'learning_rate' is",
    ),
    "a long key twice": (f"? {'k' * 9_000}\n: 1\n? {'k' * 9_000}\n: 2\n", 3, "is given twice"),
    "a list as a key": ("optimizer: {[1]: 1}\n", 1, "found unhashable key"),
    "other keys": ("optimizer: {1: 2, yes: 3, ~: 4, 2020-01-01: 5}", 1, "Keys should be strings"),
    "two documents": ("a: 1\n---\nb: 1\n", 2, "but found another document"),
    "many fields": (
        "optimizer:\n" + "".join(f"  x{number}: 1\n" for number in range(1_000)),
        2,
        "and 990 more errors",
    ),
    "many towers": (towers(400, "{constant: x}"), 3, "and 390 more errors"),
    "long texts": (with_rate("x" * 90_000), 3, "expected a number, found the text"),
    "long lists": (
        f"optimizer:\n  adam: {{betas: [{'1, ' * 9_000}]}}\n  {RATE}\n",
        2,
        "input_type=list",
    ),
    "a wrong table": (
        towers(2, "{constant: 1.0}") + "  other: 1\n",
        4,
        "Extra inputs are not permitted",
    ),
    "many sections": ("\n" + "".join(f"s{n}: 1\n" for n in range(500)), 2, "and 480 more"),
    "no section": ("# of models\n\nmodel: 1\n", 3, "no section 'optimizer'; sections present: 'mo"),
    "a list": ("# of models\n- optimizer\n", 2, "must be a mapping with a section 'optimizer'"),
    "no mapping": ("model: 1\noptimizer:\n- 1\n", 2, "must be a mapping, found list"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_wrong_is_said_in_short(path: Path, name: str) -> None:
    text, line, said = HOSTILE[name]
    path.write_text(text, encoding="utf-8")
    begin = time.process_time()
    with pytest.raises(ValueError) as raised:
        load_optimizer_config(path)
    # Seconds; aliases without a bound take minutes.
    assert time.process_time() - begin < 20
    message = str(raised.value)
    assert str(path) in message and said in message
    assert f"line {line}:" in message or f"line {line}," in message, message
    lines = message.replace(str(path), "").splitlines()
    assert len(message) < 6_000 and max(map(len, lines)) < 600


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a: 1\nb: \xe4\n", "line 2: it is not UTF-8: invalid continuation byte at byte 8"),
        ("optimizer: {}".encode("utf-16"), "line 1: it is not UTF-8: invalid start byte at byte 0"),
    ],
)
def test_what_is_no_text(path: Path, data: bytes, said: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ValueError) as raised:
        load_optimizer_config(path)
    assert str(raised.value) == f"{path}, {said}"


def test_many_values(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 take some seconds."""
    monkeypatch.setattr(yaml_text, "_MOST_NODES", 1_000)
    path.write_text("\noptimizer: [" + "1, " * 2_000 + "]")
    with pytest.raises(ValueError, match="there are more than 1000 nodes before it") as raised:
        load_optimizer_config(path)
    assert f'in "{path}", line 2' in str(raised.value)


def test_what_has_no_end() -> None:
    with pytest.raises(ValueError, match="/dev/zero is no configuration: it has more than 4194304"):
        load_optimizer_config("/dev/zero")


def test_where_the_stack_is_nearly_full(path: Path) -> None:
    path.write_text("optimizer: " + "[" * 45 + "]" * 45)

    def deeper(levels: int) -> None:
        if levels:
            deeper(levels - 1)
        else:
            load_optimizer_config(path)

    for levels in range(0, 1000, 25):
        try:
            deeper(levels)
        except ValueError as error:
            assert str(path) in str(error)
        except RecursionError:
            return  # of `deeper`, or before the file is read
    raise AssertionError("the stack has no end")


def test_what_is_allowed(path: Path) -> None:
    """Aliases, merges, a byte order mark, and values that are long but numbers."""
    text = (
        "\ufeffbase: &base {beta_1: 0.5}\n"
        "rates: &rates {constant: 0.25}\n"
        + towers(300, "*rates").replace("adam: {}", "adam: {<<: *base, beta_2: 0.75}")
        + f"# {'long ' * 20_000}\n"
    )
    path.write_text(text, encoding="utf-8")
    config = load_optimizer_config(path)
    assert (config.adam.beta_1, config.adam.beta_2) == (0.5, 0.75)
    rates = config.multi_task_learning_rates.tower_learning_rates
    assert len(rates) == 300 and {rate.constant for rate in rates.values()} == {0.25}


def test_random_changes_are_refused_by_name(path: Path) -> None:
    """Or they make another configuration; nothing else."""
    import random

    draw, base = random.Random(0), with_rate("1.0e-3") + "# a comment\nother: [1, {a: b}]\n"
    pieces = "&a *a !!int !!bool <<: - ? : {{ }} [ ] ' \" \n \t # % @ ` | > ~ 1 .nan 0x 2020-99-99"
    refused = 0
    for _ in range(300):
        text = base
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(text))
            text = text[:place] + draw.choice(pieces.split(" ")) + text[place + draw.randrange(3) :]
        path.write_text(text)
        try:
            load_optimizer_config(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "line " in str(error)
            assert not isinstance(error.__cause__, AttributeError)
    assert refused > 150


def test_errors_of_yaml_say_the_name_of_the_file(path: Path) -> None:
    path.write_text("optimizer: {\n")
    with pytest.raises(ValueError) as raised:
        load_optimizer_config(path)
    assert f'in "{path}", line 2, column 1' in str(raised.value)
    assert isinstance(raised.value.__cause__, yaml.YAMLError)
