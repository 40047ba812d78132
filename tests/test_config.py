"""Settings: defaults, files, overrides, and refusals that name the nearest known key."""

from __future__ import annotations

import pytest

from mmkd.config import Config, ConfigError, known_keys, load_config


def test_every_setting_is_described():
    def described(model):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            if hasattr(field.annotation, "model_fields"):
                described(field.annotation)

    described(Config)
    assert {"teacher.lr", "distill.list_tau", "seed"} <= set(known_keys())


def test_file_then_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("teacher: {lr: 0.01, layers: 2}\nseed: 5\n")
    config = load_config(path, ["teacher.lr=2e-3", "baselines=[popularity]", "distill.emb_sample=null"])
    assert (config.teacher.lr, config.teacher.layers, config.seed) == (0.002, 2, 5)
    assert config.baselines == ("popularity",) and config.distill.emb_sample is None
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"techer": {}}, "unknown setting 'techer'; did you mean 'teacher'"),
        ({"teacher": {"learning_rat": 1}}, "unknown setting 'teacher.learning_rat'"),
        ({"student": {"layer": 1}}, "did you mean 'student.layers'"),
        ({"dim": 0}, "setting 'dim'"),
        ({"dim": "wide"}, "setting 'dim'"),
        ({"teacher": {"lr": float("nan")}}, "setting 'teacher.lr'"),
        ({"distill": {"pair_kind": "both"}}, "setting 'distill.pair_kind'"),
    ],
)
def test_refused(content, message):
    with pytest.raises(ConfigError, match=message):
        load_config(content)


def test_files_that_are_no_settings(tmp_path):
    for text in ("- a\n- b\n", "a: [1", "just words"):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"c\.yaml"):
            load_config(path)
    with pytest.raises(ConfigError, match="already given a value"):
        load_config({}, ["teacher=1", "teacher.lr=2"])
    with pytest.raises(TypeError, match="config: expected"):
        load_config(5)
