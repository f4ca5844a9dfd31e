"""Distil in a loop of your own: schedule, objective and teacher cache, in plain PyTorch on one machine or several.

python examples/plain_loop.py STUDENT TEACHER DATA.jsonl OUTPUT
torchrun --nproc-per-node 2 examples/plain_loop.py STUDENT TEACHER DATA.jsonl OUTPUT
"""

import sys

import torch
import torch.distributed as dist

import pocl

student_path, teacher_path, data, output = sys.argv[1:]
world, rank = 1, 0
if dist.is_torchelastic_launched():
    dist.init_process_group()
    world, rank = dist.get_world_size(), dist.get_rank()
device = torch.device(f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu")

student = pocl.Student.load(student_path, device=device)
train = pocl.encode(pocl.load_records(data), student.tokenizer, max_length=512)
teacher = pocl.Teacher.open(teacher_path, train, cache=f"{output}/teacher-cache", device=device)
ranking = pocl.rank(train, student, signals=["cross-entropy"])  # or "student": its own answers, too, as in the paper
stages = pocl.baby_step(len(train), num_stages=2, epochs=2, temperature=(1, 2), kd_ratio=(0.7, 1.0))
schedule = pocl.Schedule(stages, ranking.order, global_batch_size=16, rate=pocl.CosineRate(peak=1e-4))
loss = pocl.DistillationLoss("tfkl")

parameters = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
student.model.train()
for update in schedule:
    if update.number == 0 or update.restarts:
        optimizer = torch.optim.AdamW(parameters, lr=update.lr, weight_decay=0.01)
    for group in optimizer.param_groups:
        group["lr"] = update.lr
    num_tokens, total = train.num_labels[update.examples].sum(), torch.zeros((), device=device)
    for micro in update.examples[rank::world].reshape(-1, 4):  # 4 examples at a time
        batch = train.batch(micro).to(device)
        values = loss(
            pocl.HiddenStates(student.states(batch), student.head),
            pocl.HiddenStates(teacher.states(batch), teacher.head),
            batch.response_labels(),
            temperature=update.stage.temperature,
            kd_ratio=update.stage.kd_ratio,
        )
        (values.loss / num_tokens).backward()  # tokens of all micro-batches on all ranks
        total += values.loss.detach() / num_tokens
    for value in [total, *(parameter.grad for parameter in parameters)] if world > 1 else ():
        dist.all_reduce(value)  # summed over ranks, as the loss is
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {update.number}  stage {update.stage.index}  T {update.stage.temperature:.2f}  loss {total:.4f}")
if rank == 0:
    student.model.save_pretrained(output)
    student.tokenizer.save_pretrained(output)
