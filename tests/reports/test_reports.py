"""The page and the Markdown: escaped, self-contained, and saying the same numbers."""

import base64
import io
import re
import wave
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mmtune.evaluation.comparison import ScoredRow, compare
from mmtune.media.load import load_audio
from mmtune.records import Medium, history
from mmtune.reports.extras import extra_tables
from mmtune.reports.facts import training_facts
from mmtune.reports.markdown import escape, write_markdown
from mmtune.reports.page import write_page
from mmtune.reports.plots import loss_plot, marks_of, ticks
from mmtune.reports.samples import Shown, choose_rows, make_sample
from mmtune.reports.shown_media import picture
from mmtune.reports.tables import perplexity_rows, table_rows
from mmtune.reports.wording import answers_said, headline, rows_said

EVIL = "<img src=x onerror=alert(1)> \"' & | `x` {{ 7*7 }}"


def make_report(models=("base", "tuned"), count=40):
    rows = [
        ScoredRow(
            f"r{n}",
            EVIL if n % 2 else "plain",
            "vqa",
            f"g{n}",
            ("exact_match",),
            ("yes",),
            metadata={"answer_type": "a"},
        )
        for n in range(count)
    ]
    answers = {"base": ["no"] * count, "tuned": ["yes" if n % 4 else "no" for n in range(count)]}
    found = compare(rows, {model: answers[model] for model in models}, resamples=200)
    return {
        "run": {
            "title": EVIL,
            "model": "some/model",
            "split": "test",
            "split_rows": count + 2,
            "answer": "generate",
            "with_options": 0,
            "compare": list(models),
            "pair": list(models) if len(models) == 2 else None,
            "max_new_tokens": 8,
            "bootstrap": 200,
            "seed": 0,
        },
        "n": count,
        "read": count + 2,
        "rejected": {"too_long": 2},
        "metrics": found.metrics,
        "groups": found.groups,
        "perplexity": None,
        "training": {"method": EVIL},
        "manifests": [{"stage": "finetune", "hash": "ab" * 32, "rows": {"train": 5}, "drops": {}, "seconds": 1.0}],
        "notes": [EVIL],
    }


def sample(root, answer=EVIL, searched=EVIL):
    shown = Shown("r1", "g1", "exact_match", (0.0, 100.0), True, ("yes", "yes", EVIL))
    return make_sample(
        shown,
        "won",
        (EVIL, searched),
        [Medium("image", "a.png"), Medium("audio", "b.wav")],
        {"base": answer, "tuned": "yes"},
        root,
    )


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br", "link", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


@pytest.fixture
def root(tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    return tmp_path


def test_page_escapes_everything_and_asks_for_nothing(root):
    losses = [{"step": step, "loss": 3.0 / step, "val_loss": 4.0 / step} for step in range(1, 20)]
    page = write_page(make_report(), [sample(root)], losses)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not any(name.startswith("on") for _, attributes in tags.seen for name in attributes)
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "iframe", "link", "object", "form", "base"}
    sources = [attributes["src"] for tag, attributes in tags.seen if tag == "img"]
    assert len(sources) == 1 and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|url\(|@import", page)
    policy = next(attributes["content"] for tag, attributes in tags.seen if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    assert "7*7" in page and "&lt;img src=x onerror" in page and "b.wav" in page
    assert "yes ×2" in page and "prefers-color-scheme: dark" in page
    legend = "</i>validation loss"
    assert legend in page
    assert legend not in write_page(make_report(), [], [{"step": row["step"], "loss": row["loss"]} for row in losses])


def test_page_without_pictures_training_or_metrics(root):
    report = {**make_report(), "metrics": {}, "groups": {}, "training": None, "rejected": {}, "notes": []}
    tags = Tags()
    tags.feed(write_page(report))
    assert tags.open == []
    assert "nothing was scored" in write_markdown(report)
    alone = make_report(models=("tuned",))
    tags.feed(write_page(alone, []))
    assert tags.open == [] and "of the tuned model is 75.00" in headline(alone)


def test_markdown_says_the_same_and_stays_one_table():
    report = make_report()
    text = write_markdown(report)
    row = next(line for line in text.splitlines() if line.startswith("| Exact match"))
    assert "| 0.00 | 75.00 | **+75.00** |" in row and "30 / 0" in row and "< 0.001" in row
    assert headline(report).startswith("Tuning raised exact match from 0.00 to 75.00")
    assert escape("a|b\n<c>") == "a\\|b \\<c\\>"
    for line in text.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) in (9, 5)
    head, rows = table_rows(report)
    assert {len(cells) for cells in rows} == {len(head)}


def test_shown_rows_are_not_chosen_by_merit():
    rows = [Shown(f"r{n}", f"g{n // 3}", "m", (0.0, 100.0), True, ()) for n in range(30)]
    rows += [Shown(f"x{n}", f"x{n}", "m", (0.0, 10.0), True, ()) for n in range(30)]
    chosen = choose_rows(rows, each=12)["won"]
    assert len(chosen) == 12 == len({rows[at].group for at in chosen})
    assert {rows[at].scores[1] for at in chosen} == {10.0, 100.0}
    assert choose_rows(rows, each=12) == {"won": chosen}
    assert choose_rows(rows, each=12, seed=1) != {"won": chosen}
    kinds = choose_rows(
        [
            Shown("a", "a", "m", (50.0, 0.0), True, ()),
            Shown("b", "b", "m", (0.0, 0.0), True, ()),
            Shown("c", "c", "m", (100.0, 100.0), True, ()),
            Shown("d", "d", "", (None, None), True, ()),
            Shown("e", "e", "wer", (20.0, 10.0), False, ()),
        ]
    )
    assert kinds == {"won": [4], "lost": [0], "missed": [1]}


def test_a_row_names_the_searched_prompts_words_and_its_histories(root):
    assert "the searched prompt asks" not in write_page(make_report(), [sample(root)])
    assert "the searched prompt asks: Say &lt;it&gt;." in write_page(
        make_report(), [sample(root, searched="Say <it>.")]
    )
    shown = Shown("r1", "g1", "exact_match", (0.0, 100.0), True, ("yes",))
    past = [history([str(at) for at in range(12)]), history(["7"])]
    told = make_sample(shown, "won", ("?", "?"), past, {"base": "a", "tuned": "b"}, root).other_media
    assert told == ("history 1: ..., 2, 3, 4, 5, 6, 7, 8, 9, 10, 11", "history 2: 7")
    assert make_sample(shown, "won", ("?", "?"), past[1:], {"base": "a", "tuned": "b"}, root).other_media == (
        "history: 7",
    )


def test_pictures_are_small_and_a_missing_one_is_left_out(root):
    assert picture(root, Medium("image", "gone.png")) == ""
    assert picture(root, Medium("image", "../a.png")) == ""
    assert picture(root, Medium("image", "a.png")).startswith("data:image/png;base64,")
    Image.effect_noise((1200, 900), 60).save(root / "big.png")
    uri = picture(root, Medium("image", "big.png"))
    assert uri.startswith("data:image/jpeg;base64,") and len(uri) < 40_000


def test_loss_plot_takes_odd_logs():
    assert loss_plot([]) == "" and loss_plot([{"step": 1, "loss": 2.0}]) == ""
    plot = loss_plot(
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}, {"step": 3}]
    )
    assert plot.count("<polyline") == 1 and "nan" not in plot
    assert ticks(0.0, 2.5) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert ticks(0.0, 0.0) == [0.0, 1.0]


def test_training_facts_leave_out_what_is_unknown():
    found = training_facts(
        {"lora": {"r": 4, "alpha": 8.0}, "train": ["llm"], "learning_rate": 1e-4},
        {"method": "lora", "towers": {"llm": {"trainable": 1200}}, "loss": 0.5, "val_loss": None},
        10,
        2.0,
    )
    assert found["method"] == "LoRA, r 4, alpha 8" and found["trained parameters"] == "1,200"
    assert "validation loss" not in found and "steps" not in found
    assert "parts of that loss" not in found
    named = {name: training_facts({}, {"method": name}, 0, None)["method"] for name in ("full", "prompt", "prefix")}
    assert named == {"full": "all weights", "prompt": "prompt tuning", "prefix": "prefix tuning"}


def test_training_facts_tell_the_parts_of_an_auxiliary_loss():
    parts = {"loss_mixture": 0.29268, "loss_alone_image": 0.48034, "loss_alone_joint": 0.2}
    facts = {"method": "full", "loss": 0.3, "auxiliary_loss": 0.25, "loss_parts": parts}
    found = training_facts({}, facts, 0, None)
    said = "0.75 × mixture 0.2927, 0.25 × the mean of each pass alone (image 0.4803, joint 0.2000)"
    assert found["last training loss"] == "0.3000" and found["parts of that loss"] == said
    whole = training_facts({}, {**facts, "auxiliary_loss": 1.0}, 0, None)
    assert whole["parts of that loss"] == "1 × the mean of each pass alone (image 0.4803, joint 0.2000)"


def test_tables_of_what_answers_rest_on_are_the_same_everywhere(root):
    weight, perplexity = {"value": 0.9, "low": 0.85, "high": 0.95}, {"value": 2.5, "low": 2.0, "high": 3.0}
    joint = {"n": 40, "weight": weight, "perplexity": perplexity}
    entry = {
        "name": EVIL,
        "kind": "modality",
        "n": 40,
        "metrics": make_report()["metrics"],
        "perplexity": {"models": {"tuned": perplexity, EVIL: perplexity}, "loss_difference": {"p": 0.2}, "n": 40},
    }
    report = {
        **make_report(),
        "fusion": {"tuned": {"branches": {"joint": joint, "image": {**joint, "n": 30}}, "gate_entropy": 0.4}},
        "perplexity": {"models": {"tuned": {**perplexity, "value": 2.25}}, "n": 50, "tokens": 80},
        "ablation": {"model": "tuned", "entries": [entry], "nothing": ["shots"]},
    }
    passes, rests = extra_tables(report)
    assert passes.rows == [
        ["tuned", "joint", "0.900", "0.850 to 0.950", "2.50", "2.00 to 3.00", "40"],
        ["tuned", "image", "0.900", "0.850 to 0.950", "2.50", "2.00 to 3.00", "30"],
        ["tuned", "all, mixed", "", "", "2.25", "2.00 to 3.00", "50"],
    ]
    assert "0.69: all have the same" in passes.note, "ln 2"
    assert len(extra_tables({**report, "perplexity": None})[0].rows) == 2
    assert rests.rows[0][:5] == [EVIL, "Exact match", "0.00", "75.00", "+75.00"] and rests.rows[1][1] == "Perplexity"
    assert "had nothing to take away: shots (no row shows exemplars)." in rests.note and "tuned 0.40" in passes.note
    page, text = write_page(report, [sample(root)]), write_markdown(report)
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and sum(tag == "img" for tag, _ in tags.seen) == 1
    for shown in (page, text):
        assert all(cell in shown for cell in (*passes.rows[0], rests.title, "+75.00"))
    assert extra_tables(make_report()) == []


def test_the_interval_of_several_answerers_is_that_of_the_last_and_says_so():
    models = {
        name: {"value": value, "low": value - 1, "high": value + 1}
        for name, value in (("base", 10.0), ("best_prompt", 20.0), ("tuned", 90.0))
    }
    entry = {"n": 5, "models": models, "higher_is_better": True}
    report = {"metrics": {"accuracy": entry}, "groups": {}, "run": {"compare": list(models)}}
    head, (row,) = table_rows(report)
    assert head[-2] == "95 % interval of tuned" and row[-2] == "89.00 to 91.00"
    one = {
        **report,
        "metrics": {"accuracy": {**entry, "models": {"base": models["base"]}}},
        "run": {"compare": ["base"]},
    }
    assert table_rows(one)[0][-2] == "95 % interval"


def shown_with_exemplars(split="val"):
    """A report of a vote, and of base and tuned without and with exemplars, on 40 rows."""
    report = make_report()
    rows = [ScoredRow(f"r{n}", "plain", "vqa", f"g{n}", ("exact_match",), ("yes",)) for n in range(40)]
    ways = ("", ", 2 random", ", 4 retrieval")
    right = {"vote, 4 retrieval": 40, **{f"base{way}": 5 * at for at, way in enumerate(ways)}}
    right |= {f"tuned{way}": 20 + 5 * at for at, way in enumerate(ways)}
    texts = {name: ["yes"] * count + ["no"] * (40 - count) for name, count in right.items()}
    pairs = [(f"base{way}", f"tuned{way}") for way in reversed(ways)]
    found = compare(rows, texts, pairs=pairs, resamples=200)
    run = {**report["run"], "split": split, "compare": list(texts), "pair": list(pairs[0])}
    return {**report, "run": run, "metrics": found.metrics, "groups": found.groups}


def test_the_headline_is_tuning_at_equal_exemplars():
    report = shown_with_exemplars()
    said = headline(report)
    assert said.startswith("Tuning (4 retrieval exemplars) raised exact match from 25.00 to 75.00, a difference of +50")
    assert "on 40 held-out rows" in said
    (compared,) = extra_tables(report)
    assert [row[:3] for row in compared.rows] == [
        [f"tuned{way}", f"base{way}", "+50.00"] for way in (", 4 retrieval", ", 2 random", "")
    ]
    for shown in (write_page(report), write_markdown(report)):
        assert all(cell in shown for row in compared.rows for cell in row[:4]) and compared.title in shown
    assert '<div class="finding better">' in write_page(report)


def test_the_headline_says_what_the_exemplars_alone_would_answer():
    said = headline(shown_with_exemplars())
    assert said.endswith(
        " The exemplars' majority alone ('vote, 4 retrieval') scores 100.00, more than the best model (75.00)."
    )


def test_rows_too_few_for_any_outcome_are_no_missing_effect():
    few, enough = make_report(count=3), make_report(count=8)
    assert headline(few).startswith("Too few rows to tell: tuning moved exact match from 0.00 to")
    assert headline(enough).startswith("Tuning raised")
    entry = few["metrics"]["exact_match"]
    level = {**entry, "media_groups": 40, "difference": {**entry["difference"], "low": -5.0, "p": 0.4}}
    assert headline({**few, "metrics": {"exact_match": level}}).startswith("No clear effect")
    # Many rows about four pictures: the test has four units, and the sentence says so.
    shared = {"exact_match": {**entry, "n": 40, "media_groups": 4}}
    assert "on 40 held-out rows that share media in 4 groups." in headline({**few, "metrics": shared})
    assert "share media" not in headline(few) and "share media" not in headline(enough)
    # Many rows of which four differ: the interval excludes 0, the test cannot pass.
    level["difference"] = {**level["difference"], "low": 5.0, "p": 0.125}
    assert headline({**few, "metrics": {"exact_match": level}}).startswith("Too few rows to tell")


def test_equal_scores_are_not_said_to_move():
    report = make_report()
    entry = report["metrics"]["exact_match"]
    same = {**entry, "models": {name: {"value": 62.5, "low": 50.0, "high": 75.0} for name in entry["models"]}}
    same["difference"] = {**entry["difference"], "value": 0.0, "low": -5.0, "high": 5.0, "p": 1.0}
    said = headline({**report, "metrics": {"exact_match": same}})
    assert said == (
        "No clear effect: tuning left exact match unchanged at 62.50"
        " (95 % interval of the difference −5.00 to +5.00, p = 1.000) on 40 held-out rows."
    )


def test_groups_of_few_rows_stay_in_the_document():
    report = make_report(count=8)
    report["groups"]["template"] = {
        "one": report["groups"]["source"]["plain"],
        "twice": report["groups"]["source"]["plain"],
    }
    assert report["groups"]["source"]["plain"]["exact_match"]["n"] == 4
    for shown in (write_page(report), write_markdown(report)):
        assert "By source" not in shown and "By template" not in shown
    report["groups"]["template"]["three"] = {"exact_match": report["metrics"]["exact_match"]}
    for shown in (write_page(report), write_markdown(report)):
        assert (
            "By template" in shown
            and "2 lines of fewer than 5 rows in" in shown
            and "three" in shown
            and "twice" not in shown
        )


def test_every_answerer_has_a_mark_of_its_own():
    names = ["vote, 4 retrieval", "base", "tuned", "base, 4 retrieval", "tuned, 4 retrieval", "best_prompt"]
    marks = marks_of(names)
    assert len(set(marks.values())) == len(names)
    assert (
        marks["base"] == "base" and marks["base, 4 retrieval"] == "base hollow" and marks["vote, 4 retrieval"] == "vote"
    )
    assert marks_of(["tuned"]) == {"tuned": "tuned"}
    page = write_page(make_report())
    for mark in marks_of(make_report()["run"]["compare"]).values():
        assert f'<i class="{mark}"></i>' in page and f'<circle class="own {mark}"' in page
    odd = marks_of(['"><script>'])
    assert odd == {'"><script>': "base"}


def test_rows_that_were_trained_on_are_not_called_held_out():
    assert "on 40 training rows." in headline(shown_with_exemplars("train"))


def test_the_report_says_which_rows_and_how_they_were_answered():
    report = make_report()
    assert rows_said(report) == "40 of 42 rows" and answers_said(report) == "greedy, at most 8 new tokens"
    assert rows_said({**report, "n": 42}) == "42 rows"
    run = {**report["run"], "split_rows": 577, "answer": "rank", "with_options": 40}
    ranked = {**report, "run": run}
    for shown in (write_page(ranked), write_markdown(ranked)):
        assert "40 of 42 rows, a sample of 577" in shown and "answers: the likeliest option" in shown
        assert "greedy" not in shown
    learned = {**report, "run": {**run, "answer": "soft", "with_options": report["n"]}}
    assert answers_said(learned) == "the option of the likeliest learned vector"
    some = {**report, "run": {**run, "answer": "prototype", "with_options": 30}}
    said = "the option of the nearest state; 10 rows without options greedy, at most 8 new tokens"
    assert answers_said(some) == said


def test_rows_are_named_by_tuning_only_where_something_was_tuned(root):
    assert "<h3>Better after tuning</h3>" in write_page(make_report(), [sample(root)])
    report = make_report()
    prompted = {**report, "run": {**report["run"], "pair": ["base", "best_prompt"]}}
    prompted["metrics"] = {
        name: {**entry, "models": dict(zip(("base", "best_prompt"), entry["models"].values(), strict=True))}
        for name, entry in report["metrics"].items()
    }
    page = write_page(prompted, [sample(root)])
    assert "<h3>best_prompt better than base</h3>" in page and "after tuning" not in page


def test_many_answerers_stand_below_each_other_and_no_word_is_broken():
    report = shown_with_exemplars()
    report["perplexity"] = {
        "n": 40,
        "tokens": 80,
        "models": {name: {"value": 2.0, "low": 1.5, "high": 2.5} for name in report["run"]["compare"][1:]},
    }
    head, rows = table_rows(report)
    assert head == ["metric", "answers by", "score", "95 % interval", "rows"]
    assert [row[1] for row in rows] == report["run"]["compare"]
    head, losses = perplexity_rows(report["perplexity"])
    assert head == ["answers by", "perplexity", "95 % interval", "rows"]
    assert losses == [[name, "2.00", "1.50 to 2.50", "40"] for name in report["run"]["compare"][1:]]
    assert rows[0][:3] == ["Exact match", "vote, 4 retrieval", "100.00"] and rows[1][:3] == ["", "base", "0.00"]
    assert max(sum(len(cell) + 3 for cell in row) for row in rows) <= 80
    lines = write_markdown(report).splitlines()
    assert "| metric | answers by | score | 95 % interval | rows |" in lines
    assert all(len(line) < 120 for line in lines if line.startswith("|"))


class Cells(HTMLParser):
    """Collects the cells of the first table with what their lines look like."""

    def __init__(self) -> None:
        super().__init__()
        self.lines, self.tables, self.inside = [], 0, False

    def handle_starttag(self, tag, attrs):
        self.tables += tag == "table"
        if tag == "tr" and self.tables == 1:
            self.lines.append((dict(attrs).get("class", ""), []))
        self.inside = tag in {"td", "th"} and self.tables == 1
        if self.inside:
            self.lines[-1][1].append("")

    def handle_data(self, data):
        if self.inside:
            self.lines[-1][1][-1] += data.strip()

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in {"td", "th"}


def test_the_page_has_a_line_per_answerer_and_sets_an_ensemble_off():
    report = make_report()
    rows = [ScoredRow(f"r{n}", "plain", "vqa", f"g{n}", ("exact_match",), ("yes",)) for n in range(40)]
    ways = ("", ", choice_list", ", choice_among", ", choice_flan", ", ensemble")
    names = [f"{model}{way}" for model in ("base", "tuned") for way in ways]
    found = compare(rows, {name: ["yes"] * (4 * at) + ["no"] * (40 - 4 * at) for at, name in enumerate(names)})
    run = {**report["run"], "compare": names, "pair": None}
    report = {**report, "run": run, "metrics": found.metrics, "groups": {}}
    page = write_page(report)
    cells, tags = Cells(), Tags()
    cells.feed(page), tags.feed(page)
    assert tags.open == []
    (_, head), *lines = cells.lines
    assert head == ["metric", "answers by", "score", "95 % interval", "rows", ""]
    assert [texts[-5] for _, texts in lines] == names and lines[0][1][0] == "Exact match"
    assert [texts[-4] for _, texts in lines] == [f"{10 * at:.2f}" for at in range(10)]
    assert [style for style, _ in lines if style] == ["entry", "together", "other-model", "together"]
    assert page.count('<svg class="dots"') == 10, "a plot of one answerer in every line"
    assert 'class="turned"' not in write_page(make_report())


def test_the_report_says_trees_of_rows():
    report = make_report()
    tokens = {"stage": "tokenize", "hash": "cd" * 32, "rows": {"train": 1}, "examples": {"train": 3}, "drops": {}}
    report["manifests"] += [{**tokens, "seconds": 1.0}]
    for shown in (write_page(report), write_markdown(report)):
        assert "train 1 tree of 3 rows" in shown and "train 5" in shown


def test_frames_of_a_clip_and_the_beginning_of_a_sound_are_shown(repository, tmp_path):
    data, answers = repository / "data", {"base": "a", "tuned": "b"}
    clip = next((data / "clips" / "test").glob("*.mp4")).relative_to(data)
    spoken = next((data / "sounds" / "test").glob("*.flac")).relative_to(data)
    whole = load_audio(data, Medium("audio", str(spoken)), 8000)
    shown = Shown("r1", "g1", "exact_match", (0.0, 100.0), True, ("yes",))
    media = [Medium("video", str(clip)), Medium("audio", str(spoken), sample_rate_hz=8000), Medium("audio", "gone.wav")]
    made = make_sample(shown, "won", ("?", "?"), media, answers, data)
    assert len(made.pictures) == 4 and all(uri.startswith("data:image/") for uri in made.pictures)
    (uri,) = made.sounds
    with wave.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:audio/wav;base64,")))) as file:
        assert (file.getframerate(), file.getnchannels()) == (8000, 1)
        heard = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    assert np.abs(heard - np.clip(whole, -1, 1)).max() < 1e-4
    page = write_page(make_report(), [made])
    assert page.count("<audio controls") == 1 and "media-src data:" in page and page.count("<img ") == 4

    # A picture beside two clips leaves them a frame each; of a long sound the beginning is heard, and told.
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(8000)
        file.writeframes(bytes(2 * 8000 * 9))
    long = Medium("audio", "long.wav", sample_rate_hz=8000, seconds=9.0)
    scene = next((data / "scenes" / "test").glob("*.png")).relative_to(data)
    mixed = [Medium("image", str(scene)), Medium("video", str(clip)), Medium("video", str(clip))]
    made = make_sample(shown, "won", ("?", "?"), [long], answers, tmp_path)
    assert made.other_media == ("long.wav, the first 4 of 9 seconds",)
    assert len(make_sample(shown, "won", ("?", "?"), mixed, answers, data).pictures) == 3
