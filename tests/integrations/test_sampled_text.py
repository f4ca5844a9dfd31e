"""Texts that the student samples in TRL's loops, and a teacher with another vocabulary, under a curriculum."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import Trainer

import pocl
from pocl.models.loading import load_model
from tests.integrations import loops
from tests.runs import Folders
from tests.tiny import save_model, tiny_model, tiny_tokenizer

LENGTH = 3  # of sampled answers, in tokens
LIMITS = {"gkd": {"max_new_tokens": LENGTH}, "gold": {"max_completion_length": LENGTH}}


def micro_batches(trainer: Trainer) -> list[tuple[dict[str, Any], torch.Tensor, float]]:
    """Train; the inputs, student logits and loss of each micro-batch."""
    seen, compute_loss = [], trainer.compute_loss

    def noting(model: Any, inputs: dict[str, Any], *args: Any, **others: Any) -> torch.Tensor:
        loss, outputs = compute_loss(model, inputs, True, **others)
        seen.append((inputs, outputs.logits.detach(), loss.item()))
        return loss

    trainer.compute_loss = noting
    trainer.train()
    return seen


@pytest.mark.parametrize("kind", ["gkd", "gold"])
def test_sampled_text_has_no_cross_entropy_and_is_divided_by_its_own_tokens(
    llama: Folders, tmp_path: Path, kind: str
) -> None:
    split = loops.load(llama)
    ranking = loops.by_length(split)
    trainer = loops.make(kind, llama, tmp_path, ranking, accumulation=2, lmbda=1.0, **LIMITS[kind])
    id_of = {tuple(row["prompt_ids"]): number for row, number in zip(split.table, split.ids.tolist(), strict=True)}
    teacher = load_model(str(llama.teacher), "fp32", "auto")
    seen = micro_batches(trainer)
    pairs = zip(seen[::2], seen[1::2], strict=True)
    for update, pair in zip(loops.schedule(split).rank(ranking.order), pairs, strict=True):
        ids, sums, tokens, T = [], [], 0, update.stage.temperature
        for inputs, logits, _ in pair:
            masks = zip(inputs["prompts"], inputs["prompt_attention_mask"].bool(), strict=True)
            ids += [id_of[tuple(prompt[mask].tolist())] for prompt, mask in masks]
            with torch.no_grad():
                other = teacher(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            q, p = ((given[:, :-1] / T).log_softmax(-1) for given in (logits, other))
            learnt = inputs["labels"][:, 1:] != -100
            tokens += int(learnt.sum())
            sums.append(update.stage.kd_ratio * T**2 * (p.exp() * (p - q)).sum(-1)[learnt].sum().item())
        assert sorted(ids) == sorted(split.ids[update.examples].tolist()) and tokens <= len(ids) * LENGTH
        assert [loss for *_, loss in pair] == pytest.approx([each / tokens for each in sums], rel=1e-4)


def test_a_teacher_with_another_vocabulary_follows_the_curriculum(llama: Folders, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(400)
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_model("llama", vocab_size=len(tokenizer), end_id=tokenizer.eos_token_id, seed=1)
    other = llama.__class__(llama.student, save_model(model, tokenizer, tmp_path / "teacher"), llama.data, tmp_path)
    rows = [{"id": i, "prompt": f"number {i}:", "completion": " one" * (i + 1)} for i in range(32)]
    data = datasets.Dataset.from_list(rows)
    ranking = pocl.Ranking.of_scores(rows, {"id": "lowest"})
    stages = pocl.baby_step(len(rows), num_stages=2, epochs=1, temperature=(1, 2), kd_ratio=(0.7, 1.0))
    curriculum = pocl.Curriculum(ranking, pocl.Schedule(stages, ranking.order, global_batch_size=loops.GLOBAL_BATCH))
    args = loops.arguments("gold", tmp_path, accumulation=2, use_uld_loss=True)
    trainer = loops.bare("gold", other, data, args)
    curriculum.attach(trainer)
    settings, uld = [], trainer.uld_loss_fn
    step = trainer.training_step

    def noting(*given: Any) -> torch.Tensor:
        settings.append((uld.student_temperature, uld.teacher_temperature, uld.crossentropy_weight))
        return step(*given)

    trainer.training_step = noting
    seen = micro_batches(trainer)
    wanted = [update for update in curriculum.updates for _ in range(2)]
    assert settings == [(u.stage.temperature, u.stage.temperature, 1 - u.stage.kd_ratio) for u in wanted]
    assert len(seen) == 2 * len(curriculum.updates) == 2 * (1 + 2)
    prompts = [inputs["original_prompt_text"] for inputs, *_ in seen]
    for update, first, second in zip(curriculum.updates, prompts[::2], prompts[1::2], strict=True):
        assert sorted(first + second) == sorted(data[update.examples]["prompt"])
    losses = [loss for *_, loss in seen]
    logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert logged == pytest.approx([(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)], rel=1e-5)
