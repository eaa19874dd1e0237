"""Targets: data files, names, and the roofline by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rewright.backends.target import SOURCES, TARGETS, Target, cpu_class, cpu_features, known_targets
from rewright.ir.errors import InputFileError, UsageError


@pytest.mark.parametrize("name", known_targets())
def test_every_number_of_a_shipped_target_says_where_it_comes_from(name: str) -> None:
    target = Target.load(name)
    assert target.name == name
    tables = {*(f"peak.{d}" for d in target.peak), *(f"efficiency.{k}" for k in target.efficiency)}
    assert set(target.sources) == {"bandwidth", "l2", "shared", "sms", "launch"} | tables
    assert set(target.sources.values()) <= set(SOURCES)
    assert min(target.bandwidth, target.launch, *target.peak.values(), *target.efficiency.values()) > 0


@pytest.mark.parametrize(("arch", "name"), [("sm_80", "a100"), ("sm_89", "l4"), ("sm_90", "h100"), ("sm_100", "b200")])
def test_an_architecture_is_its_part_of_least_bandwidth(arch: str, name: str) -> None:
    assert Target.load(f"cuda:{arch}") == Target.load(name)
    siblings = [t for t in map(Target.load, known_targets()) if t.arch == arch]
    assert min(t.bandwidth for t in siblings) == Target.load(name).bandwidth
    assert len({(t.shared, t.features) for t in siblings}) == 1  # what kernels are built by is of the architecture


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"avx2", "avx512f", "avx512_vnni", "amx_tile", "amx_int8"}, "cpu-amx"),
        ({"avx2", "avx512f", "avx512_vnni"}, "cpu-avx512-vnni"),
        ({"avx2", "avx512f"}, "cpu-avx2"),
        ({"neon"}, "cpu-avx2"),
        (set(), "cpu-avx2"),
    ],
)
def test_this_machine_has_the_numbers_of_its_class_and_its_own_features(monkeypatch: pytest.MonkeyPatch, features: set[str], name: str) -> None:
    assert cpu_class(features) == name
    monkeypatch.setattr("rewright.backends.target.cpu_features", lambda: frozenset(features))
    assert Target.load("cpu") == dataclasses.replace(Target.load(name), name="cpu", features=frozenset(features))


def test_classes_of_cpus_have_the_features_that_tell_them() -> None:
    classes = [name for name in known_targets() if name.startswith("cpu-")]
    assert {cpu_class(Target.load(name).features) for name in classes} == set(classes)
    assert all(cpu_class(Target.load(name).features) == name for name in classes)


def test_dense_peaks_not_sparse() -> None:
    """Data sheets give some peaks of a part with sparsity, twice the dense ones."""
    for part in (t for t in map(Target.load, known_targets()) if t.kind == "cuda"):
        assert part.peak["bf16"] == part.peak["fp16"] == pytest.approx(2 * part.peak["tf32"], rel=0.03)
    h200 = Target.load("h200")
    assert h200.peak["bf16"] < 1e15 < h200.peak["fp8"] < 2e15


def test_roofline_is_the_larger_of_compute_and_memory_plus_launches() -> None:
    target = Target("t", "cuda", "sm_0", {"bf16": 100.0, "fp32": 10.0}, 20.0, 0, 0, 1, 0.5, frozenset(), {})
    assert target.seconds(400, 20, 1, "bf16") == (4 + 0.5, "compute")
    assert target.seconds(400, 20, 1, torch.float32) == (40 + 0.5, "compute")
    assert target.seconds(100, 40, 2, "bf16") == (2 + 1.0, "memory")
    assert target.seconds(100, 20, 10, "bf16") == (1 + 5.0, "launch")
    assert target.seconds(0, 20, 0, torch.int64) == (1, "memory")  # copying needs no peak


def test_efficiency_divides_the_roofline_of_its_kind_but_not_the_launches() -> None:
    shares = {"attention": 0.5, "linear_attention": 2.0, "linear_attention_causal": 4.0}
    target = Target("t", "cuda", "sm_0", {"bf16": 100.0}, 20.0, 0, 0, 1, 0.5, frozenset(), {}, shares)
    assert target.seconds(400, 20, 1, "bf16", "attention") == (8 + 0.5, "compute")
    assert target.seconds(100, 40, 2, "bf16", "attention") == (4 + 1.0, "memory")
    assert target.seconds(400, 20, 1, "bf16", "attention_causal") == (8 + 0.5, "compute")  # as the op itself where it has no entry
    assert target.seconds(400, 20, 1, "bf16", "linear_attention_causal") == (1 + 0.5, "compute")
    assert target.seconds(400, 20, 1, "bf16", "linear") == target.seconds(400, 20, 1, "bf16") == (4 + 0.5, "compute")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("linear = 0.5", "efficiency.linear = 0.5; expected { value = NUMBER, source"),
        ('linear = { value = 0, source = "measured" }', "an efficiency divides a time and is above 0, not linear = 0"),
        ('linear_atention = { value = 1, source = "measured" }', "efficiency.linear_atention is no op that is counted. Did you mean 'linear_attention'"),
        ('multi_head_attention = { value = 1, source = "measured" }', "All forms of attention are attention"),
    ],
)
def test_a_wrong_efficiency_is_refused_and_says_why(tmp_path: Path, entry: str, said: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text((TARGETS / "cpu-avx512-vnni.toml").read_text() + entry + "\n")
    with pytest.raises(InputFileError) as caught:
        Target.load(file)
    assert said in str(caught.value)
    assert "bad.toml" in str(caught.value)


def test_efficiency_that_is_no_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("efficiency = 0.5\n" + (TARGETS / "cpu-avx512-vnni.toml").read_text().partition("[efficiency]")[0])
    with pytest.raises(InputFileError, match="bad.toml: efficiency = 0.5; expected a table with an entry an op"):
        Target.load(file)


def test_a_target_without_efficiencies_reaches_its_roofline(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text((TARGETS / "cpu-avx512-vnni.toml").read_text().partition("[efficiency]")[0])
    assert Target.load(file).efficiency == {}


def test_a_dtype_without_a_peak_is_refused() -> None:
    with pytest.raises(UsageError, match="a100 has no peak for fp8; it has fp32, tf32, bf16, fp16, int8"):
        Target.load("a100").seconds(1, 1, 1, torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h20", "Did you mean 'h200'"),
        ("cuda:sm_91", "Did you mean 'cuda:sm_90'"),
        ("tpu", "Known: a100, b200, cpu, cpu-amx, cpu-avx2, .*, cuda:sm_80, cuda:sm_100, cuda:sm_90, cuda:sm_89, or"),
    ],
)
def test_an_unknown_target_names_the_known_ones(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Target.load(name)


def test_a_target_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text((TARGETS / "a100.toml").read_text().replace("sm_80", "sm_86"))
    assert (Target.load(file).name, Target.load(str(file)).arch) == ("mine", "sm_86")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.replace("bandwidth", "bandwith"), "a target has no 'bandwith'. Did you mean 'bandwidth'"),
        (lambda t: "\n".join(line for line in t.splitlines() if not line.startswith(("bandwidth", "sms"))), "lacks bandwidth, sms"),
        (lambda t: t.partition("[peak]")[0], "lacks peak"),
        (lambda t: "peak = 3\n" + t.partition("[peak]")[0], "peak = 3; expected a table with an entry a dtype"),
        (lambda t: t.replace("bf16", "bf15"), "peak.bf15 is of no dtype that is counted. Did you mean 'bf16'"),
        (lambda t: 'base = "h20"\n' + t, "base = 'h20' is no target that comes with us. Did you mean 'h200'"),
        (lambda t: t.replace('"cuda"', '"gpu"'), "kind is 'cpu' or 'cuda', not 'gpu'"),
        (lambda t: t.replace('source = "vendor"', 'source = "guessed"', 1), "expected { value = NUMBER, source = 'vendor'"),
        (lambda t: t.replace("312e12", '"fast"', 1), "peak.bf16"),
        (lambda t: t + "[peak", "is not TOML"),
    ],
)
def test_a_damaged_file_is_refused_and_says_where(tmp_path: Path, damage: Callable[[str], str], said: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(damage((TARGETS / "a100.toml").read_text()))
    with pytest.raises(InputFileError) as caught:
        Target.load(file)
    assert said in str(caught.value)
    assert "bad.toml" in str(caught.value)


def test_a_file_with_a_base_says_only_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "h100"\nlaunch = { value = 5e-6, source = "measured" }\n[peak]\nbf16 = { value = 7e14, source = "measured" }\n[efficiency]\n')
    mine, base = Target.load(file), Target.load("h100")
    assert (mine.name, mine.launch, mine.peak["bf16"]) == ("mine", 5e-6, 7e14)
    assert (mine.sources["launch"], mine.sources["peak.bf16"], mine.sources["bandwidth"]) == ("measured", "measured", "vendor")
    assert mine == dataclasses.replace(base, name="mine", launch=5e-6, peak={**base.peak, "bf16": 7e14}, sources=mine.sources)
    assert (base.bandwidth, base.peak) == (3.35e12, Target.load("h200").peak)  # h100.toml has a base itself


def test_a_cpu_file_without_features_has_those_of_this_machine_and_with_a_base_the_bases(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    text = (TARGETS / "cpu-avx2.toml").read_text()
    file.write_text("\n".join(line for line in text.splitlines() if not line.startswith("features")))
    assert Target.load(file).features == cpu_features()
    file.write_text('base = "cpu-avx2"\n')
    assert Target.load(file) == dataclasses.replace(Target.load("cpu-avx2"), name="mine")
    file.write_text('base = "cpu"\n')
    assert Target.load(file).features == cpu_features()


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no file .*none.toml"):
        Target.load(tmp_path / "none.toml")


def test_the_cpu_has_the_features_of_this_machine() -> None:
    assert Target.load("cpu").features == cpu_features()
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("no /proc/cpuinfo here")
    assert all(f" {feature}" in info.read_text() for feature in cpu_features())
    assert cpu_features()
