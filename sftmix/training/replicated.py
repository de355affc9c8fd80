"""DDP: each rank has all weights, and gradients are averaged, also of parameters that some rank, or none, reaches."""

from itertools import chain

import torch
from torch.nn.parallel import DistributedDataParallel

from sftmix.model.compared import probe_ids
from sftmix.ranks.world import World
from sftmix.training.module import TrainingModule


def replicated(module: TrainingModule, *, precision: str, world: World) -> DistributedDataParallel:
    """Return the module in DDP, which looks for parameters without gradient if the model may leave some so."""
    some = unreached(module, precision=precision, world=world)
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True, find_unused_parameters=bool(some))
    if some:
        if world.is_main:
            print(
                f"training.parallel ddp looks for parameters without gradient in each backward: a token misses "
                f"{len(some)}, as {', '.join(some[:3])} (fsdp cannot train a model whose ranks reach different ones)",
                flush=True,
            )
        return wrapped
    # After the first backward of each process torch fills its buckets anew, in the order in which that one gave
    # gradients; and where a gradient lies in its bucket decides the order in which three ranks or more are summed.
    # So it is a backward whose order nothing but the model decides. (With unused parameters buckets stay as made.)
    trained = [p for p in module.parameters() if p.requires_grad]
    wrapped(None, None, loss=lambda *_: sum(map(torch.sum, trained))).backward()
    wrapped.zero_grad()
    return wrapped


def unreached(module: TrainingModule, *, precision: str, world: World) -> list[str]:
    """Return, on every rank, the trained parameters that the backward of a token leaves without gradient on any.

    Each rank has a token of its own: one alone, because more would reach more experts.
    """
    model, training = module.model, module.training
    module.eval()  # no dropout is drawn
    ids = probe_ids(model, world.size, 1)[world.rank :][:1]
    with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        model.get_output_embeddings()(states).sum().backward()
    missed = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    module.train(training)
    return sorted({*chain.from_iterable(world.gather(missed))})
