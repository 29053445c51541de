"""The report folder: what the page shows, that it needs no network, and that it can be written again."""

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from matplotlib.image import imread

from lightning_prune.recovery.gap import Effort, HeldOutLoss, Measurement, RecoveryReport
from lightning_prune.report.page import check_requirements, write_report


def whole_picture(content):
    """Return a PNG as (rows, columns, 4) numbers in [0, 1]; one that is cut off or empty cannot be read."""
    return imread(io.BytesIO(content), format="png")


VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collect tables as lists of rows, images, attributes that load something, and check that tags nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tables, self.alts, self.images, self.references, self.words = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.references += [attrs[name] for name in ("src", "href", "srcset", "action") if name in attrs]
        if tag == "img":
            self.alts.append(attrs["alt"])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def row(self, name):
        return next(row[1:] for table in self.tables for row in table if row[0] == name)

    @property
    def text(self):
        return " ".join(self.words)


def target(name, shape, num_zeros):
    num_weights = shape[0] * shape[1]
    return {
        "name": name,
        "shape": list(shape),
        "num_weights": num_weights,
        "num_zeros": num_zeros,
        "sparsity": num_zeros / num_weights,
    }


def make_report(targets, *, step=600, total=4000):
    weights = sum(item["num_weights"] for item in targets)
    zeros = sum(item["num_zeros"] for item in targets)
    return {
        "step": step,
        "sparsity": zeros / weights,
        "model_sparsity": zeros / total,
        "num_parameters": total,
        "num_nonzeros": total - zeros,
        "num_bytes": 4 * total,
        "num_bytes_nonzero": 4 * (total - zeros),
        "flops_per_token": 2 * weights,
        "flops_per_token_nonzero": 2 * (weights - zeros),
        "notes": ["tied weights are counted once"],
        "targets": targets,
    }


TARGETS = [
    target("model.layers.0.mlp.up_proj.weight", (16, 64), 512),
    target("model.layers.1.mlp.up_proj.weight", (16, 64), 768),
]
HISTORY = [
    {"step": 10, "loss": 4.0},
    {"step": 20, "loss": 3.0, "sparsity": 0.25},
    {"step": 30, "loss": 2.5, "sparsity": 0.625},
]


def evaluation(label, step, zeros, perplexity, accuracy):
    summary = make_report([target("t", (32, 64), zeros)], step=step)
    del summary["targets"]
    results = {
        "heldout": {"word_perplexity,none": perplexity, "alias": "heldout"},
        "cloze": {"acc,none": accuracy, "acc_stderr,none": 0.0132},
    }
    return {"label": label, "step": step, "report": summary, "results": results}


EVALUATIONS = [evaluation("before", 0, 0, 10.0, 0.6), evaluation("after", 600, 1280, 12.5, 0.45)]


def write(folder, **changes):
    options = {
        "report": make_report(TARGETS),
        "history": HISTORY,
        "evaluations": EVALUATIONS,
        "recipe_text": "prune:\n  schedule: {sparsity: 0.625}\n",
        "notes": ["pruning was held at step 320"],
        "versions": {"torch": "9.8.7"},
    } | changes
    path = write_report(folder, **options)
    return Page(path.read_text(encoding="utf-8"))


def test_before_and_after_holds_the_model_and_every_metric(tmp_path):
    page = write(tmp_path)
    # by hand: 1280 zeros of 2048 target weights, of 4000 parameters in float32
    assert page.row("Sparsity of the targets") == ["0.00 %", "62.50 %", ""]
    assert page.row("Sparsity of the model") == ["0.00 %", "32.00 %", ""]
    assert page.row("Non-zero parameters") == ["4.00 k", "2.72 k", "-32.0 %"]
    assert page.row("Size of non-zero values") == ["16.0 kB", "10.9 kB", "-32.0 %"]
    assert page.row("FLOPs per token, zeros left out") == ["4.10 k", "1.54 k", "-62.5 %"]
    assert page.row("word_perplexity") == ["10.00", "12.50", "+25.0 %"]
    assert [re.sub(r"\s+", " ", cell) for cell in page.row("acc")] == [
        "0.6000 \u00b1 0.0132",
        "0.4500 \u00b1 0.0132",
        "-25.0 %",
    ]


def test_page_shows_targets_recipe_versions_and_notes(tmp_path):
    page = write(tmp_path)
    assert page.row("model.layers.1.mlp.up_proj.weight") == ["16 x 64", "1,024", "768", "75.00 %"]
    assert page.row("torch") == ["9.8.7"]
    assert "schedule: {sparsity: 0.625}" in page.text
    assert "pruning was held at step 320" in page.text
    assert "tied weights are counted once" in page.text
    assert "After 600 optimizer steps." in page.text


def test_page_needs_no_network(tmp_path):
    page = write(tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//\w|url\(|@import|<script|<link", text)
    assert len(page.references) == 4
    for reference in page.references:
        kind, data = reference.split(",", 1)
        assert kind == "data:image/png;base64"
        assert whole_picture(base64.b64decode(data, validate=True)).std() > 0.01  # not one even surface
    assert all(len(alt) > 30 for alt in page.alts)
    assert "sparsity from 25.00 % to 62.50 %; loss from 4.000 to 2.500" in page.alts[0]


def test_folder_holds_json_and_plots(tmp_path):
    write(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["history.png", "index.html", "layers.png", "report.json"]
    for name in ("history.png", "layers.png"):
        height, width, _ = whole_picture((folder / name).read_bytes()).shape
        assert width >= 600
        assert height >= 200
    record = json.loads((folder / "report.json").read_text())
    assert record["report"]["targets"] == TARGETS
    assert record["history"] == HISTORY
    assert record["evaluations"] == EVALUATIONS
    assert record["notes"] == ["pruning was held at step 320", "tied weights are counted once"]
    assert record["versions"] == {"torch": "9.8.7"}


def test_everything_from_outside_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>\"&$x^2$"
    report = make_report([target(evil, (4, 4), 8)])
    evaluations = [{"label": evil, "step": 1, "report": report, "results": {evil: {evil: 1.0}}}]
    page = write(
        tmp_path, report=report, evaluations=evaluations, recipe_text=evil, notes=[evil], versions={evil: evil}
    )
    assert "<script" not in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.row(evil)
    assert page.text.count(evil) >= 5


def test_rewriting_shows_the_new_state_and_leaves_nothing_aside(tmp_path):
    write(tmp_path, report=make_report(TARGETS[:1], step=300))
    page = write(tmp_path)
    assert "After 600 optimizer steps." in page.text
    assert len(list(tmp_path.iterdir())) == 4


def test_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    write(tmp_path)
    old = (tmp_path / "index.html").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, notes=["new"])
    assert (tmp_path / "index.html").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 4


def test_without_history_and_evaluations_the_page_says_so(tmp_path):
    page = write(tmp_path, report=make_report(TARGETS, step=0), history=[], evaluations=[])
    assert "nothing to plot" in page.text
    assert "No optimizer step taken." in page.text
    assert page.tables[0][0] == ["", "Dense", "Now", "Change"]
    assert page.row("Non-zero parameters") == ["4.00 k", "2.72 k", "-32.0 %"]
    assert not (tmp_path / "history.png").exists()
    assert len(page.references) == 2


def test_evaluations_between_are_listed(tmp_path):
    middle = evaluation("step 200", 200, 640, 11.0, 0.5)
    page = write(tmp_path, evaluations=[EVALUATIONS[0], middle])
    assert page.row("step 200")[:3] == ["200", "31.25 %", "11.00"]
    assert page.row("word_perplexity") == ["10.00", "-", "-"]


def test_numbers_that_are_not_finite_stay_readable(tmp_path):
    history = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 3.0}, {"step": 3, "loss": 2.0}]
    evaluations = [EVALUATIONS[0], evaluation("after", 600, 1280, float("inf"), 0.5)]
    page = write(tmp_path, history=history, evaluations=evaluations)
    assert page.row("word_perplexity") == ["10.00", "inf", "-"]
    assert json.loads((tmp_path / "report.json").read_text())["history"][0] == {"step": 1, "loss": None}


def test_versions_default_to_the_installed_ones(tmp_path):
    import torch

    page = write(tmp_path, versions=None)
    assert page.row("torch") == [torch.__version__]
    assert page.row("python") == [".".join(map(str, sys.version_info[:3]))]


def test_missing_matplotlib_is_said_at_once(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'needs matplotlib: pip install "lightning_prune\[report\]"'):
        check_requirements()
    with pytest.raises(ImportError, match="matplotlib"):
        write(tmp_path / "report")
    assert not (tmp_path / "report").exists()


def recovery_report(**changes):
    def moment(nats, accuracy):
        loss = HeldOutLoss(nats=nats, num_tokens=4096, data="stories & tales")
        return Measurement(loss=loss, results={"cloze": {"acc": accuracy, "acc_stderr": 0.01}})

    options = {"before": moment(1.5, 0.6), "pruned": moment(2.5, 0.595), "recovered": moment(1.75, 0.597)}
    effort = Effort(num_trained=100, num_parameters=4000, num_tokens=8192, seconds=93.0)
    return RecoveryReport(**options | {"effort": effort} | changes).as_dict()


def test_recovery_has_a_section_of_its_own(tmp_path):
    recovery = recovery_report()
    page = write(tmp_path, recovery=recovery)
    assert page.row("Loss, nats per token") == ["1.500", "2.500", "1.750", "75.00 %"]
    assert page.row("cloze: acc") == ["0.6000", "0.5950", "0.5970", "-"]
    assert "Trained 100 of 4.00 k parameters (2.50 %) on 8.19 k tokens in 93 s." in page.text
    assert "Loss on 4.10 k tokens of stories & tales." in page.text
    assert "the gap of 0.005 does not exceed its noise of 0.014 (cloze: acc)" in page.text
    assert any("loss: 75.00 % of the gap recovered" in alt for alt in page.alts)
    assert whole_picture((tmp_path / "recovery.png").read_bytes()).std() > 0.01
    assert json.loads((tmp_path / "report.json").read_text())["recovery"] == recovery


def test_recovery_that_began_without_the_dense_model(tmp_path):
    page = write(tmp_path, recovery=recovery_report(before=None, effort=None))
    assert page.row("Loss, nats per token") == ["-", "2.500", "1.750", "-"]
    assert "not measured before pruning" in page.text
    assert "Trained" not in page.text


def test_recovery_without_any_measurement_says_so(tmp_path):
    page = write(tmp_path, recovery=RecoveryReport().as_dict())
    assert "No moment was measured twice" in page.text
    assert not (tmp_path / "recovery.png").exists()
