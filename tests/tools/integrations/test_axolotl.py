"""The plugin of axolotl, by its interface: axolotl is not installed, and its trainer is one of transformers."""

import importlib
import sys
from types import ModuleType

import pytest
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer

from tests.tiny import make_tiny
from tests.tools.integrations.test_trainers import Mixed, same, trained, trainer_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]


class Values(dict):
    """A configuration, as axolotl's."""

    __getattr__ = dict.get


@pytest.fixture
def axolotl(monkeypatch):
    for name in ("", ".integrations", ".integrations.base", ".core", ".core.trainers", ".core.trainers.base"):
        monkeypatch.setitem(sys.modules, f"axolotl{name}", ModuleType(f"axolotl{name}"))
    sys.modules["axolotl.integrations.base"].BasePlugin = type("BasePlugin", (), {"register": lambda self, cfg: None})
    sys.modules["axolotl.core.trainers.base"].AxolotlTrainer = Trainer
    return importlib.import_module("sftmix.tools.integrations.axolotl")


def read(axolotl, **keys):
    """Return the keys as axolotl reads them: the plugin sees them bare, and what is None is left out."""
    axolotl.SFTMixPlugin().register(Values(keys))
    return Values(axolotl.SFTMixInput(**keys).model_dump(exclude_none=True))


def test_it_trains_alike(axolotl, tmp_path):
    """A reference run, and a run on its split."""
    tiny = make_tiny(tmp_path, dropout=0.0)
    plugin, file = axolotl.SFTMixPlugin(), str(tmp_path / "dynamics.parquet")
    assert plugin.get_input_args() == "sftmix.tools.integrations.axolotl.SFTMixInput"
    assert plugin.get_training_args_mixin() == "sftmix.tools.integrations.SFTMixArguments"
    given = {"data_collator": DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(tiny.model))}

    first = read(axolotl, sftmix_dynamics=file)
    assert plugin.get_trainer_cls(first) is None
    keep = ("input_ids", "labels")  # axolotl drops the ids
    trainer = trainer_of(Trainer, tiny, tmp_path / "first", keep, given)
    (callback,) = plugin.add_callbacks_post_trainer(first, trainer)
    trainer.add_callback(callback)
    trainer.train()
    options = plugin.get_training_args(read(axolotl, sftmix_split=file, sftmix_mu=0.5))
    assert options == {"sftmix_split": file, "sftmix_mu": 0.5}
    kind = plugin.get_trainer_cls(Values(options))
    _, found = trained(kind, tiny, tmp_path / "second", keep, given, **options)
    _, right = trained(Mixed, tiny, tmp_path / "trl", keep, **options)
    same(found, right, "loss", "grad_norm")
    assert plugin.add_callbacks_post_trainer(Values(options), None) == []


@pytest.mark.parametrize("keys", [{"sftmix_mu": 0.2}, {"sftmix_split": ""}, {"sftmix_spilt": "split.parquet"}])
def test_keys_without_a_file_are_no_plain_training(axolotl, keys):
    """A misspelt one as well."""
    with pytest.raises(ValueError, match=rf"\['{next(iter(keys))}'\] without .* name a split\.parquet .*take them out"):
        read(axolotl, base_model="model", **keys)


@pytest.mark.parametrize("keys", [{}, {"sftmix_dynamics": "dynamics.parquet"}, {"sftmix_split": "split.parquet"}])
def test_keys_that_were_read_can_be_read_again(axolotl, keys):
    """As axolotl's workers of Ray do; without keys, training is plain."""
    once = read(axolotl, **keys)
    assert read(axolotl, **once) == once == keys
