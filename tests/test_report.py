"""The report: what it says, and that nothing a stranger named can make it do anything."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mvcr_cli import config, records
from mvcr_cli.engine import metrics
from mvcr_cli.errors import CheckpointError, InputMissing
from mvcr_cli.paths import display_name
from mvcr_cli.report.html import POLICY, write_report
from mvcr_cli.report.plots import _numbers, confusion_png
from mvcr_cli.report.run_files import read_run
from mvcr_cli.report.sections import data as data_section
from mvcr_cli.report.svg import Series, line_chart

HOSTILE = (
    "--help",
    "a\nb\tc",
    "\x1b[31mred\x1b[0m\x07",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "javascript:alert(1)",
    "http://evil.example/x.png",
    "\u202eevil\u2066",
    "zero\u200bwidth",
    "=cmd|' /C calc'!A0",
    "{0}{body}%s",
    "猫と犬",
    "cafe\u0301",
    "שלום",
    "lone\ud800",
    "x" * 240,
    "&amp;<!--",
    "😀",
    "]]></style>",
    "",
)
SECRETS = ("/home", "alice", "Users")


def evaluation(names, *, n: int = 40, seed: int = 0) -> records.EvalReport:
    """A plausible evaluation with random mistakes, made by the real metrics."""
    rng = np.random.default_rng(seed)
    k = len(names)
    labels = np.repeat(np.arange(k), n)
    logits = rng.normal(size=(len(labels), k)) + (1.0 + np.log(k)) * np.eye(k)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confusion = metrics.confusion_matrix(labels, probabilities.argmax(axis=1), k)
    return records.EvalReport(
        run="/home/alice/runs/demo",
        data="/home/alice/pictures/val",
        images=len(labels),
        top1=metrics.wilson(int(confusion.trace()), len(labels)),
        top5=metrics.wilson(int(5 * k), int(5 * k)) if k > 5 else None,
        balanced_accuracy=metrics.balanced_accuracy(confusion),
        macro_f1=metrics.macro_f1(confusion),
        auroc=metrics.auroc(probabilities, labels),
        loss=metrics.log_loss(probabilities, labels),
        calibration_error=metrics.calibration_error(probabilities, labels),
        classes=metrics.class_reports(confusion, names),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        missing_classes=(),
        skipped=0,
        seconds=3.0,
    )


def epoch_report(epoch: int, epochs: int) -> records.EpochReport:
    done = epoch / epochs
    return records.EpochReport(
        epoch=epoch,
        epochs=epochs,
        step=100 * epoch,
        size_px=64 if done < 0.4 else 96 if done < 0.7 else 128,
        lr=1e-3 * (1 - done) + 1e-6,
        train_loss=2.2 * 0.9**epoch + 0.4,
        val_loss=2.0 * 0.88**epoch + 0.5 + 0.02 * (epoch % 3),
        val_accuracy=0.93 - 0.6 * 0.85**epoch,
        best_accuracy=0.93 - 0.6 * 0.85**epoch,
        images_per_second=410.0 - epoch,
        seconds=12.5,
        cpu_seconds=2.0,
        left_seconds=None,
    )


def write_run(run: Path, names, *, epochs: int = 24) -> Path:
    """A finished run folder as training leaves it."""
    run.mkdir(parents=True)
    train = config.TrainConfig(data=Path("/home/alice/pictures"), run=run, model="mvcr14n", epochs=epochs, imgsz=128)
    model = config.ModelConfig(name="mvcr14n", classes=len(names), block="basic", depths=(1, 2, 2, 1), width=32)
    values = {
        "mvcr": "0.1.0",
        "train": train.to_dict() | {"weights": "/home/alice/w.safetensors", "batch": 32, "lr": 0.001},
        "model": model.to_dict() | {"scales": [1.0, 0.5]},
        "preprocess": {"size": 128, "fit": "pad", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "classes": list(names),
        "findings": [
            {"code": "corrupt", "count": 3, "detail": "/home/alice/pictures/cat/1.jpg, cat/2.jpg and cat/3.jpg"},
            {"code": "leak", "count": 2, "detail": "~/x/dog.jpg = C:\\Users\\alice\\dog.jpg"},
        ],
        "environment": {"torch": "2.14.1", "python": "3.13.1"},
    }
    summary = records.TrainReport(
        run=str(run),
        best_accuracy=0.918,
        best_epoch=epochs,
        last_accuracy=0.918,
        epochs=epochs,
        steps=100 * epochs,
        seconds=754.0,
        stopped_by="finished",
        train_images=3200,
        val_images=40 * len(names),
        skipped=3,
        peak_rss_mb=1430.0,
    )
    lines = [json.dumps(records.record(epoch_report(epoch, epochs))) for epoch in range(1, epochs + 1)]
    (run / "config.json").write_text(json.dumps(values))
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    split = {"train": [["a", 0, "x"]] * 3200, "val": [["b", 0, "y"]] * 400}
    (run / "split.json").write_text(json.dumps({"classes": list(names), "root": "/home/alice/pictures", **split}))
    (run / "eval.json").write_text(json.dumps(records.record(evaluation(names))))
    (run / "summary.json").write_text(json.dumps(records.record(summary)))
    return run


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text between them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def report_of(run: Path) -> tuple[str, Page]:
    source = write_report(run).read_text(encoding="utf-8")
    return source, Page(source)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs" / "demo-1", ["ant", "bee", "cat", "dog", "eel", "fox"])


def test_says_the_headline_and_how_to_use_the_run(run):
    evaluation = json.loads((run / "eval.json").read_text())
    _, page = report_of(run)
    for score in ("value", "low", "high"):
        assert f"{100 * evaluation['top1'][score]:.1f}\u202f%" in page.text
    for word in ("macro_f1", "auroc"):
        assert f"{evaluation[word]:.3f}" in page.text
    for command in ("predict img.jpg", "eval ./test", "export --format onnx"):
        assert f"mvcr {command} --run runs/demo-1" in page.text
    for part in ("12 min 34 s", "1,430 MB", "3,200", "corrupt", "mvcr14n", "weight_decay", "w.safetensors", "2.14.1"):
        assert part in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 5


def assert_inert(source: str, page: Page) -> None:
    assert {tag for tag, _ in page.tags}.isdisjoint(
        {"script", "iframe", "object", "embed", "link", "base", "form", "a", "image", "use", "foreignobject"}
    )
    policies = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [POLICY] == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for _, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            assert name not in ("href", "srcset", "xlink:href")
            assert name != "src" or value.startswith("data:image/png;base64,")
            assert "url(" not in (value or "") if name == "style" else True
    style = source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert all(char.isprintable() or char in "\n\u202f" for char in source)


@pytest.mark.parametrize("repeat", [1, 4])
def test_hostile_names_are_inert(tmp_path, repeat):
    names = [name + "'" * k for k in range(repeat) for name in HOSTILE]
    run = write_run(tmp_path / "runs" / "<b onclick=x>\x1b[31m\u202e$(id)", names)
    values = json.loads((run / "config.json").read_text())
    values["findings"] += [{"code": name, "count": 1, "detail": name} for name in HOSTILE]
    values["environment"] |= {name: name for name in HOSTILE}
    values["mvcr"] = values["model"]["name"] = values["train"]["model"] = HOSTILE[4]
    (run / "config.json").write_text(json.dumps(values))
    source, page = report_of(run)
    assert_inert(source, page)
    for name in HOSTILE:
        assert display_name(name, 80) in page.text
    assert "--run 'runs/<b onclick=x>" in page.text


def test_names_no_folder_and_no_user(run):
    source, page = report_of(run)
    assert_inert(source, page)
    for secret in (*SECRETS, str(run.parent.parent)):
        assert secret not in source
    assert "cat/1.jpg, cat/2.jpg and cat/3.jpg" in page.text
    assert "dog.jpg = dog.jpg" in page.text


def test_findings_begin_at_the_class_whatever_the_data_are_called(run):
    values = json.loads((run / "config.json").read_text())
    text = "pictures with two labels: 1, for example a b/cat/1.jpg = a b/a/2.jpg"
    values["findings"] = [{"code": "conflict", "count": 1, "detail": text}]
    values["train"] |= {"data": "a b", "val": "a"}
    (run / "config.json").write_text(json.dumps(values))
    _, page = report_of(run)
    told = "The same pictures have two labels, and one of them is wrong. For example cat/1.jpg = a/2.jpg"
    assert told in page.text and "pictures with two labels: " not in page.text


def test_commands_name_the_run(run, tmp_path):
    for folder, option in (("runs/r1", "runs/r1"), ("deep/down/r1", "PATH/TO/r1")):
        shutil.copytree(run, tmp_path / "other" / folder)
        _, page = report_of(tmp_path / "other" / folder)
        assert f"mvcr predict img.jpg --run {option}" in page.text


def test_f1_has_one_form(run):
    report = evaluation(["cat", "dog"])
    (run / "eval.json").write_text(json.dumps(records.record(report)))
    _, page = report_of(run)
    assert all(f"{one.f1:.3f}" in page.text for one in report.classes)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("eval.json", "No evaluation is stored"),
        ("summary.json", "Training has not finished"),
        ("metrics.jsonl", "No epoch has been recorded"),
        ("split.json", "validation pictures"),
    ],
)
def test_a_missing_record_is_a_sentence(run, missing, sentence):
    (run / missing).unlink()
    source, page = report_of(run)
    assert_inert(source, page)
    assert sentence in page.text


def test_a_run_that_has_only_begun_has_a_report(run):
    for name in ("eval.json", "summary.json", "metrics.jsonl", "split.json"):
        (run / name).unlink()
    (run / "config.json").write_text("{}")
    assert_inert(*report_of(run))


def test_the_data_are_counted_and_nothing_else(run):
    names = re.findall(r'<p class="name">([^<]*)</p>', data_section(read_run(run)))
    assert names == ["training pictures", "validation pictures", "skipped"]


def test_a_folder_without_config_is_no_run(tmp_path):
    with pytest.raises(InputMissing, match=r"config\.json"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "eval.json", "summary.json", "split.json"])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 100_000, '"text"', '{"classes": 1, "findings": 2, "train": 3}']
)
def test_a_record_that_is_not_ours_is_refused_and_nothing_is_written(run, name, content):
    (run / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("confusion", [[], [[1]], [[1] * 6] * 5, [[1] * 5] * 6, [[1] * 5 + [-1]] * 6, [["x"] * 6] * 6])
def test_a_confusion_matrix_of_other_classes_is_refused(run, confusion):
    values = json.loads((run / "eval.json").read_text())
    values["confusion"] = confusion
    (run / "eval.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"eval\.json"):
        write_report(run)


def test_an_evaluation_from_before_a_field_was_recorded_is_shown(run):
    values = json.loads((run / "eval.json").read_text())
    for name in ("ignored", "trained_on", "views"):
        del values[name]
    (run / "eval.json").write_text(json.dumps(values))
    assert read_run(run).evaluation.views == "all"
    assert_inert(*report_of(run))


def test_half_a_last_line_is_no_epoch_and_a_repeated_epoch_counts_once(run):
    text = (run / "metrics.jsonl").read_text()
    before = write_report(run).read_bytes()
    (run / "metrics.jsonl").write_text(text + text.splitlines()[-1] + "\n" + text[:40])
    assert write_report(run).read_bytes() == before
    (run / "metrics.jsonl").write_text(text[:40] + "\n" + text)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        write_report(run)


def test_a_loss_that_was_not_finite_leaves_a_gap(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[5] |= {"train_loss": None, "val_loss": None, "val_accuracy": None}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source, _ = report_of(run)
    assert "nan" not in source


def test_a_line_chart_keeps_its_values_inside():
    values = [3.0, float("nan"), 1.0, 1.0]
    chart = line_chart("x", [1, 2, 3, 4], [Series("loss", "main", values)], "{:.1f}".format, best=3)
    path = re.search(r'class="main" d="([^"]*)"', chart)[1]
    assert path.count("M") == 2
    numbers = [float(number) for number in re.findall(r"[\d.]+", path)]
    assert all(0 <= x <= 430 for x in numbers[::2])
    assert all(0 <= y <= 220 for y in numbers[1::2])
    assert "<title>loss, epoch 3: 1.0</title>" in chart


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [float("nan")], [-1e-300, 1e300], []])
def test_a_line_chart_of_strange_values_is_finite(values):
    chart = line_chart("x", list(range(1, len(values) + 1)), [Series("y", "main", values)], str)
    assert "nan" not in chart
    assert "inf" not in chart


@pytest.mark.parametrize("classes", [1, 2, 20, 21, 60, 61, 1300])
def test_confusion_png_of_any_size_is_a_clean_picture(classes):
    confusion = np.eye(classes, dtype=np.int64) * 7
    names = [HOSTILE[k % len(HOSTILE)] + str(k) for k in range(classes)]
    data = confusion_png(confusion, names)
    assert data == confusion_png([list(row) for row in confusion.tolist()], names)
    image = Image.open(BytesIO(data))
    image.load()
    assert (image.format, image.mode) == ("PNG", "RGB")
    assert image.info == {}
    assert max(image.size) < 2600


def test_confusion_png_leaves_empty_cells_empty():
    counts = np.array([[9, 0], [0, 9]])
    page = Image.new("RGB", (200, 200), "white")
    _numbers(ImageDraw.Draw(page), counts, 100, 0, 0)
    ink = np.asarray(page).min(2) < 255
    assert not ink[:100, 100:].any() and not ink[100:, :100].any()
    _numbers(ImageDraw.Draw(page), counts + 1, 100, 0, 0)
    assert (np.asarray(page).min(2) < 255)[:100, 100:].any()


def test_confusion_png_shades_by_share_of_the_row():
    def commonest(confusion):
        image = Image.open(BytesIO(confusion_png(confusion, ["a", "b"])))
        return {colour for _, colour in sorted(image.getcolors(1 << 20), reverse=True)[:3]}

    assert commonest([[9, 1], [0, 0]]) == commonest([[90, 10], [0, 0]]) == commonest([[9, 1], [90, 10]])
    assert commonest([[9, 1], [0, 0]]) != commonest([[8, 2], [0, 0]])
    assert (8, 48, 107) in commonest([[5, 0], [0, 0]])
