"""Distil along a curriculum with TRL's GKDTrainer, its objective replaced by (1 - r) CE + r T^k D.

    python examples/trl_gkd.py STUDENT TEACHER DATA.jsonl OUTPUT

DATA.jsonl has the columns prompt and completion.
"""

import sys

import datasets
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer

import pocl

student_path, teacher_path, data, output = sys.argv[1:]
student = pocl.Student.load(student_path)
tokenizer = student.tokenizer
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
teacher = AutoModelForCausalLM.from_pretrained(teacher_path)

texts = datasets.load_dataset("json", data_files=data, split="train")
texts = texts.add_column("id", list(range(len(texts))))
ranking = pocl.rank(texts, student, signals=["cross-entropy"])
stages = pocl.baby_step(len(texts), num_stages=2, epochs=2, temperature=(1, 2), kd_ratio=(0.7, 1.0))
schedule = pocl.Schedule(stages, ranking.order, global_batch_size=16, rate=pocl.CosineRate(peak=1e-4))


def tokens(row: dict) -> dict:
    """What the trainer's collator reads: the tokens of both texts, and which of them are the completion's."""
    prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
    completion = [*completion, tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "completion_mask": [0] * len(prompt) + [1] * len(completion)}


args = GKDConfig(
    output,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    num_train_epochs=1,  # all stages and epochs are one epoch of the trainer
    lmbda=0.0,  # the data's texts; above 0, the student samples some, without cross-entropy there
    bf16=False,
    logging_steps=1,
    report_to="none",
)
trainer = GKDTrainer(
    model=student.model,
    teacher_model=teacher,
    args=args,
    train_dataset=texts.map(tokens),
    processing_class=tokenizer,
)
pocl.Curriculum(ranking, schedule).attach(trainer, loss=pocl.DistillationLoss("tfkl"))
trainer.train()
trainer.save_model(output)
