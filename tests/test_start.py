"""What a start costs: no import that can wait, nothing compiled twice; and what is kept does no harm."""

import itertools
import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sae_jax
from sae_jax.cli.compilation_cache import private_folder, trim

COUNTED = """
import collections, json, jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
try:
    from sae_jax.cli import main
    main()
finally:
    with open(OUT, "w") as file:
        json.dump(counts, file)
"""
SWEEP = ("sweep", "--l1", "0.01,0.1", "--seeds", "2", "--steps", "20", "--overwrite", "--out", "run")


@pytest.fixture
def home(tmp_path):
    """The environment of a user who has run nothing yet."""
    taken = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "TF_CPP_MIN_LOG_LEVEL")
    mine = {name: value for name, value in os.environ.items() if name not in taken}
    return {**mine, "XDG_CACHE_HOME": str(tmp_path / "cache")}


def command(words, cwd, env):
    """A command in a process of its own: what it said, and what JAX did by the name of the event."""
    out = cwd / "counts.json"
    code = COUNTED.replace("OUT", repr(str(out)))
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads(out.read_text())


def programs(home):
    """What is kept, by name."""
    return {path.name: path for path in Path(home["XDG_CACHE_HOME"], "sae-jax", "xla").glob("*")}


def numbers(place):
    """Every file of a run that tells no time."""
    timed = ("sweep.json", "report.html")
    run = place / "run"
    found = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}
    assert set(timed) < set(found)
    return {name: path.read_bytes() for name, path in found.items() if name not in timed}


def opening(said):
    """The first word of each line: what comes after it tells times."""
    return [line.split()[0] for line in said.splitlines()]


def loaded_after(statement):
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_imports_bring_nothing_heavy_that_is_not_needed_yet():
    heavy = {"torch", "matplotlib", "plotly", "orbax.checkpoint", "scipy.special", "scipy.stats", "flax.nnx"}
    assert not heavy & loaded_after("import sae_jax")
    assert not heavy & loaded_after("import sae_jax.cli")
    # the names are right: each is what something here brings
    brought = loaded_after(
        "import sae_jax.report, sae_jax.metrics.matching, orbax.checkpoint, scipy.special, scipy.stats; "
        "sae_jax.SAEModule"
    )
    assert heavy - {"torch"} <= brought


def test_what_is_imported_late_is_there_all_the_same():
    assert sae_jax.SAEModule is sae_jax.adapters.SAEModule
    assert sae_jax.language_models.nnx_capture.sites.__module__ == "sae_jax.language_models.nnx_capture"
    for module in (sae_jax, sae_jax.adapters, sae_jax.language_models):
        assert not hasattr(module, "nowhere")
        with pytest.raises(AttributeError, match=f"{module.__name__!r} has no attribute 'nowhere'"):
            _ = module.nowhere
        assert all(hasattr(module, name) for name in module.__all__)


def test_a_library_keeps_nothing(tmp_path, home):
    code = (
        "import jax, sae_jax.cli, contextlib\n"
        "with contextlib.suppress(SystemExit): sae_jax.cli.main(['doctor', '--json'])\n"
        "assert jax.config.jax_compilation_cache_dir is None"
    )
    done = subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, text=True, check=True)
    found = {check["name"]: check["found"] for check in json.loads(done.stdout)}
    assert found["compiled programs"] == "not kept"
    assert not (tmp_path / "cache").exists()


def test_a_second_command_compiles_nothing_and_computes_the_same(tmp_path, home):
    first, counts = command(SWEEP, tmp_path, home)
    assert counts["cache_misses"] > 10
    kept, trained = programs(home), numbers(tmp_path)
    assert len(kept) == counts["cache_misses"]
    folder = tmp_path / "cache" / "sae-jax"
    assert [stat.S_IMODE(place.stat().st_mode) for place in (folder, folder / "xla")] == [0o700, 0o700]

    second, counts = command(SWEEP, tmp_path, home)
    assert "cache_misses" not in counts
    assert counts["cache_hits"] == counts["compile_requests_use_cache"] >= len(kept)
    assert set(programs(home)) == set(kept)
    # XLA has something to say of each program that it reads (`_before` tells what); nobody is to see it
    assert opening(second.stderr) == opening(first.stderr)
    assert numbers(tmp_path) == trained

    _, counts = command(SWEEP, tmp_path, {**home, "JAX_ENABLE_COMPILATION_CACHE": "false"})
    assert not {"cache_misses", "cache_hits"} & set(counts)
    assert numbers(tmp_path) == trained


def test_damaged_programs_are_compiled_anew_and_thrown_away(tmp_path, home):
    first, _ = command(SWEEP, tmp_path, home)
    kept, trained = programs(home), numbers(tmp_path)
    for path, length in zip(kept.values(), itertools.cycle((0, 1, 100, -1))):
        path.write_bytes(path.read_bytes()[:length])
    again, counts = command(SWEEP, tmp_path, home)
    assert "cache_hits" not in counts
    assert opening(again.stderr) == opening(first.stderr)
    assert numbers(tmp_path) == trained
    assert programs(home) == {}
    # and the one after keeps whole ones again
    command(SWEEP, tmp_path, home)
    assert set(programs(home)) == set(kept)


def test_commands_may_start_side_by_side(tmp_path, home):
    places = [tmp_path / "left", tmp_path / "right"]
    with ThreadPoolExecutor() as pool:
        for place in places:
            place.mkdir()
        both = list(pool.map(lambda place: command(SWEEP, place, home)[0], places))
    assert opening(both[0].stderr) == opening(both[1].stderr)
    assert numbers(places[0]) == numbers(places[1])


def test_the_user_may_choose_another_folder(tmp_path, home):
    elsewhere = {**home, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "there")}
    elsewhere |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    _, counts = command(["doctor"], tmp_path, elsewhere)
    assert counts["cache_misses"] == len(list((tmp_path / "there").glob("*-cache"))) > 0
    assert not (tmp_path / "cache").exists()
    done, _ = command(["doctor", "--json"], tmp_path, elsewhere)
    assert done.stderr == ""
    found = {check["name"]: check["found"] for check in json.loads(done.stdout)}
    assert found["compiled programs"] == f"in {tmp_path / 'there'}"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """Where caches go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_the_users_own(base, capsys):
    folder = private_folder()
    assert folder == base / "sae-jax" / "xla"
    assert private_folder() == folder
    folder.chmod(0o755)
    assert private_folder() == folder
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("inner", ["sae-jax", "sae-jax/xla"])
@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_to_is_not_used(base, capsys, inner, mode):
    private_folder()
    (base / inner).chmod(mode)
    assert private_folder() is None
    said = capsys.readouterr().err
    assert said == (
        f"sae-jax: compiled programs are not kept: other users may write to {base / inner} "
        "(chmod go-w would mend it)\n"
    )
    (base / inner).chmod(mode & ~0o022)
    assert private_folder() is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_used(base, capsys):
    os.chown(private_folder(), 12345, -1)
    assert private_folder() is None
    assert capsys.readouterr().err.endswith("xla belongs to another user\n")


def test_a_folder_that_cannot_be_had_is_passed_over_in_silence(base, tmp_path, home, capsys):
    base.write_text("no folder")
    assert private_folder() is None
    assert capsys.readouterr() == ("", "")
    done, _ = command(["doctor", "--json"], tmp_path, home)
    assert done.stderr == ""
    assert '"not kept"' in done.stdout


def test_a_relative_place_is_no_place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert private_folder() == tmp_path / "home" / ".cache" / "sae-jax" / "xla"
    assert not (tmp_path / "here").exists()


def test_a_full_disk_leaves_nothing_damaged(tmp_path, home):
    """Files may not grow beyond half a kilobyte: every program is cut short."""
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (512, 512)); from sae_jax.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor"],
        cwd=tmp_path,
        env=home,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "exact" in done.stdout
    assert done.stderr == ""
    assert programs(home) == {}


def test_the_programs_used_longest_ago_go_first(tmp_path):
    inner = tmp_path / "autotuning"
    inner.mkdir()
    paths = [tmp_path / "a", inner / "b", tmp_path / "c", tmp_path / "d"]
    for path, read, written in zip(paths, (40, 10, 20, 5), (1, 2, 3, 30), strict=True):
        path.write_bytes(b"x" * 100)
        os.utime(path, (read, written))
    trim(tmp_path, 400)
    assert all(path.exists() for path in paths)
    trim(tmp_path, 399)
    assert [path.exists() for path in paths] == [True, False, True, True]
    trim(tmp_path, 100)
    assert [path.exists() for path in paths] == [True, False, False, False]
    trim(tmp_path, 0)
    assert not paths[0].exists()
    trim(tmp_path / "nowhere", 0)


def test_xla_is_heard_again_between_programs(home):
    """What hides XLA's untrue messages hides no others: its level is as it was once a program is there."""
    code = """
import jax, logging
from sae_jax.cli.compilation_cache import keep_compiled
from jax._src.lib import utils
levels, level = [], utils.absl_set_min_log_level
utils.absl_set_min_log_level = lambda to: (levels.append(to), level(to))
keep_compiled()
print(jax.jit(lambda x: x + 1)(1.0))
assert set(levels[::2]) == {3} and set(levels[1::2]) == {1}, levels
assert logging.getLogger("jax").level == logging.NOTSET and not logging.getLogger("jax").handlers[1:]
"""
    subprocess.run([sys.executable, "-c", code], env=home, check=True)
