"""Classes of service as they are written: text, tables, mistakes."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from pdserve.config import resolve
from pdserve.core.errors import ConfigError
from pdserve.core.request import DEFAULT_SERVICE, ServiceClass
from pdserve.service_classes import ONE_CLASS, ServiceClasses, parse_classes

QUICK = ServiceClass(name="quick", ttft_s=0.5, tpot_s=0.05, weight=4.0)
BATCH = ServiceClass(name="batch", weight=0.5)


def from_file(tmp_path: Path, text: str) -> ServiceClasses:
    file = tmp_path / "pdserve.toml"
    file.write_text(text)
    resolved = resolve({}, {}, file)
    assert resolved.sources["classes"] == "file"
    return resolved.config.classes


def test_without_any_there_is_the_default_class() -> None:
    config = resolve({}, {}).config
    assert config.classes == ONE_CLASS
    assert config.classes.classes == (DEFAULT_SERVICE,)
    assert config.admission_policy == "none"


@pytest.mark.parametrize(
    "text",
    [
        "quick:ttft=500,tpot=50,weight=4;batch:weight=0.5",
        " quick : ttft_ms = 500 , tpot = 50.0, weight=4 ; batch:weight=5e-1 ; ",
    ],
)
def test_one_text_holds_all_classes(text: str) -> None:
    by_flag = resolve({"classes": text}, {}).config.classes
    by_environment = resolve({}, {"PDSERVE_CLASSES": text}).config.classes
    assert by_flag == by_environment
    assert by_flag.classes == (QUICK, BATCH, DEFAULT_SERVICE)
    assert parse_classes(str(by_flag)) == by_flag


def test_tables_of_a_file_hold_the_same_and_keys(tmp_path: Path) -> None:
    classes = from_file(
        tmp_path,
        """
        [serve]
        port = 0
        [[serve.classes]]
        name = "quick"
        ttft_ms = 500
        tpot_ms = 50.0
        weight = 4
        api_keys = ["secret-1", "secret-2"]
        [[serve.classes]]
        name = "batch"
        weight = 0.5
        api_keys = ["secret-3"]
        """,
    )
    assert classes.classes == (QUICK, BATCH, DEFAULT_SERVICE)
    assert classes.class_of_key == {"secret-1": "quick", "secret-2": "quick", "secret-3": "batch"}
    assert "secret" not in str(classes) + repr(classes)


def test_the_default_class_may_be_given_too() -> None:
    [only] = parse_classes("default:tpot=100,weight=2").classes
    assert only == ServiceClass(name="default", ttft_s=inf, tpot_s=0.1, weight=2.0)
    assert parse_classes("plain").classes == (ServiceClass(name="plain"), DEFAULT_SERVICE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a b:weight=1", "'a b'; it may hold letters"),
        (":weight=1", "''; it may hold letters"),
        ("a:ttft=0", "class 'a': ttft_ms is '0'; it must be a number above 0"),
        ("a:tpot=-1", "must be a number above 0"),
        ("a:weight=nan", "must be a number above 0"),
        ("a:weight=inf", "must be a number above 0"),
        ("a:ttft=fast", "must be a number above 0"),
        ("a:speed=1", "'speed=1' is none of ttft=MS"),
        ("a:ttft=1,ttft_ms=2", "'ttft_ms=2' is none of"),
        ("a:ttft", "'ttft' is none of"),
        ("a:api_keys=x", "is none of"),
        ("a;b;a", "class 'a' is given twice"),
    ],
)
def test_mistakes_name_the_class_and_the_place(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve({"classes": text}, {})
    assert str(refused.value).startswith("--classes: ")
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("toml", "reason"),
    [
        ("classes = 3", "classes must be tables"),
        ("classes = [1]", "classes must be tables"),
        ("[[serve.classes]]\nweight = 1", "the name of a class is None"),
        ('[[serve.classes]]\nname = "a"\nttft = 5', "class 'a' has ttft; a class has name"),
        ('[[serve.classes]]\nname = "a"\nweight = true', "weight is True"),
        ('[[serve.classes]]\nname = "a"\napi_keys = "x"', "api_keys must be a list"),
        (
            '[[serve.classes]]\nname = "a"\napi_keys = ["k"]\n'
            '[[serve.classes]]\nname = "b"\napi_keys = ["k"]',
            "bound to two classes",
        ),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, toml: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"classes in .*pdserve\.toml: ") as refused:
        from_file(tmp_path, f"[serve]\n{toml}\n")
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ({"classes": "a:weight=3"}, "none"),
        ({"classes": "a:ttft=3"}, "predicted"),
        ({"classes": "a:tpot=3", "admission": "none"}, "none"),
        ({"classes": "a:tpot=3", "admission": "early"}, "early"),
        ({"admission": "predicted"}, "predicted"),
    ],
)
def test_by_default_bounds_are_kept_by_prediction(flags: dict[str, str], policy: str) -> None:
    assert resolve(flags, {}).config.admission_policy == policy


def test_an_unknown_admission_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="--admission is 'late'; it is one of auto, none, early"):
        resolve({"admission": "late"}, {})
