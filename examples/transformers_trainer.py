"""Distil along a curriculum in transformers' loop, with this project's objective.

python examples/transformers_trainer.py STUDENT TEACHER DATA.jsonl OUTPUT [RUN/difficulty.jsonl]
torchrun --nproc-per-node 2 examples/transformers_trainer.py ...     # with half the accumulation: see below
"""

import os
import sys

import numpy as np
from transformers import TrainingArguments

import pocl

student_path, teacher_path, data, output, *given = sys.argv[1:]
args = TrainingArguments(
    output,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4 // int(os.environ.get("WORLD_SIZE", 1)),  # 16 examples a step
    num_train_epochs=1,  # all stages and epochs are one epoch of the Trainer
    weight_decay=0.01,
    logging_steps=1,
    save_steps=50,  # `trainer.train(resume_from_checkpoint=True)` goes on within a stage
    report_to="none",
)

student = pocl.Student.load(student_path)
train = pocl.encode(pocl.load_records(data), student.tokenizer, max_length=512)
teacher = pocl.Teacher.open(teacher_path, train, cache=f"{output}/teacher-cache", device=args.device)

ranking = given[0] if given else pocl.rank(train, student, signals=["student"])
stages = pocl.baby_step(len(train), num_stages=2, epochs=2, temperature=(1, 2), kd_ratio=(0.7, 1.0))
schedule = pocl.Schedule(stages, np.arange(len(train)), global_batch_size=16, rate=pocl.CosineRate(peak=1e-4))
curriculum = pocl.Curriculum(ranking, schedule)

loss = pocl.DistillationLoss("tfkl")
trainer = pocl.DistillationTrainer(student, teacher, curriculum, loss, args=args, train=train)
trainer.train()
trainer.save_model(output)
