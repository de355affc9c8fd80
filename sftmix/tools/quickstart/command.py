"""`quickstart`: the recipe and the NTP baseline on rows and a model made on the spot, and a table of the results."""

from dataclasses import dataclass
from pathlib import Path

from sftmix.cli.say import as_word
from sftmix.words.errors import ConfigError

ABOUT = """See the whole recipe work in under three minutes on two CPU cores, without any download.

It generates a small synthetic instruction set whose truth about confidence is known, makes a tokenizer and a small
Llama on the spot, and trains SFTMix beside plain NTP at the same seed. Each stage says what happened; the table at the
end shows whatever came out.

  sftmix quickstart"""


@dataclass(kw_only=True)
class Options:
    out: str = "runs/quickstart"
    """DIR: where to write [%(default)s]"""
    seed: int = 42
    """N: seed of everything [%(default)s]"""


def main(args: Options) -> None:
    """Make model and rows, run recipe:quickstart with the baseline on them, and print the table.

    A second call on the same directory reads what is there.
    """
    if not -(2**63) <= args.seed < 2**64:
        raise ConfigError(f"--seed is {args.seed}; allowed: -2^63 to 2^64 - 1, which torch takes")
    from sftmix.cli.parsing import configuration
    from sftmix.pipeline.recipe import run
    from sftmix.tools.quickstart import materialise
    from sftmix.tools.runs.output import rendered
    from sftmix.tools.sharing.command import write_run_cards

    out, seed = Path(args.out), args.seed
    inputs = materialise(out / f"materials-{seed}", seed=seed)
    words = ["--config", "recipe:quickstart", "--out", str(out), "--seed", str(seed), "--with_baseline", "true"]
    words += ["--model.path", str(inputs.model), "--data.train", str(inputs.train), "--data.eval", str(inputs.eval)]
    summary = run(configuration("run", "", words)[0])  # read by the words that a user would type
    print(rendered("quickstart/outcome.txt", out=as_word(out), summary=summary))
    write_run_cards(out)
