# SPDX-License-Identifier: Apache-2.0
"""The canary, the compile cache, the description of the machine."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import pytest

from nad_jax import errors
from nad_jax.training import environment


@pytest.mark.slow
def test_this_machine_computes_right():
    """In a child, as a user's program is compiled; the suite is not."""
    program = (
        "import json; from nad_jax.training import environment;"
        "print(json.dumps(environment.check_canary()))"
    )
    run = [sys.executable, "-c", program]
    printed = subprocess.check_output(run, env={**os.environ, "XLA_FLAGS": ""})
    outcome = json.loads(printed)
    assert outcome["passed"] and outcome["computed"] == 32_768.0**2


def test_a_wrong_last_row_is_refused_in_one_line(monkeypatch):
    """The value jaxlib 0.10.2 gives; every other row is right there."""
    right = environment._squared_lengths
    monkeypatch.setattr(
        environment,
        "_squared_lengths",
        lambda matrix, rows: right(matrix, rows).at[-1].set(1_065_369_600.0),
    )
    assert not environment.canary()["passed"]
    with pytest.raises(
        errors.InputError, match="1065369600 instead of 1073741824"
    ) as e:
        environment.check_canary()
    assert "\n" not in str(e.value) and "ynn_fusion_type" in str(e.value)


def test_the_canary_is_compiled_with_the_sum_inside_the_vmap():
    """Other spellings of the same arithmetic do not show the fault."""
    matrix, rows = (
        jax.ShapeDtypeStruct((3, 3), "f4"),
        jax.ShapeDtypeStruct((32_769, 3), "f4"),
    )
    lowered = environment._squared_lengths.lower(matrix, rows).as_text()
    assert "dot_general" in lowered and "tensor<32769x3xf32>" in lowered


@pytest.fixture
def restored_config():
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_goes_where_it_is_told(tmp_path, monkeypatch, restored_config):
    told, variable = tmp_path / "told", tmp_path / "variable"
    monkeypatch.setenv("NAD_JAX_CACHE", str(variable))
    assert environment.enable_compile_cache(told) == str(told)
    own = str(variable / "xla" / platform.node())
    assert environment.enable_compile_cache() == own
    assert jax.config.jax_compilation_cache_dir == own
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    monkeypatch.delenv("NAD_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    default = environment.enable_compile_cache()
    assert default is not None
    assert default.startswith(str(tmp_path / ".cache" / "nad_jax" / "xla"))


@pytest.mark.parametrize("off", ["off", "0"])
def test_the_cache_can_be_switched_off(off, tmp_path, monkeypatch, restored_config):
    environment.enable_compile_cache(tmp_path)
    monkeypatch.setenv("NAD_JAX_CACHE", off)
    assert environment.enable_compile_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert environment.enable_compile_cache(tmp_path / "file" / "cache") is None
    assert "no compile cache" in caplog.text


def test_who_says_where_caches_are_needs_no_home(
    tmp_path, monkeypatch, restored_config, caplog
):
    def nowhere(path):
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(pathlib.Path, "expanduser", nowhere)
    monkeypatch.setattr(pathlib.Path, "home", lambda: nowhere("~"))
    monkeypatch.setenv("NAD_JAX_CACHE", str(tmp_path))
    assert str(environment.enable_compile_cache()).startswith(str(tmp_path))
    monkeypatch.delenv("NAD_JAX_CACHE")
    assert environment.enable_compile_cache() is None
    assert "no caches: ~/.cache/nad_jax: Could not" in caplog.text


@pytest.mark.slow
def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    script = (
        "import jax\n"
        "from nad_jax.training import environment\n"
        f"environment.enable_compile_cache({str(tmp_path)!r})\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(\n"
        "    lambda event, **_: hits.append(event.endswith('cache_hits')))\n"
        "jax.jit(lambda x: x * 2 + 1)(3.0)\n"
        "print(sum(hits))\n"
    )
    run = [sys.executable, "-c", script]
    hits = [int(subprocess.check_output(run, env=dict(os.environ))) for _ in range(2)]
    assert hits == [0, 1]


def test_the_description_is_json_and_names_what_matters(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag=1")
    described = json.loads(json.dumps(environment.describe()))
    assert described["versions"]["jaxlib"] == jax.lib.__version__
    assert described["xla_flags"] == "--xla_some_flag=1"
    assert len(described["devices"]) == jax.device_count()


@pytest.mark.slow
@pytest.mark.parametrize("flags, chosen", [("", None), ("count=3", 3)])
def test_cpu_devices_are_made_for_the_cores_unless_the_user_chose(flags, chosen):
    """In a child, since devices cannot be added once there are some."""
    flag = "--xla_force_host_platform_device_" + flags if flags else ""
    program = (
        "from nad_jax.training import environment; environment.use_cpu_cores();"
        "import jax, os; print(jax.device_count(), len(os.sched_getaffinity(0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": flag},
        capture_output=True,
        text=True,
        check=True,
    )
    devices, cores = map(int, done.stdout.split())
    powers = [n for n in (1, 2, 4, 8) if n <= cores]
    assert devices == (powers[-1] if chosen is None else chosen)
