"""Make the runs of preregistration-regularises.md, block by block; the same command goes on where it was.

    python benchmarks/evidence/regularises/run.py                   the pilot, then the blocks, then the arms by length
    python benchmarks/evidence/regularises/run.py --seeds 1 3 5     some seeds alone, beside another process

It needs runs/regularises/data (rows.py) and runs/real/smollm2-135m (benchmarks/real_models.py, or a link to what it
made). What is small of each run goes to RESULTS/regularises as soon as it ends, and its directory is cut down then: a
run that is there is not made again, on whichever machine. There are

    scores/seed-S.parquet       dynamics of the seed's reference, which all of its arms read
    runs/ARM-seed-S.json        numbers of its summary, its evaluations, the form of its answers, and `last` and `best`:
                                the model after the last step and at the best of the eight evaluations, both in float32,
                                on the held-out rows
    losses/ARM-seed-S.parquet   these by row: NLL, NLL at the temperature fitted on the other half, correct tokens
    losses/rows.parquet         the held-out rows: id, response tokens
    pilot.json                  the share of LabelSmoothing, and the temperatures from which it was interpolated

All of it but scores is packed in files.parquet (../packed.py): unpack it before you go on. With --tiny a random model
of 200 thousand parameters and 4 steps rehearse all of it in a minute.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.evidence.collect import TEXT, by_half  # noqa: E402
from benchmarks.evidence.losses import _write as write_parquet  # noqa: E402
from benchmarks.evidence.real.answers import form  # noqa: E402
from benchmarks.evidence.regularises.rows import PILOT_SEEDS, SEEDS  # noqa: E402
from benchmarks.evidence.tiers import RESULTS  # noqa: E402
from sftmix.cli.parsing import read_arguments  # noqa: E402
from sftmix.config import RunConfig  # noqa: E402
from sftmix.config.read import from_dict  # noqa: E402
from sftmix.disk.files import read_json, read_steps, write_json  # noqa: E402
from sftmix.ranks.rng import stable_hash  # noqa: E402
from sftmix.tools.compare.command import CompareOptions, comparison_of  # noqa: E402
from sftmix.words.errors import NonFiniteError  # noqa: E402

FOLDER, WORK = Path(__file__).resolve().parent, Path("runs/regularises")
LONGEST = 128
"""Most tokens of an answer."""
ARMS = ("NTP", "SFTMix", "NTP-random", "SFTMix-random", "SFTMix-literal", "LabelSmoothing", "SoftLabels")
LATER = ("NTP-length", "SFTMix-length")
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3)
"""Of LabelSmoothing, tried by the pilot one after the other."""
TINY = (
    "--model.path",
    "../shared/models/stories260K",
    "--data.template",
    "alpaca",
    "--data.max_length",
    "96",
    "--data.limit",
    "16",
    "--training.epochs",
    "2",
    "--training.precision",
    "fp32",
)
Plain = dict[str, Any]


class Study:
    """The runs of the study: `work` has their directories, `out` what is kept of them.

    options   of the command line, which change every run
    measures  models of a run that are measured on the held-out rows
    asks      if True, the last model answers the prompts
    """

    arms = FOLDER / "arms.yaml"
    measures: Sequence[str] = ("last", "best")
    asks = True

    def __init__(self, work: Path, out: Path, options: Sequence[str] = ()) -> None:
        self.work, self.out = work, out
        words = ["--config", str(self.arms), "--out", "none", *options]
        self.variants: Mapping[str, RunConfig] = comparison_of(read_arguments(words, CompareOptions)).variants

    def config(self, arm: str, seed: int, *, held_out: str = "watch") -> Plain:
        """Return an arm at a seed, on its own rows and the scores of its reference."""
        plain: Plain = json.loads(json.dumps(self.variants[arm].as_dict()))
        data = self.work / "data"
        plain["data"] |= {"train": [str(data / f"train-{seed}.json")], "eval": [str(data / f"{held_out}.json")]}
        scores = {"path": str(self.scores(seed))}
        plain["reference"] = {"class_path": "sftmix.components.reference.FromFile", "init_args": scores}
        return plain | {"seed": seed}

    def scores(self, seed: int) -> Path:
        return self.out / "scores" / f"seed-{seed}.parquet"

    def kept(self, name: str, seed: int) -> Path:
        return self.out / "runs" / f"{name}-seed-{seed}.json"

    # ------------------------------------------------------------------------------------------------ runs

    def reference(self, seed: int) -> None:
        """Train the reference of a seed, and keep its scores."""
        from sftmix.pipeline.recipe import run

        if not self.scores(seed).exists():
            place = self.work / f"seed-{seed}" / "reference"
            plain = self.config("SFTMix", seed)
            plain["reference"] = json.loads(json.dumps(self.variants["SFTMix"].as_dict()["reference"]))
            run(from_dict(plain | {"out": str(place)}), until="confidence")
            self.scores(seed).parent.mkdir(parents=True, exist_ok=True)
            part = self.scores(seed).with_suffix(".part")  # half a file would be taken for the whole
            shutil.copy(place / "confidence" / "dynamics.parquet", part)
            part.replace(self.scores(seed))
            shutil.rmtree(place)

    def arm(
        self, arm: str, seed: int, *, name: str = "", share: float | None = None, held_out: str = "held_out"
    ) -> Plain:
        """Return what is kept of an arm at a seed, which is trained and measured unless it is there.

        Of a run whose loss, gradient or weights stopped being finite that is its exit code.
        """
        from sftmix.pipeline.recipe import run

        name = name or arm
        file = self.kept(name, seed)
        if file.exists():
            return read_json(file)
        self.reference(seed)
        began, folder = time.perf_counter(), self.work / f"seed-{seed}"
        plain = self.config(arm, seed, held_out="watch" if held_out == "held_out" else held_out)
        if arm == "LabelSmoothing":
            plain["objective"]["init_args"]["epsilon"] = self.share() if share is None else share
        place = folder / name
        try:
            summary = run(from_dict(plain | {"out": str(place)}), pool=sorted(folder.glob("*")))
        except NonFiniteError as error:  # it diverged, which is a result of the arm
            diverged = {"exit_code": error.exit_code, "error": str(error)}
            write_json(file, diverged)
            return diverged
        found: Plain = {key: value for key, value in summary.items() if key not in TEXT}
        lines = read_steps(place / "train")
        found["evaluations"] = [line["eval_nll"] for line in lines if line.get("eval_nll") is not None]
        if (split := place / "split" / "split.parquet").exists():
            found["sample_nll_by_half"] = by_half(place / "train" / "sample.parquet", split)
        found |= self.measured(place, name, seed, held_out)
        if self.asks and held_out == "held_out":
            found["answers"] = answers(place, self.work / "data" / "prompts.json")
        found["seconds"] = time.perf_counter() - began
        write_json(file, found)
        for big in ("model", "best", "checkpoints"):
            shutil.rmtree(place / "train" / big, ignore_errors=True)
        print(f"{file.name}: {found['seconds']:.0f} s", flush=True)
        return found

    def measured(self, place: Path, name: str, seed: int, held_out: str) -> Plain:
        """Measure the last and the best model of a run in float32, and write the losses by row."""
        from sftmix.pipeline.loaded import scoring_model
        from sftmix.pipeline.rows import read_rows
        from sftmix.ranks.world import World, accelerator
        from sftmix.tools.runs.export import export_run

        plain = self.config("NTP", seed, held_out=held_out)
        plain["training"]["precision"] = "fp32"
        world = World(device=accelerator())
        config, rows = read_rows(from_dict(plain | {"out": str(place)}), world)
        shutil.rmtree(best := place / "train" / "best-model", ignore_errors=True)
        export_run(place, best, best=True)
        models = {"last": place / "train" / "model", "best": best}
        found: Plain = {}
        columns: dict[str, Any] = {}
        for when in self.measures:
            score, module = scoring_model(config, world, str(models[when]), rows.encoder, name=when, packed=rows.packed)
            found[when], losses = held_out_losses(score, module, rows.data.eval)
            columns |= {f"{when}_{column}": values for column, values in losses.items()}
            del module
        shutil.rmtree(best)
        (self.out / "losses").mkdir(parents=True, exist_ok=True)
        assert rows.data.eval is not None, "the study names held-out rows"
        ids = {"id": list(rows.data.eval.ids), "n_tokens": rows.data.eval.n_targets.astype(np.int32)}
        write_parquet(self.out / "losses" / f"{'pilot-' if held_out == 'pilot' else ''}rows.parquet", **ids)
        write_parquet(self.out / "losses" / f"{name}-seed-{seed}.parquet", **columns)
        return found

    # ----------------------------------------------------------------------------------------------- pilot

    def share(self) -> float:
        """Return the share of LabelSmoothing whose temperature is SFTMix's, from the pilot, which is run if need be."""
        if (file := self.out / "pilot.json").exists():
            return float(read_json(file)["share"])

        def temperature(arm: str, share: float | None = None) -> float:
            name = f"pilot-{arm}" + ("" if share is None else f"-{share:g}")
            runs = [self.arm(arm, seed, name=name, share=share, held_out="pilot") for seed in PILOT_SEEDS]
            return statistics.mean(run["last"]["temperature"] for run in runs)

        wanted = temperature("SFTMix")
        found = {0.0: temperature("NTP")}
        for share in SHARES:
            found[share] = temperature("LabelSmoothing", share)
            if found[share] <= wanted:
                break
        share = interpolated(found, wanted)
        write_json(file, {"share": share, "SFTMix": wanted, "temperatures": {f"{x:g}": t for x, t in found.items()}})
        return share


def interpolated(found: Mapping[float, float], wanted: float) -> float:
    """Return the share, of three decimals, at which the line through the last two points has the wanted temperature.

    It is kept between 0 and the last share that was tried.
    """
    (low, above), (high, below) = [*found.items()][-2:]
    share = low + (high - low) * (above - wanted) / (above - below) if above != below else high
    return round(min(max(share, 0.0), high), 3)


def answers(run: Path, prompts: Path) -> Plain:
    """Return the form of the greedy answers of a run's last model, in float32."""
    from sftmix.tools.answers.generate import answer_file, read_questions
    from sftmix.tools.answers.options import AnswerOptions
    from sftmix.tools.runs.models import finished_models

    options = AnswerOptions(max_new_tokens=LONGEST, batch_size=32, dtype="float32")
    questions = read_questions([str(prompts)])
    rows = answer_file(run / "answers.jsonl", finished_models(run), questions, "rows", options)
    words = statistics.mean(len((row["answers"]["target"] or "").split()) for row in rows)
    return form(rows) | {"words": words}


def held_out_losses(score: Any, module: Any, data: Any) -> tuple[Plain, Plain]:
    """Return the figures of a model on held-out rows, and its losses by row, in nats."""
    from sftmix.components.others.calibration import TAUS, fitted_temperature, temperature_scaling, token_statistics
    from sftmix.training.scoring import sum_by_slot

    def statistics_of(target: Any, batch: Any) -> list[Any]:
        _, correct, _, tempered = token_statistics(target.hidden_states(batch), target.head, batch.labels)
        return [sum_by_slot(correct, batch), sum_by_slot(tempered, batch)]

    correct, tempered = map(np.array, score.columns(module, data, statistics_of))
    taus = temperature_scaling(tempered, data.n_targets, data.ids)
    ranked = sorted(range(len(data.ids)), key=lambda row: stable_hash("calibration_fold", data.ids[row]))
    scaled = np.zeros(len(ranked))
    for half, tau in ((ranked[0::2], taus["temperatures"][1]), (ranked[1::2], taus["temperatures"][0])):
        for row in half:  # at the temperature of the other half
            scaled[row] = fitted_temperature(tempered[row])[0](-np.log(tau))
    nll, tokens = tempered[:, TAUS.index(1.0), 0], int(data.n_targets.sum())
    figures = {"nll": nll.sum() / tokens, "accuracy": correct.sum() / tokens, "tokens": tokens, **taus}
    losses = {"nll_sum": nll, "tempered_sum": scaled, "n_correct": correct}
    return figures, {name: column.astype(np.float32) for name, column in losses.items()}


def steps(seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield arm and seed of all runs in their order: block by block, seed by seed, then the arms by length."""
    yield from ((arm, seed) for seed in seeds for arm in ARMS)
    yield from ((arm, seed) for seed in seeds for arm in LATER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS), help="none: the pilot alone")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the rows and the runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "regularises", help="folder of what is kept")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with a small random model")
    options, more = parser.parse_known_args()
    study = Study(options.work, options.out, [*more, *(TINY if options.tiny else [])])
    study.share()
    for arm, seed in steps(options.seeds):
        study.arm(arm, seed)


if __name__ == "__main__":
    main()
