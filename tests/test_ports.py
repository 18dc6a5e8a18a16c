"""A user's port beside its SAE: the right one passes, a subtle fault is caught and named."""

import json
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae_jax
from sae_jax.cli import main
from sae_jax.report import port_page
from sae_jax.verify import ports
from sae_jax.verify.harness import Report

D_IN, D_SAE, K = 6, 10, 3
MAP = {"W_enc": "up.weight.T", "b_enc": "up.bias", "W_dec": "down.weight.T", "b_dec": "b_dec"}

MINE = """
import torch

class Mine(torch.nn.Module):
    def __init__(self, d_in=6, d_sae=10, k=3):
        super().__init__()
        self.k = k
        self.up, self.down = torch.nn.Linear(d_in, d_sae), torch.nn.Linear(d_sae, d_in, bias=False)
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))

    def kept(self, pre):
        top = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    def encode(self, x):
        return self.kept(self.up(x - self.b_dec)).relu()

    def decode(self, f):
        return self.down(f) + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))
"""

CHANGES = {
    "right": "",
    "relu_before": """
    encode = None
    def forward(self, x):
        f = self.kept(self.up(x - self.b_dec).relu())
        return self.decode(f), f""",
    "no_forward": "forward = torch.nn.Module.forward",
    "no_b_dec": "def encode(self, x): return self.kept(self.up(x)).relu()",
    "no_relu": "def encode(self, x): return self.kept(self.up(x - self.b_dec))",
    "no_b_dec_out": "def decode(self, f): return self.down(f)",
    "detached": "def decode(self, f): return self.down(f.detach()) + self.b_dec",
    "constant_b_dec": "def encode(self, x): return self.kept(self.up(x - self.b_dec.detach())).relu()",
    "adam_eps": "def configure_optimizers(self): return torch.optim.Adam(self.parameters(), eps=1e-4)",
    "mean_loss": "def loss(self, x): return ((self(x) - x) ** 2).mean(), {'ignored': 0}",
    "own_loss": "def loss(self, x): return ((self(x) - x) ** 2).sum(-1).mean(), {'ignored': 0}",
    "nan": "def decode(self, f): return self.down(f) + self.b_dec + float('nan')",
    "late": """
    calls = 0
    def loss(self, x):
        self.calls += 1
        return ((self(x) - x) ** 2).sum(-1).mean() * (1 if self.calls < 6 else 1.5)""",
    "dropped": "def encode(self, x): return torch.nn.functional.dropout(Mine.encode(self, x))",
    "raises": "def encode(self, x): raise RuntimeError('boom in\\n encode')",
    "single": "def encode(self, x): return self.up((x - self.b_dec).float())",
    "wide": "def decode(self, f): return torch.cat([self.down(f), self.down(f)], dim=-1)",
    "other_order": "def forward(self, x): f = Mine.encode(self, x); return f, self.decode(f)",
    "vector_loss": "def loss(self, x): return ((self(x) - x) ** 2).sum(-1)",
    "frozen": "def loss(self, x): return ((self(x) - x) ** 2).sum(-1).mean().detach()",
    "no_optimizer": "def configure_optimizers(self): return [1]",
}


@pytest.fixture(autouse=True)
def one_thread(torch):
    """Products of this size take longer to hand out than to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with an SAE, the user's file and a map."""
    monkeypatch.chdir(tmp_path)
    sae = sae_jax.topk(D_IN, D_SAE, k=K, auxk=0.0)
    params = sae.init(jax.random.key(0))
    drawn = dict(zip(("b_enc", "b_dec"), jax.random.split(jax.random.key(1)), strict=True))
    params |= {name: 0.3 * jax.random.normal(key, params[name].shape) for name, key in drawn.items()}
    sae_jax.TrainedSAE(sae, params).save("sae")
    classes = [f"class {name}(Mine):\n    {body or 'pass'}\n" for name, body in CHANGES.items()]
    (tmp_path / "mine.py").write_text(MINE + "\n".join(classes))
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    return tmp_path


def verify(*words, torch="mine.py:right", sae="sae", names="map.json"):
    """The exit status of the command, run in this process."""
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--sae", sae, "--torch", torch, "--map", names, *map(str, words)])
    return stop.value.code


def reported(capsys, *words, **given):
    """The exit status, and the JSON."""
    status = verify("--steps", 10, "--json", *words, **given)
    text = capsys.readouterr().out
    return status, json.loads(text, parse_constant=pytest.fail)


def breached(report):
    """Stage -> the quantities past its bound."""
    found = {
        stage: {name for name, error in each["errors"].items() if error is None or not error <= each["bound"]}
        for stage, each in report["stages"].items()
    }
    return {stage: names for stage, names in found.items() if names}


@pytest.mark.parametrize("name", ["right", "relu_before", "no_forward", "own_loss"])
def test_a_right_port_passes(place, capsys, name):
    status, found = reported(capsys, torch=f"mine.py:{name}")
    assert status == 0
    assert found["ok"]
    assert found["findings"] == []
    assert found["active_latents"] == D_SAE
    assert found["loss"].startswith("the class's own") == (name == "own_loss")
    double, single = found["reports"]
    assert (double["dtype"], single["dtype"]) == ("float64", "float32")
    assert double["stages"]["forward"]["errors"].keys() == {"x_hat", "f"}
    assert double["stages"]["gradients"]["errors"].keys() == set(MAP)
    for report, most in ((double, 1e-13), (single, 1e-4)):
        errors = [error for stage in report["stages"].values() for error in stage["errors"].values()]
        assert max(errors) < most
        assert report["parted"] is None
        assert report["trajectory"].keys() == set(MAP)
        assert all(len(errors) == 10 and max(errors) < most for errors in report["trajectory"].values())
    assert max(single["trajectory"]["W_dec"]) > 0, "float32 sums in another order somewhere"


@pytest.mark.parametrize(
    ("name", "stage", "guilty", "innocent"),
    [
        ("no_b_dec", "forward", {"f", "x_hat"}, set()),
        ("no_relu", "forward", {"f", "x_hat"}, set()),
        ("no_b_dec_out", "forward", {"x_hat"}, {"f"}),
        ("mean_loss", "loss", {"loss"}, set()),
        ("detached", "gradients", {"W_enc", "b_enc", "b_dec"}, {"W_dec"}),
        ("constant_b_dec", "gradients", {"b_dec"}, {"W_enc", "b_enc", "W_dec"}),
        ("adam_eps", "trained", {"W_enc", "b_enc", "W_dec", "b_dec"}, set()),
    ],
)
def test_a_fault_is_caught_where_it_is(place, capsys, name, stage, guilty, innocent):
    status, found = reported(capsys, torch=f"mine.py:{name}")
    assert status == 1
    assert not found["ok"]
    double = found["reports"][0]
    breaches = breached(double)
    assert next(iter(breaches)) == stage, "earlier stages agree"
    assert guilty <= breaches[stage]
    assert not innocent & breaches[stage]
    assert double["parted"]["step"] == 1
    assert found["findings"][0].startswith(f"float64: {stage} is the first stage that differs")
    assert all(f"{quantity} by" in found["findings"][0] for quantity in guilty)


def test_the_step_at_which_trajectories_part(place, capsys):
    """The loss of one class grows with its sixth call: its first five updates agree, the sixth does not."""
    status, found = reported(capsys, torch="mine.py:late")
    assert status == 1
    double = found["reports"][0]
    assert double["parted"]["step"] == 6
    assert double["parted"]["parameter"] in MAP
    assert set(breached(double)) == {"trained"}
    bound = double["stages"]["trained"]["bound"]
    worst = np.max(list(double["trajectory"].values()), axis=0)
    assert (worst[:5] <= bound).all()
    assert (worst[5:] > bound).all()


def test_a_map_that_forgets_to_transpose_a_square_matrix_is_caught(place, capsys):
    sae = sae_jax.topk(D_IN, D_IN, k=2)
    sae_jax.TrainedSAE(sae, sae.init(jax.random.key(0))).save("square")
    nested = {"parameters": {**MAP, "W_enc": "up.weight"}, "arguments": {"d_sae": D_IN, "k": 2}}
    (place / "nested.json").write_text(json.dumps(nested))
    status, found = reported(capsys, sae="square", names="nested.json")
    assert status == 1
    assert breached(found["reports"][0])["forward"] == {"f", "x_hat"}


def test_the_files_hold_the_report(place, capsys):
    assert verify("--steps", 7, "--out", "out", torch="mine.py:no_b_dec") == 1
    shown = capsys.readouterr().out
    assert "breach" in shown
    assert "forward is the first stage that differs" in shown
    found = json.loads((place / "out" / "report.json").read_text())
    assert sorted(file.name for file in (place / "out").iterdir()) == ["report.html", "report.json"]
    page = Page((place / "out" / "report.html").read_text())
    assert not {"link", "img", "iframe", "base", "object"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if {"src", "href", "srcset"} & set(attrs)]
    for report in found["reports"]:
        *lines, bound = page.plots[f"steps-{report['dtype']}"]["data"]
        assert {line["name"]: line["y"] for line in lines} == report["trajectory"]
        assert all(line["x"] == list(range(1, 8)) for line in lines)
        assert bound["y"] == [report["stages"]["trained"]["bound"]] * 2
        assert page.plots[f"steps-{report['dtype']}"]["layout"]["yaxis"]["type"] == "log"
    for stage, each in found["reports"][0]["stages"].items():
        rows = page.tables[stage]
        assert [row[0] for row in rows[1:]] == list(each["errors"])
        for name, *cells in rows[1:]:
            error = each["errors"][name]
            assert cells[0] == f"{error:.1e}" + ("" if error <= each["bound"] else " ✗")
    assert "differs from" in page.text
    assert found["findings"][0] in page.text
    evil = "<script>alert(1)</script>"
    page = Page(port_page({**found, "torch": evil, "sae": evil, "findings": [evil]}))
    assert page.text.count(evil) >= 3
    assert sum(tag == "script" for tag, _ in page.tags) == 3


def test_a_page_of_what_is_not_finite(place):
    assert verify("--steps", 3, "--out", "out", torch="mine.py:nan") == 1
    found = json.loads((place / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["reports"][0]["stages"]["forward"]["errors"]["x_hat"] is None
    page = Page((place / "out" / "report.html").read_text())
    assert ["x_hat", "not finite ✗", "not finite ✗"] in page.tables["forward"]


def test_a_users_data_and_module_by_name(place, capsys):
    (place / "port_by_name_for_tests.py").write_text("from mine_beside_it import right\n")
    (place / "mine_beside_it.py").write_text((place / "mine.py").read_text() + "\nprint('chatter')\n")
    np.save("rows.npy", np.random.default_rng(3).normal(size=(20, D_IN)).astype(np.float32))
    status, found = reported(
        capsys, "--data", "rows.npy", "--batch-size", 8, "--l1", 0.1, torch="port_by_name_for_tests:right"
    )
    assert status == 0
    assert found["data"] == "rows.npy"
    assert found["batch_size"] == 8
    errors = found["reports"][0]["stages"]["loss"]["errors"]
    assert errors.keys() == {"loss", "reconstruction", "sparsity"}
    means = found["reports"][0]["means"]
    assert means["loss"] == pytest.approx(means["reconstruction"] + 0.1 * means["sparsity"])


def test_a_transcoder_and_its_own_loss(place, capsys):
    sae = sae_jax.transcoder(D_IN, D_SAE, of=sae_jax.relu, d_out=4, skip=True, l1=0.05)
    params = sae.init(jax.random.key(0))
    params = {name: leaf + 0.1 * jnp.ones_like(leaf) for name, leaf in params.items()}
    sae_jax.TrainedSAE(sae, params).save("transcoder")
    mean = "mean" if sae.config.get("mean_features", True) else "sum(-1).mean"
    (place / "trans.py").write_text(f"""
import torch

class Trans(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear({D_IN}, {D_SAE}), torch.nn.Linear({D_SAE}, 4)
        self.skip = torch.nn.Linear({D_IN}, 4, bias=False)
    def forward(self, x):
        f = self.up(x).relu()
        return self.down(f) + self.skip(x), f
    def loss(self, x, y):
        x_hat, f = self(x)
        return (x_hat - y).square().{mean}() + 0.05 * f.{mean}()
""")
    names = {**MAP, "b_dec": "down.bias", "W_skip": "skip.weight.T"}
    (place / "trans.json").write_text(json.dumps(names))
    status, found = reported(capsys, torch="trans.py:Trans", sae="transcoder", names="trans.json")
    assert status == 0, found["findings"]
    assert found["reports"][0]["stages"]["gradients"]["errors"].keys() == set(names)


SQUARED = {name: other for name, other in MAP.items() if name != "b_enc"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"torch": "mine"}, "MODULE:CLASS"),
        ({"torch": "nowhere_at_all:Mine"}, "No module named 'nowhere_at_all'"),
        ({"torch": "nowhere.py:Mine"}, "there is no file nowhere.py"),
        ({"torch": "mine.py:Yours"}, "has no Yours; its classes: Mine, right"),
        ({"torch": "broken.py:Mine"}, "importing broken.py raised ZeroDivisionError"),
        ({"torch": "leaving.py:Mine"}, "importing leaving.py raised SystemExit"),
        ({"torch": "plain.py:Plain"}, "must make a torch.nn.Module"),
        ({"torch": "plain.py:number"}, "is no class, but int"),
        ({"names": {"parameters": MAP, "arguments": {"width": 3}}}, "(width=3) raised TypeError"),
        ({"names": {"parameters": MAP, "arguments": [1]}}, "arguments must be an object"),
        ({"names": {"parameters": MAP, "extra": 1}}, "but also extra"),
        ({"names": {**MAP, "W_enc": 3}}, "W_enc must be the name"),
        ({"names": "nothing.json"}, "nothing.json"),
        ({"names": [1]}, "JSON object"),
        ({"names": {**MAP, "W_enc": "sideways"}}, "no parameter sideways; it has b_dec, up.weight"),
        ({"names": SQUARED}, "no counterpart of b_enc"),
        ({"names": {**MAP, "W_enc": "up.weight"}}, "transposed"),
        ({"torch": "mine.py:raises"}, "forward in float64 raised RuntimeError: boom in encode"),
        ({"torch": "mine.py:single"}, "forward in float64 raised RuntimeError"),
        ({"torch": "mine.py:wide"}, "x_hat must be a tensor of shape [64, 6], got [64, 12]"),
        ({"torch": "mine.py:other_order"}, "x_hat must be a tensor of shape [64, 6], got [64, 10]"),
        ({"torch": "mine.py:vector_loss"}, "loss must be a tensor of shape [], got [64]"),
        ({"torch": "mine.py:dropped"}, "when asked twice about the same rows"),
        ({"torch": "mine.py:frozen"}, "depends on no parameter"),
        ({"torch": "mine.py:no_optimizer"}, "must give one torch optimizer, got list"),
        ({"torch": "mine.py:own_loss", "more": ["--l1", 1]}, "l1 must be left out"),
        ({"sae": "nothing_here"}, "nothing_here"),
        ({"more": ["--data", "narrow.npy"]}, "reads rows of [6], got rows of [2]"),
        ({"more": ["--data", "nothing.npy"]}, "nothing.npy does not exist"),
        ({"more": ["--data", "x.npy", "--target", "x.npy"]}, "a transcoder takes rows and targets"),
        ({"more": ["--target", "narrow.npy"]}, "--data"),
        ({"more": ["--steps", 0]}, "--steps must be at least 1"),
        ({"more": ["--batch-size", 0]}, "batch_size must be at least 1"),
        ({"more": ["--lr", -1]}, "learning rate"),
        ({"more": ["--lr", "nan"]}, "learning rate"),
        ({"more": ["--l1", -1]}, "l1 must be"),
        ({"more": ["--all"]}, "leave out --all"),
        ({"more": ["--out", "mine.py"]}, "is a file, not a folder"),
    ],
)
def test_bad_input_is_one_sentence(place, capsys, words, says):
    (place / "broken.py").write_text("1 / 0\n")
    (place / "leaving.py").write_text("raise SystemExit('bye')\n")
    (place / "plain.py").write_text("number = 3\nclass Plain: pass\n")
    np.save("narrow.npy", np.ones((9, 2)))
    np.save("x.npy", np.ones((9, D_IN)))
    words = dict(words)
    more, names = words.pop("more", ()), words.pop("names", MAP)
    if not isinstance(names, str):
        (place / "map.json").write_text(json.dumps(names))
        names = "map.json"
    assert verify("--out", "out", *more, **words, names=names) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") == 1, told.err
    assert told.out == ""
    assert not (place / "out").exists()


@pytest.mark.parametrize("option", ["--torch a:b", "--map m.json", "--out o", "--l1 0.1", "--lr 0.1"])
def test_options_of_a_port_need_an_sae(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["verify", *option.split()])
    assert stop.value.code == 2
    assert "is for --sae" in capsys.readouterr().err


def test_an_sae_needs_its_class_and_map(place, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["verify", "--sae", "sae", "--torch", "mine.py:right"])
    assert stop.value.code == 2
    assert "needs --torch MODULE:CLASS and --map" in capsys.readouterr().err


def test_rows_on_which_nothing_is_active_prove_nothing():
    sae = sae_jax.relu(D_IN, D_SAE)
    params = sae.init(jax.random.key(0))
    params["b_enc"] = jnp.full(D_SAE, -100.0)
    import torch

    port = ports.Port("linear", torch.nn.Linear, {}, {"in_features": 2, "out_features": 2})
    with pytest.raises(sae_jax.InputError, match="no latent is active"):
        ports.compare_port(sae, params, port, np.ones((4, D_IN)))


def test_where_trajectories_part_by_hand():
    bounds = dict.fromkeys(("forward", "trained"), 0.1)
    report = Report(
        "float64", 3, {"forward": {"f": 0.0}}, bounds, None, {"a": [0.1, 0.2, 0], "b": [0, 0.3, 0]}
    )
    assert report.parted == (2, "b")
    assert not report.ok, "though it ends within the bound"
    assert report._replace(trajectory={"a": [0.0, float("nan")]}).parted == (2, "a")
    assert report._replace(trajectory={"a": [0.1, 0.1]}).parted is None
    assert report._replace(trajectory=None).ok


class Page(HTMLParser):
    """Tags, text outside scripts, cells by the id of their table, and the page's JSON."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self.tables, self.rows = [], "", [], {}, []
        self.feed(text)
        self.plots = json.loads(self.scripts[1], parse_constant=pytest.fail)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        elif tag == "table":
            self.rows = self.tables.setdefault(dict(attrs).get("id"), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts[-1] += data
            return
        self.text += data
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data
