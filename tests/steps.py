"""A few optimiser steps of tiny models under DeepSpeed: (loss, gradient norm) of each, as JSON.

    python tests/steps.py DEEPSPEED_CONFIG OUTPUT

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment say which of several ranks this is. Ranks get
responses of different lengths, so that their numbers of chunks differ.
"""

import json
import random
import sys
from pathlib import Path

import torch

from pocl.cli import process
from pocl.common import distributed
from pocl.data.batch import collate
from pocl.losses.divergences import LOSSES
from pocl.losses.head import HiddenStates
from pocl.losses.token import StageObjective
from pocl.models.states import make_head, response_states
from tests.parts import engine_of
from tests.tiny import tiny_model

GLOBAL_BATCH, MICRO_BATCH, STEPS = 8, 2, 3


def curve(family: str, config_path: Path, device: torch.device) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of one model."""
    size = {"vocab_size": 600, "end_id": 0}
    student, teacher = tiny_model(family, **size), tiny_model(family, num_layers=3, width=48, seed=1, **size).eval()
    engine = engine_of(student, config_path, weight_decay=0.01)
    objective = StageObjective(LOSSES["tjsd"].bind(), 1.5, 2.25, 0.7)
    draw, found = random.Random(0), []
    for _ in range(STEPS):
        texts = [
            [[draw.randrange(600) for _ in range(length)] for length in (5, draw.randint(3, 30))]
            for _ in range(GLOBAL_BATCH)
        ]
        num_tokens = sum(len(response) for _, response in texts)
        mine, total = texts[distributed.rank() :: distributed.world_size()], 0.0
        for start in range(0, len(mine), MICRO_BATCH):
            prompts, responses = zip(*mine[start : start + MICRO_BATCH], strict=True)
            batch = collate(range(len(prompts)), prompts, responses, max_length=64)
            with torch.no_grad():
                teacher_states = response_states(teacher, batch)
            loss = engine.forward(batch, objective, HiddenStates(teacher_states, make_head(teacher))).loss
            engine.backward(loss, num_tokens)
            total += float(loss.detach()) / num_tokens
        norm, _ = engine.step(1e-2)
        found.append((distributed.sum_over_ranks([total], device)[0], norm))
    return found


def curves(config_path: Path) -> dict[str, list[tuple[float, float]]]:
    """The curve of a model whose head is tied to its embeddings, and of one whose is not."""
    device = process.start()
    return {family: curve(family, config_path, device) for family in ("gpt2", "llama")}


def main() -> None:
    """Write the curves."""
    config_path, output = map(Path, sys.argv[1:])
    found = curves(config_path)
    if distributed.is_main():
        output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    process.stop()
