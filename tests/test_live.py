"""`--live`: what its page is told of a run, who is answered, and that training does not notice."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae_jax
from sae_jax import Look, cli
from sae_jax.base import InputError
from sae_jax.cli.live import Live
from sae_jax.cli.serving import CLIENTS, Answer, Server
from sae_jax.report import live

SCRIPT = Path(sys.executable).with_name("sae-jax")
LONG = "sweep --steps 4000000 --seeds 1 --l1 0.01,0.1"
"""Stopped or read long before its end, on any machine."""


def look(first, stop, steps, done=1, total=100, ended=None, **logs):
    """A look at members whose logs, [points, members], were taken after these steps."""
    logs = {name: np.asarray(log, np.float32) for name, log in logs.items()}
    return Look(done, total, {"step": np.array(steps, int), **logs}, first, stop, ended or {}, done)


def same_logs(first, stop, steps, value=1.0):
    log = np.full((len(steps), stop - first), value)
    return look(first, stop, steps, loss=log, l0=log, reconstruction=log)


# What is known so far


def test_chunks_of_members_are_put_side_by_side():
    table = sae_jax.grid(l1=[0.1, 0.2, 0.3], lr=[1e-3])
    looks = [look(0, 2, [5, 10], loss=[[4, 3], [2, 1]]), look(2, 3, [5], loss=[[9]])]
    found = live.so_far(looks, table)
    assert found.history["step"].tolist() == [5, 10]
    np.testing.assert_array_equal(found.history["loss"], [[4, 3, 9], [2, 1, np.nan]])
    np.testing.assert_array_equal(found.metrics["loss"], [2, 1, 9])


def test_a_round_of_halving_goes_on_where_the_one_before_ended():
    table = sae_jax.grid(l1=[0.1, 0.2, 0.3])
    looks = [look(0, 3, [5, 10], loss=[[3, 3, 3], [2, 2, 2]]), look(0, 3, [15], loss=[[1, np.nan, 1]])]
    found = live.so_far(looks, table)
    np.testing.assert_array_equal(found.history["loss"][:, 1], [3, 2, np.nan])
    np.testing.assert_array_equal(found.metrics["loss"], [1, 2, 1])


def test_before_the_first_point_there_is_nothing():
    assert live.so_far([], sae_jax.grid(l1=[0.1])) is None
    assert live.so_far([look(0, 1, [])], sae_jax.grid(l1=[0.1])) is None


def test_what_is_known_so_far_is_what_a_real_sweep_ends_with(small):
    seen = Live(sae_jax.grid(l1=[0.01, 0.1], lr=[1e-3]), 30, "here")
    result = sae_jax.sweep(
        lambda l1: sae_jax.relu(5, 7, l1=l1),
        grid=seen.table,
        source=sae_jax.in_memory(small, 16),
        steps=30,
        look=seen.show,
    )
    found = live.so_far(list(seen.looks.values()), seen.table)
    for name, log in result.history.items():
        np.testing.assert_array_equal(found.history[name], log)


def test_members_of_several_architectures_have_one_table():
    grids = [sae_jax.grid(l1=[0.1, 0.2]), sae_jax.grid(k=[4])]
    table = live.whole_table(
        grids, [{"architecture": "relu", "d_sae": 8}, {"architecture": "topk", "d_sae": 8}]
    )
    assert table["architecture"].tolist() == ["relu", "relu", "topk"]
    found = live.so_far([same_logs(0, 2, [5]), same_logs(2, 3, [5], 0.5)], table)
    drawn = live.drawn(found)
    assert {trace["name"] for trace in drawn["frontier"]["data"] if trace["mode"] == "lines"} == {
        "relu",
        "topk",
    }
    assert list(drawn) == ["frontier", "curve-loss", "curve-reconstruction", "curve-l0"]
    *curves, relu, topk = drawn["curve-loss"]["data"]
    hues = [trace["line"]["color"] for trace in curves]
    assert hues == [relu["line"]["color"]] * 2 + [topk["line"]["color"]]
    assert [
        trace["line"]["color"] for trace in drawn["frontier"]["data"] if trace["mode"] == "lines"
    ] == hues[1:]


def test_the_interim_frontier_is_of_the_latest_logs():
    table = sae_jax.grid(l1=[0.1, 0.2, 0.3])
    logs = {"l0": [[9, 9, 9], [1, 2, 3]], "reconstruction": [[9, 9, 9], [0.5, 0.1, 0.4]]}
    line, dots = live.frontier(live.so_far([look(0, 3, [5, 10], loss=logs["l0"], **logs)], table))["data"]
    assert (line["x"], line["y"]) == ([1, 2], [0.5, 0.1])
    assert (dots["x"], dots["y"]) == ([1, 2, 3], [0.5, 0.1, 0.4])
    assert "l1 0.2<br>l0 2<br>reconstruction 0.1" in dots["hovertext"][1]


def test_a_state_stays_small_however_many_members_there_are():
    table = sae_jax.grid(l1=np.geomspace(1e-4, 1, 500), seed=range(8))
    rng = np.random.default_rng(0)
    logs = {name: rng.random((100, 4000)) for name in ("loss", "l0", "reconstruction")}
    seen = Live(table, 100, "here")
    seen.show(look(0, 4000, range(1, 101), **logs))
    assert len(seen.state().body) < 300_000
    plots = json.loads(seen.state().body)["plots"]
    assert len(plots["frontier"]["data"][1]["x"]) == live.MOST_DOTS
    assert all(len(plot["data"]) <= 32 for plot in plots.values())


@given(
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
)
def test_no_figure_that_a_run_logs_breaks_a_state(errors, l0):
    seen = Live(sae_jax.grid(l1=[0.1, 0.2, 0.3]), 10, "here")
    seen.show(look(0, 3, [5], loss=[errors], reconstruction=[errors], l0=[l0]))
    json.loads(seen.state().body, parse_constant=pytest.fail)


# What a run tells its pages


def test_a_state_is_made_once_however_often_it_is_asked_for(monkeypatch):
    seen = Live(sae_jax.grid(l1=[0.1]), 10, "here")
    seen.show(same_logs(0, 1, [1]))
    first = seen.state()
    assert seen.state() is first
    seen.show(same_logs(0, 1, [1, 2]))
    assert seen.state() is first, "it was made only just now"
    monkeypatch.setattr(seen, "next_at", 0.0)
    assert seen.state().tag != first.tag
    seen.end("stopped", "stopped at 3%")
    assert json.loads(seen.state().body)["words"] == "stopped at 3%", "an end is told at once"


def test_progress_is_told_as_on_the_terminal():
    seen = Live(sae_jax.grid(l1=[0.1]), 10, "here")
    assert json.loads(seen.state().body)["figures"] == {"done": "0%"}
    seen = Live(sae_jax.grid(l1=[0.1]), 10, "here")
    seen.show(look(0, 1, [], done=10))
    time.sleep(0.01)
    seen.show(look(0, 1, [], done=25, ended={"diverged": 2, "dropped": 0}))
    figures = json.loads(seen.state().body)["figures"]
    assert list(figures) == ["done", "time left", "members/s", "diverged"]
    assert (figures["done"], figures["diverged"]) == ("25%", "2")


def test_a_run_that_ends_waits_for_the_pages_that_are_open_and_for_no_other():
    seen = Live(sae_jax.grid(l1=[0.1]), 10, "here")
    began = time.monotonic()
    seen.end("stopped", "stopped")
    seen.farewell(lambda: False)
    assert time.monotonic() - began < 0.5, "nobody looked"
    seen.answer(b"", "/state.json", "a page").sent()
    seen.farewell(lambda: False)
    assert time.monotonic() - began < 0.5, "the page has been told: its answer was of the end"
    seen.asked("one that never comes back")
    seen.farewell(lambda: False)
    assert 1.5 < time.monotonic() - began < 4


def test_a_finished_run_waits_for_its_report_to_be_fetched_unless_somebody_hurries(tmp_path):
    (tmp_path / "report.html").write_text("<p>report")
    seen = Live(sae_jax.grid(l1=[0.1]), 10, "here")
    assert seen.answer(b"", "/report.html", "") is None
    seen.end("finished", report=tmp_path / "report.html")
    seen.answer(b"", "/state.json", "a page")
    assert seen._watched()
    began = time.monotonic()
    seen.farewell(lambda: True)
    assert time.monotonic() - began < 0.5
    seen.answer(b"", "/report.html", "a page").sent()
    assert not seen._watched()


# Who is answered


@pytest.fixture(scope="module")
def server():
    with Server("127.0.0.1", 0) as server:
        there = {"/": Answer("text/html", b"page"), "/state.json": Answer("application/json", b"{}", '"7"')}
        server.start(lambda path, page: there.get(path))
        yield server


def ask(server, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(
        method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    answer = connection.getresponse()
    return answer, answer.read()


def test_three_things_are_to_be_had(server):
    answer, body = ask(server, "/")
    assert (answer.status, body) == (200, b"page")
    assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert ask(server, "/", "HEAD")[1] == b""
    assert ask(server, "/state.json?page=1")[0].status == 200
    for path in ("/report.html", "/sweep.json", "/../etc/passwd", "/.", "/state.json/", "/%2e%2e/"):
        assert ask(server, path)[0].status == 404, path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "CONNECT"):
        assert ask(server, "/", method)[0].status == 501, method


def test_a_state_that_a_page_has_is_not_sent_again(server):
    answer, _ = ask(server, "/state.json")
    assert answer.headers["ETag"] == '"7"'
    again, body = ask(server, "/state.json", If_None_Match='"7"')
    assert (again.status, body) == (304, b"")
    assert ask(server, "/state.json", If_None_Match='"6"')[0].status == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "LOCALHOST", "[::1]:80"])
def test_this_machine_by_any_port_is_answered(server, host):
    assert ask(server, "/", Host=host)[0].status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8765", "10.0.0.1", "", "localhost@evil"]
)
def test_another_name_that_was_led_here_is_refused(server, host):
    for path in ("/", "/state.json", "/nothing"):
        answer, body = ask(server, path, Host=host)
        assert answer.status == 421
        assert b"page" not in body


def test_only_this_machine_reaches_it_unless_told_otherwise(server):
    assert server.local
    assert server.url == f"http://127.0.0.1:{server.port}/"
    with Server("0.0.0.0", 0) as everywhere:
        assert not everywhere.local
        assert socket.gethostname() in everywhere.url
        assert everywhere.knows("10.0.0.1:8765")
        assert everywhere.knows(socket.gethostname())
        assert not everywhere.knows("evil.example")


def test_an_address_by_number_of_six_has_brackets():
    try:
        with Server("::1", 0) as server:
            assert server.url == f"http://[::1]:{server.port}/"
            assert server.local
    except InputError as error:
        pytest.skip(f"this machine has no IPv6: {error}")


@pytest.mark.parametrize(
    ("host", "port", "sentence"),
    [
        ("127.0.0.1", 65536, "a port is a number from 0 to 65535, got 65536"),
        ("127.0.0.1", -1, "a port is a number from 0 to 65535, got -1"),
        ("192.0.2.1", 0, "nothing can be served at 192.0.2.1 .*--live-host takes an address of this machine"),
        ("no.such.invalid", 0, "nothing can be served at no.such.invalid"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(host, port, sentence):
    with pytest.raises(InputError, match=sentence):
        Server(host, port)


@given(rubbish=st.binary(max_size=200))
def test_rubbish_is_survived(server, rubbish):
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(rubbish)
    assert ask(server, "/")[1] == b"page"


def test_clients_that_hang_up_or_crowd_are_nobodys_business(server, capfd):
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not an end
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    crowd = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(CLIENTS + 8)]
    hung_up = 0
    for client in reversed(crowd):
        client.settimeout(0.2)
        try:
            hung_up += client.recv(1) == b""
        except TimeoutError:
            break
    assert hung_up >= 8, "those beyond the room are hung up on"
    for client in crowd:
        client.close()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            assert ask(server, "/")[1] == b"page"
            break
        except (ConnectionError, http.client.HTTPException):
            time.sleep(0.05)
    else:
        pytest.fail("no room again when they have left")
    assert capfd.readouterr().err == ""


# The command line


def begun(words, cwd):
    """A run with `--live`, and where it is."""
    run = subprocess.Popen(
        [SCRIPT, *words.split(), "--live", "--live-port", "0"],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    told = ""
    for line in run.stderr:
        told += line
        if found := re.fullmatch(r"live at (http://127\.0\.0\.1:\d+/)\n", line):
            return run, found[1]
    pytest.fail(told)


def state(address, page="a-test"):
    request = urllib.request.Request(address + "state.json", headers={"X-Page": page})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def states(address, until):
    """Those that are told one after the other, to one of which `until` is true."""
    while True:
        told = state(address)
        yield told
        if until(told):
            return
        time.sleep(0.1)


def test_a_real_sweep_is_seen_to_advance_and_then_its_report_is_had(tmp_path):
    run, address = begun("sweep --steps 100000 --seeds 1 --out r", tmp_path)
    shares, drawn = [], []
    for told in states(address, lambda told: told["phase"] == "finished"):
        shares.append(told["share"])
        drawn.append(set(told["plots"]))
    assert shares == sorted(shares)
    assert len({share for share in shares if 0 < share < 1}) >= 2, "it advanced under our eyes"
    assert {"frontier", "curve-loss", "curve-l0", "curve-reconstruction"} <= drawn[-1]
    with urllib.request.urlopen(address + "report.html?page=a-test", timeout=30) as answer:
        report = answer.read()
    _, told = run.communicate(timeout=60)
    assert run.returncode == 0, told
    assert report == (tmp_path / "r" / "report.html").read_bytes()
    with pytest.raises(urllib.error.URLError):
        state(address)


@pytest.mark.slow
def test_a_stopped_run_says_to_its_page_what_it_says_on_the_terminal(tmp_path):
    run, address = begun(LONG + " --out r", tmp_path)
    list(states(address, lambda told: told["share"] > 0))
    run.send_signal(signal.SIGTERM)
    *_, last = states(address, lambda told: told["phase"] == "stopped")
    _, told = run.communicate(timeout=30)
    assert run.returncode == 0
    assert last["words"].startswith("stopped at ")
    assert last["words"].endswith("--resume")
    assert last["words"] in told.splitlines()


@pytest.mark.slow
def test_a_run_that_fails_says_so_to_its_page(tmp_path):
    run, address = begun(LONG + " --out r", tmp_path)
    list(states(address, lambda told: told["share"] > 0))
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    *_, last = states(address, lambda told: told["phase"] == "stopped")
    _, told = run.communicate(timeout=30)
    assert run.returncode == 2
    assert "metrics.jsonl" in told
    assert last["words"] == "The run ended early; its terminal says why."


@pytest.mark.slow
def test_a_second_interrupt_waits_for_no_page(tmp_path):
    run, address = begun(LONG + " --out r", tmp_path)
    list(states(address, lambda told: told["share"] > 0))
    run.send_signal(signal.SIGINT)
    time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=20)
    assert run.returncode == 130


def test_a_port_in_use_is_one_sentence_and_leaves_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [SCRIPT, *f"sweep --live --live-port {port} --out r".split()],
            cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    sentence = "is in use: give another with --live-port, or 0 for any that is free"
    assert done.stderr == f"sae-jax: port {port} of 127.0.0.1 {sentence}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """`sae-jax WORDS` in this process and an empty folder: how it exits, and what it says on stderr."""

    def called(words):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as exit:
            cli.main(words.split())
        return exit.value.code, capsys.readouterr().err

    return called


@pytest.mark.parametrize("option", ["--live-host 0.0.0.0", "--live-port 0"])
def test_where_to_serve_is_asked_for_only_with_live(main, tmp_path, option):
    sentence = f"sae-jax: {option.split()[0]} is for --live, which serves the run\n"
    assert main(f"sweep {option}") == (2, sentence)
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_others_reach_is_told_as_one(main):
    status, told = main("train --steps 5 --live --live-port 0 --live-host 0.0.0.0 --out r")
    assert status == 0
    assert re.search(r"live at http://\S+:\d+/; whoever reaches this address can see the run\n", told)


def test_a_run_that_was_finished_shows_its_report_again(main, tmp_path):
    words = "train --steps 5 --live --live-port 0 --out r"
    assert main(words)[0] == 0
    status, told = main(f"{words} --resume")
    assert (status, told) == (
        0,
        "training 1 member for 5 steps\nr is finished already: there is nothing to resume\n",
    )
