"""What `generate` refuses before it answers: other inputs than before, options without effect, files of others."""

import itertools
import json
import shutil
from dataclasses import replace

import pytest
import yaml

from sftmix.common.errors import ConfigError
from sftmix.data.templates import ALPACA
from sftmix.pipeline.directory import differences
from sftmix.pipeline.finished import finished_models
from sftmix.tools.answers.generate import _label, generate, inputs_of
from sftmix.tools.answers.options import AnswerOptions
from sftmix.tools.answers.questions import Question

SHORT = AnswerOptions(max_new_tokens=2)
ASKED = Question("q", ({"role": "user", "content": "Q?"},))


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


def inputs(models, question=ASKED, options=SHORT):
    return inputs_of("rows", [question], models, options)


def test_another_template_of_the_run_makes_other_inputs(run, tmp_path):
    """The text of a template alone, and special tokens as tokens."""
    models, template, seen = finished_models(run), tmp_path / "mine.jinja", []
    for head, special in (("### Q:", "text"), ("### Question:", "text"), ("### Question:", "tokens")):
        template.write_text(ALPACA.replace("### Instruction:", head))
        change(run, "data", template=str(template), special_tokens=special)
        seen.append(inputs(models))
    for one, other in itertools.combinations(seen, 2):
        (found,) = differences(one, other)
        assert found.startswith("models.target.encoder: ")


def test_the_weights_of_a_model_from_elsewhere_are_inputs(run, tmp_path):
    models = finished_models(tmp_path / "model")
    before = inputs(models)
    with (tmp_path / "model" / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert inputs(models)["models"] != before["models"]


def test_a_questions_temperature_is_an_input(run):
    models = finished_models(run)
    assert inputs(models, replace(ASKED, temperature=0.7))["prompts"] != inputs(models)["prompts"]


def test_options_overrule_the_temperature_and_add_a_system_turn(run, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("sftmix.tools.answers.generate._lines", lambda *given: asked.extend(given[2]) or [])
    generate(str(run), tmp_path / "to", models=["target"], options=replace(SHORT, temperature=0.5, system="Be brief."))
    assert {(one.temperature, one.messages[0]["content"]) for one in asked} == {(0.5, "Be brief.")}


def test_held_out_text_asks_for_prompts(run, tmp_path):
    train, held_out = tmp_path / "train.txt", tmp_path / "eval.txt"
    train.write_text("Long ago.")
    held_out.write_text("Not long ago.")
    change(run, "data", train=str(train), eval=str(held_out))
    with pytest.raises(ConfigError, match=r"--prompts is not given, and target has no held-out conversations"):
        generate(str(run), tmp_path / "answers.jsonl", models=["target"], options=SHORT)


def test_a_model_in_the_working_directory_has_the_name_of_its_directory(finished, monkeypatch):
    monkeypatch.chdir(finished.tiny.model)
    assert _label(finished_models(".")[0]) == finished.tiny.model.name


def test_runs_stand_side_by_side_for_a_judge_and_replace_nothing(run, finished, tmp_path):
    prompts, to = tmp_path / "question.jsonl", tmp_path / "mt_bench"
    prompts.write_text(json.dumps({"question_id": 81, "turns": ["Q?", "More?"], "category": "writing"}))

    def answer(place, *models: str, options=SHORT):
        return generate(str(place), to, models=models, prompts=[str(prompts)], form="mt_bench", options=options)

    first, second = answer(run, "target"), answer(finished.path, "target")
    assert [path.name for path in first] == ["answers-first-target.jsonl", "first-target.jsonl"]
    assert [path.name for path in second] == ["answers-run-target.jsonl", "run-target.jsonl"]
    answers, judged = (json.loads(path.read_text()) for path in first)
    assert judged["choices"][0]["turns"] == answers["answers"]["target"]
    before = first[1].read_bytes()
    with pytest.raises(ConfigError, match=r"answers-first-target\.jsonl was made .*: temperature: None -> "):
        answer(run, "target", "base", options=replace(SHORT, temperature=0.7))  # that of the question, too
    assert first[1].read_bytes() == before
