"""SFTMix in a Trainer without TRL, and in settings of both that users have: images, adapters, collators, rows."""

import copy
from dataclasses import dataclass

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import SFTTrainer

from sftmix.tools.integrations import DynamicsCallback, SFTMixArguments, SFTMixTrainer
from tests.tools.integrations.test_trainers import Mixed, example, same, trained, trainer_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


@dataclass
class Arguments(SFTMixArguments, TrainingArguments):
    """Those of a Trainer without TRL."""


def of_transformers(tiny):
    """What trainer_of takes for a Trainer without TRL."""
    return {"config": Arguments, "given": {"data_collator": DataCollatorForSeq2Seq(tokenizer_of(tiny))}}


def tokenizer_of(tiny):
    return AutoTokenizer.from_pretrained(tiny.model)


class Uncounted(LlamaForCausalLM):
    """Its own loss is a mean that takes no count from a Trainer, as that of Gemma 3 and Qwen 3.5 with images."""

    accepts_loss_kwargs = False


@pytest.mark.parametrize("base", [Trainer, SFTTrainer], ids=["transformers", "trl"])
def test_micro_batches_of_a_model_whose_loss_takes_no_count_are_divided_once(plain, tmp_path, base):
    """Its steps are those of any model, its evaluation that of the trainer without SFTMix."""

    class Own(SFTMixTrainer, base):
        pass

    words = of_transformers(plain) | {"model": Uncounted.from_pretrained(plain.model)}
    words |= {"config": Arguments if base is Trainer else example.SFTMixConfig}
    _, right = trained(Mixed, plain, tmp_path / "right")
    trainer, found = trained(Own, plain, tmp_path / "found", **words)
    same(found, right, "loss", "grad_norm")
    rows = trainer.train_dataset.select_columns(["input_ids", "labels"])
    losses = [one.evaluate(rows)["eval_loss"] for one in (trainer, trainer_of(base, plain, tmp_path / "base", **words))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == losses[0]  # its rows have a number


def test_held_out_rows_with_a_collator_of_their_own(plain, tmp_path):
    """axolotl's trainer has one, which knows nothing of the number of a row."""
    trainer = trainer_of(SFTMixTrainer, plain, tmp_path, **of_transformers(plain))
    rows = trainer.train_dataset.select_columns(["input_ids", "labels"])
    right = trainer.evaluate(rows)["eval_loss"]
    trainer.data_collator = DataCollatorForSeq2Seq(tokenizer_of(plain))
    assert trainer.evaluate(rows)["eval_loss"] == right


def test_rows_that_hide_their_number_are_refused(plain, tmp_path):
    """They would be trained without Mixup."""
    trainer = trainer_of(SFTMixTrainer, plain, tmp_path, **of_transformers(plain))
    trainer.train_dataset = trainer.train_dataset.with_transform(
        lambda rows: {name: rows[name] for name in ("input_ids", "labels")}
    )
    trainer.args.remove_unused_columns = False
    with pytest.raises(ValueError, match=r"a batch has no \{'sftmix_row'\}: .* leave out with_transform"):
        trainer.train()


def test_rows_without_labels_are_refused(plain, tmp_path):
    """The collator then leaves None for them."""
    trainer = trainer_of(SFTMixTrainer, plain, tmp_path, **of_transformers(plain))
    trainer.train_dataset = trainer.train_dataset.remove_columns("labels")
    with pytest.raises(ValueError, match=r"a batch has no \{'labels'\}: give the rows labels"):
        trainer.train()


def test_the_rows_of_another_trainer_are_numbered_anew(plain, tmp_path):
    words = of_transformers(plain)
    first, right = trained(SFTMixTrainer, plain, tmp_path / "first", **words)
    second = SFTMixTrainer(
        AutoModelForCausalLM.from_pretrained(plain.model),
        first.args,
        train_dataset=first.train_dataset,
        processing_class=tokenizer_of(plain),
        **words["given"],
    )
    second.train()
    same([line for line in second.state.log_history if "loss" in line], right, "loss", "grad_norm")


def test_a_copy_of_the_model_computes_with_its_own_weights(plain, tmp_path):
    """As an average of weights has them, and TRL's reference model."""
    trainer = trainer_of(SFTMixTrainer, plain, tmp_path, **of_transformers(plain))
    twin, ids = copy.deepcopy(trainer.model), torch.arange(8)[None]
    with torch.no_grad():
        twin.get_output_embeddings().weight.mul_(2)
        ours, theirs = trainer.model(input_ids=ids).logits, twin(input_ids=ids).logits
    assert not torch.equal(ours, theirs)
    twin.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        assert torch.equal(ours, twin(input_ids=ids).logits)


def test_arguments_without_options_of_sftmix_are_refused(plain, tmp_path):
    with pytest.raises(ValueError, match="a class that inherits SFTMixArguments, too"):
        SFTMixTrainer(
            AutoModelForCausalLM.from_pretrained(plain.model), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        )


def test_bins_of_rows_are_not_scored(plain, tmp_path):
    """A bin has neither the id of a row nor its score."""
    trainer = trainer_of(SFTMixTrainer, plain, tmp_path, **of_transformers(plain))
    trainer.args.packing = True
    trainer.add_callback(DynamicsCallback(trainer.train_dataset, tmp_path / "dynamics.parquet"))
    with pytest.raises(ValueError, match="not bins of them: set packing to false"):
        trainer.train()


@pytest.mark.parametrize(
    ("config", "name", "reason"),
    [
        (LoraConfig(target_modules=["lm_head"]), "other", r"the LM head has adapters \['other'\]"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "other", r"the LM head has adapters"),
        (IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "default", r"Linear of peft\.tuners\.ia3"),
        (LoraConfig(target_modules=["lm_head"], use_dora=True), "default", "without lora_bias or a variant"),
        (AdaLoraConfig(target_modules=["q_proj"], total_step=9), "default", "AdaLoRA adds a term to the loss"),
    ],
    ids=["name", "copy", "kind", "variant", "adalora"],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters_that_the_loss_does_not_follow_are_refused(plain, tmp_path, config, name, reason):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(plain.model), config, adapter_name=name)
    with pytest.raises(ValueError, match=reason):
        trainer_of(SFTMixTrainer, plain, tmp_path, model=model, **of_transformers(plain))


IMAGE = 399
"""The token of a picture's patch."""


class Pictures:
    """A collator that puts a picture of four tokens in front of each row, with pixels by a token of its end."""

    def __init__(self, tokenizer):
        self.tokens = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, features):
        rows = [
            {"input_ids": [IMAGE] * 4 + row["input_ids"], "labels": [-100] * 4 + list(row["labels"])}
            for row in features
        ]
        batch = dict(self.tokens(rows))
        pixels = [
            torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(row["input_ids"][5])) for row in features
        ]
        types = (batch["input_ids"] == IMAGE).long()
        return batch | {"pixel_values": torch.stack(pixels), "token_type_ids": types}


def gemma_3():
    text = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 64}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 4}
    tokens = {"image_token_index": IMAGE, "boi_token_index": 397, "eoi_token_index": 398}
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    )


def test_images_are_seen(plain, tmp_path):
    """At mu 0 the loss is that of the model's own logits, which pictures in front of the rows change."""
    words = of_transformers(plain) | {"given": {"data_collator": Pictures(tokenizer_of(plain))}, "max_steps": 1}
    options = {"model": gemma_3(), "sftmix_mu": 0.0, "learning_rate": 0.0}
    trainer, (line, *_) = trained(SFTMixTrainer, plain, tmp_path, **words, **options)
    dataset, order = trainer.train_dataset, list(trainer._get_train_sampler())[:8]
    batch = Pictures(tokenizer_of(plain))(
        [{key: dataset[row][key] for key in ("input_ids", "labels")} for row in order]
    )
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = trainer.model(**batch).logits
    right = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert line["loss"] == pytest.approx(float(right), rel=1e-5)
