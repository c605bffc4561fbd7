import pytest
import yaml

from fastft.cli.config import TrainConfig, make_config
from fastft.cli.errors import UserError

REQUIRED = {"model": "m", "data": "d", "out": "o"}


def test_round_trip(tmp_path):
    config = TrainConfig(**REQUIRED, lr=3e-5, max_steps=7, target_modules="q_proj, v_proj", packing=True)
    (tmp_path / "config.yaml").write_text(config.yaml())
    assert make_config({}, str(tmp_path / "config.yaml")) == config


def test_options_win_over_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**REQUIRED, "r": 4, "lr": 0.5}))
    config = make_config({"r": 16, "lr": None}, str(tmp_path / "run.yaml"))
    assert (config.r, config.lr) == (16, 0.5)


def test_numbers_as_yaml_reads_them(tmp_path):
    # YAML 1.1 reads 1e-4 as a string and 3 as an int
    (tmp_path / "run.yaml").write_text("model: m\ndata: d\nout: o\nlr: 1e-4\nepochs: 3\ntarget_modules: [q_proj, v_proj]\n")
    config = make_config({}, str(tmp_path / "run.yaml"))
    assert config.lr == 1e-4 and config.epochs == 3.0 and isinstance(config.epochs, float)
    assert config.targets() == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "value, expected",
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("self_attn.q_proj,up_proj", ["self_attn.q_proj", "up_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_targets(value, expected):
    assert TrainConfig(**REQUIRED, target_modules=value).targets() == expected


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("lerning_rate", 1, "unknown option 'lerning_rate'"),
        ("batchsize", 1, "did you mean batch_size?"),
        ("schedule", "cosin", "did you mean cosine?"),
        ("r", 0, "r must be positive, not 0"),
        ("r", 1.5, "r must be int, not 1.5"),
        ("r", True, "r must be int, not True"),
        ("packing", "yes please", "packing must be bool"),
        ("lr", "fast", "lr must be float, not 'fast'"),
        ("lr", ".nan", "lr must be float"),
        ("dropout", 1, "dropout must be in"),
        ("eval_fraction", 1.0, "eval_fraction must be in"),
        ("max_length", 1, "max_length must be at least 2"),
        ("weight_decay", -1, "weight_decay must not be negative"),
        ("epochs", float("inf"), "epochs must be a finite number, not inf"),
        ("epochs", float("nan"), "epochs must be a finite number, not nan"),
        ("lr", "inf", "lr must be a finite number, not inf"),
        ("warmup", float("inf"), "warmup must be a finite number, not inf"),
        ("max_grad_norm", float("inf"), "max_grad_norm must be a finite number, not inf"),
        ("weight_decay", 10**400, "weight_decay must be float"),
        ("warmup", 2.7, "warmup must be a whole number of steps or less than 1, a fraction of them; not 2.7"),
        ("seed", -1, "seed must be in [0, 2**32), not -1"),
        ("seed", 2**32, "seed must be in [0, 2**32), not 4294967296"),
    ],
)
def test_refused(tmp_path, key, value, message):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**REQUIRED, key: value}))
    with pytest.raises(UserError) as error:
        make_config({}, str(tmp_path / "run.yaml"))
    assert message in str(error.value) and "run.yaml" in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "s2ft", "largest": True}, "largest=True has no effect: select=random has no scores"),
        ({"method": "s2ft", "calibration_rows": 9}, "calibration_rows=9 has no effect: select=random measures nothing"),
        ({"method": "s2ft", "select": "weight", "calibration_rows": 9}, "has no effect: select=weight measures nothing"),
        ({"eval_fraction": 0, "eval_steps": 9}, "eval_steps=9 has no effect: eval_fraction=0 holds nothing out"),
        ({"eval_fraction": 0.2, "eval_data": "e"}, "eval_fraction=0.2 has no effect: eval_data e is held out; leave one of"),
    ],
)
def test_options_that_others_leave_nothing_to_do(options, message):
    with pytest.raises(UserError) as error:
        TrainConfig(**REQUIRED, **options)
    assert message in str(error.value)


def test_options_that_have_an_effect_together():
    for options in (
        {"method": "s2ft", "select": "weight", "largest": True},
        {"method": "s2ft", "select": "product", "largest": True, "calibration_rows": 9},
        {"eval_fraction": 0, "eval_data": "e", "eval_steps": 9},
        {"eval_data": "e"},
        {"warmup": 3},
    ):
        TrainConfig(**REQUIRED, **options)


def test_what_an_adapter_brings_is_not_in_the_file(tmp_path):
    config = TrainConfig(**REQUIRED, adapter="a", load_in_4bit=True)
    values = yaml.safe_load(config.yaml())
    assert not {"r", "alpha", "dropout", "target_modules", "density"} & values.keys()
    assert values["load_in_4bit"] is True and values == config.values()
    (tmp_path / "run.yaml").write_text(config.yaml())
    assert make_config({}, str(tmp_path / "run.yaml")) == config


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(UserError, match="missing --data, --out"):
        make_config({"model": "m"})
    with pytest.raises(UserError, match="No such file"):
        make_config({}, str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="must be a mapping"):
        make_config({}, str(tmp_path / "list.yaml"))
    for content, message in (
        (b"a: [", "is not YAML"),
        (b"r: " + b"1" * 6000, "is not YAML"),
        (b"\x7fELF\x02\xff", "is not UTF-8: invalid start byte at byte 5"),
        (b"[" * 5000, "is nested too deeply"),
    ):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(UserError, match=message):
            make_config({}, str(tmp_path / "bad.yaml"))
