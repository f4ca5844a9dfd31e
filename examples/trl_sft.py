"""Fine-tune along a curriculum with TRL's SFTTrainer: its own cross-entropy, in the order of difficulty.

    python examples/trl_sft.py STUDENT DATA.jsonl OUTPUT

DATA.jsonl has the columns prompt and completion (or any that SFTTrainer knows).
"""

import sys

import datasets
from trl import SFTConfig, SFTTrainer

import pocl

student_path, data, output = sys.argv[1:]
dataset = datasets.load_dataset("json", data_files=data, split="train")
dataset = dataset.add_column("id", list(range(len(dataset))))

student = pocl.Student.load(student_path)
ranking = pocl.rank(dataset, student, signals=["cross-entropy"])
stages = pocl.baby_step(len(dataset), num_stages=2, epochs=2)
schedule = pocl.Schedule(stages, ranking.order, global_batch_size=16, rate=pocl.CosineRate(peak=1e-4))

args = SFTConfig(
    output,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=4,
    num_train_epochs=1,  # all stages and epochs are one epoch of the trainer
    bf16=False,
    logging_steps=1,
    report_to="none",
)
tokenizer = student.tokenizer
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
trainer = SFTTrainer(model=student.model, args=args, train_dataset=dataset, processing_class=tokenizer)
pocl.Curriculum(ranking, schedule).attach(trainer)
trainer.train()
trainer.save_model(output)
