"""What `generate` refuses before it answers: other inputs than before, options without effect, files of others."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import pytest
import yaml

from sftmix.common.errors import ConfigError
from sftmix.pipeline import loaded
from sftmix.pipeline.directory import differences
from sftmix.pipeline.finished import finished_models
from sftmix.tools.answers.generate import generate
from sftmix.tools.answers.identity import inputs_of
from sftmix.tools.answers.options import AnswerOptions
from sftmix.tools.answers.questions import Question

SHORT = AnswerOptions(max_new_tokens=2)
ASKED = Question("q", ({"role": "user", "content": "Q?"},))
MT_BENCH = {"question_id": 81, "turns": ["Q?", "More?"]}


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run with a model directory of its own."""
    shutil.copytree(finished.path, tmp_path / "first")
    shutil.copytree(finished.tiny.model, tmp_path / "model")
    change(tmp_path / "first", "model", path=str(tmp_path / "model"))
    return tmp_path / "first"


def change(run, part: str, **options) -> None:
    """Change options of one part of a run's config."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[part].update(options)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"template": "chatml"}, "template"),
        ({"special_tokens": "tokens"}, "special_tokens"),
        ({"format": "text"}, "format"),
    ],
    ids=str,
)
def test_another_encoder_of_the_run_makes_other_inputs(run, options, key):
    models = finished_models(run)
    before = inputs_of("rows", [ASKED], models, SHORT)
    assert inputs_of("rows", [ASKED], models, SHORT) == before
    change(run, "data", **options)
    (found,) = differences(before, inputs_of("rows", [ASKED], models, SHORT))
    assert found.startswith(f"models.target.{key}: ")


def test_the_text_of_a_template_and_the_tokenizer_are_inputs(run, tmp_path):
    models, template = finished_models(run), tmp_path / "mine.jinja"
    template.write_text("one")
    change(run, "data", template=str(template))
    before = inputs_of("rows", [ASKED], models, SHORT)
    template.write_text("two")
    other = inputs_of("rows", [ASKED], models, SHORT)
    assert [line.partition(":")[0] for line in differences(before, other)] == ["models.target.template"]
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")
    again = inputs_of("rows", [ASKED], models, SHORT)
    assert [line.partition(":")[0] for line in differences(other, again)] == ["models.target.tokenizer"]


def test_the_weights_of_a_model_from_elsewhere_are_inputs(run, tmp_path):
    models = finished_models(tmp_path / "model")
    before = inputs_of("rows", [ASKED], models, SHORT)
    with (tmp_path / "model" / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert inputs_of("rows", [ASKED], models, SHORT)["models"] != before["models"]


def test_a_questions_temperature_is_an_input_unless_the_option_overrules_it(run):
    models, warm = finished_models(run), replace(ASKED, temperature=0.7)
    for options, same in ((SHORT, False), (replace(SHORT, temperature=0.5), True)):
        cold = inputs_of("rows", [ASKED], models, options)
        assert (inputs_of("rows", [warm], models, options)["prompts"] == cold["prompts"]) is same


def test_a_hub_id_without_its_commit_is_refused(run):
    (model,) = finished_models(run)
    with pytest.raises(ConfigError, match="model sftmix/nothing: its commit on the hub cannot be found"):
        inputs_of("rows", [ASKED], [replace(model, path="sftmix/nothing", run=None)], SHORT)


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("heat", [[], ["--temperature", "0"]], ids=str)
def test_top_p_without_a_temperature_is_refused(sftmix, run, tmp_path, command, heat):
    to = ["--to", str(tmp_path / "answers.jsonl")] if command == "generate" else []
    done = sftmix(command, str(run), *to, "--top_p", "0.9", *heat)
    assert done.code == 2
    assert "--top_p is 0.9" in done.err
    assert "--temperature above 0" in done.err


def test_held_out_text_asks_for_prompts(run, tmp_path):
    train, held_out = (tmp_path / name for name in ("train.jsonl", "eval.jsonl"))
    for file in (train, held_out):
        file.write_text(json.dumps({"text": f"Long ago, in {file.name}."}))
    for form in ("text", "auto"):
        change(run, "data", train=str(train), eval=str(held_out), format=form)
        with pytest.raises(ConfigError, match=r"--prompts is not given, and .* plain text"):
            generate(str(run), tmp_path / "answers.jsonl", models=["target"])


def test_runs_stand_side_by_side_for_a_judge_and_replace_nothing(run, finished, tmp_path):
    """A file of other answers is refused before anything is answered; temperatures of categories make top_p count."""
    prompts, to = tmp_path / "question.jsonl", tmp_path / "mt_bench"
    prompts.write_text(json.dumps({**MT_BENCH, "category": "writing"}))

    def answer(place, *models: str):
        options = replace(SHORT, top_p=0.9)
        return generate(str(place), to, models=models, prompts=[str(prompts)], form="mt_bench", options=options)

    first, second = answer(run, "target"), answer(finished.path, "target")
    assert [path.name for path in first.files] == ["answers-first-target.jsonl", "first-target.jsonl"]
    assert [path.name for path in second.files] == ["answers-run-target.jsonl", "run-target.jsonl"]
    before = first.files[1].read_bytes()
    with pytest.raises(ConfigError, match=r"first-target\.jsonl would be overwritten"):
        answer(run, "target", "base")
    assert first.files[1].read_bytes() == before
    assert not list(to.glob("*+*"))


def test_loading_counts_not_as_answering(run, tmp_path, monkeypatch):
    load, wait = loaded.load_finished, 0.5

    def slowly(*given, **options):
        time.sleep(wait)
        return load(*given, **options)

    monkeypatch.setattr(loaded, "load_finished", slowly)
    began = time.monotonic()
    made = generate(str(run), tmp_path / "answers.jsonl", models=["target", "base"], options=SHORT)
    assert 0 < made.seconds <= time.monotonic() - began - 2 * wait
