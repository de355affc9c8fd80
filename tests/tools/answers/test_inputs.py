"""What `generate` refuses before it answers: other inputs than before, options without effect, files of others."""

from __future__ import annotations

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
from sftmix.tools.answers.generate import generate, inputs_of
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


def inputs(models, question=ASKED, options=SHORT):
    return inputs_of("rows", [question], models, options)


def test_another_template_of_the_run_makes_other_inputs(run, tmp_path):
    """Another template, its text alone, and special tokens as tokens."""
    models, template = finished_models(run), tmp_path / "mine.jinja"
    seen = [inputs(models)]
    for head in ("### Q:", "### Question:"):
        template.write_text(ALPACA.replace("### Instruction:", head))
        change(run, "data", template=str(template))
        seen.append(inputs(models))
    change(run, "data", special_tokens="tokens")
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


def test_a_questions_temperature_is_an_input_unless_the_option_overrules_it(run):
    models, warm = finished_models(run), replace(ASKED, temperature=0.7)
    for options, same in ((SHORT, False), (replace(SHORT, temperature=0.5), True)):
        assert (inputs(models, warm, options) == inputs(models, ASKED, options)) is same


def test_held_out_text_asks_for_prompts(run, tmp_path):
    train, held_out = (tmp_path / name for name in ("train.jsonl", "eval.jsonl"))
    for file in (train, held_out):
        file.write_text(json.dumps({"text": f"Long ago, in {file.name}."}))
    for form in ("text", "auto"):
        change(run, "data", train=str(train), eval=str(held_out), format=form)
        with pytest.raises(ConfigError, match=r"--prompts is not given, and target has no held-out conversations"):
            generate(str(run), tmp_path / "answers.jsonl", models=["target"])


def test_runs_stand_side_by_side_for_a_judge_and_replace_nothing(run, finished, tmp_path):
    prompts, to = tmp_path / "question.jsonl", tmp_path / "mt_bench"
    prompts.write_text(json.dumps({**MT_BENCH, "category": "writing"}))

    def answer(place, *models: str, options=SHORT):
        return generate(str(place), to, models=models, prompts=[str(prompts)], form="mt_bench", options=options)

    first, second = answer(run, "target"), answer(finished.path, "target")
    assert [path.name for path in first] == ["answers-first-target.jsonl", "first-target.jsonl"]
    assert [path.name for path in second] == ["answers-run-target.jsonl", "run-target.jsonl"]
    before = first[1].read_bytes()
    with pytest.raises(ConfigError, match=r"answers-first-target\.jsonl was made with other inputs: seed: 42 -> 1"):
        answer(run, "target", "base", options=replace(SHORT, seed=1))
    assert first[1].read_bytes() == before
