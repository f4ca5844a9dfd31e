"""The regimes of the testbed, and what a seed's arms start from: tokenizer, teacher, warmed-up student, data.

All of it is made from scratch and kept: tokenizer and teacher once, the others once a seed and regime. Models are
trained by ``train.distil``, as every arm is.
"""

import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import pocl
import train
from pocl.cli.checks import parse_train
from pocl.cli.process import seed_everything
from pocl.cli.resolve import with_sizes
from pocl.common.files import replace_folder, write_json
from pocl.common.lock import FolderLock
from pocl.data.dataset import FORMAT_VERSION
from pocl.models.identity import tokenizer_fingerprint, vocabulary_size
from pocl.models.loading import load_tokenizer
from tools.testbedding.tasks import KINDS, ORDERING, Draw, make_records

END = "<|endoftext|>"
VOCABULARY, MAX_PROMPT, MAX_LENGTH = 400, 24, 48  # tokens
HELD_OUT = 400  # prompts
# What every training here shares. --num-dev 0: no student is chosen, the last one is taken.
SHARED = ("--max-length", str(MAX_LENGTH), "--num-dev", "0", "--no-repeat-ngram", "0", "--bucket-examples", "0")
SHARED += ("--eval-every", "1000", "--log-every", "100", "--report-to", "none")
SHARED += ("--deepspeed-config", "scripts/deepspeed/zero0.json")
PLAIN = ("--type", "sft", "--curriculum", "whole-pool", "--num-stages", "1")


@dataclass(frozen=True)
class Size:
    """How large models and their data are."""

    teacher: tuple[int, int] = (128, 5)  # width, layers: 1.1M parameters
    student: tuple[int, int] = (64, 3)  # 0.2M
    teacher_examples: int = 4000
    warmup_examples: int = 1280
    teacher_epochs: int = 8
    held_out: int = HELD_OUT
    shrink: int = 1  # what examples and batches of training are divided by


USUAL = Size()


@dataclass(frozen=True)
class Regime:
    """What is trained on, how green the student is, and the batch."""

    name: str
    title: str
    num_train: int
    kinds: tuple[str, ...]
    batch: int
    warmup_epochs: int  # over 1,280 examples
    lr: float = 1e-3


REGIMES = {
    regime.name: regime
    for regime in (
        Regime("P", "640 examples of all tasks", 640, tuple(KINDS), 16, 4),
        Regime("G", "640 examples of one skill, a greener student", 640, ORDERING, 16, 2),
        Regime("O", "160 examples, until overfitted", 160, tuple(KINDS), 8, 4),
    )
}


@dataclass(frozen=True)
class Bench:
    """The folders of one seed of one regime."""

    folder: Path
    regime: Regime
    seed: int
    size: Size = USUAL

    @property
    def shared(self) -> Path:
        """What all seeds and regimes have in common."""
        return self.folder / "shared"

    @property
    def place(self) -> Path:
        """What is this seed's and regime's own."""
        return self.folder / f"{self.regime.name}-seed{self.seed}"

    @property
    def student(self) -> Path:
        """The student that every arm starts with."""
        return self.place / "warmup" / "sft" / "run" / "best"

    @property
    def teacher(self) -> Path:
        """The teacher."""
        return self.shared / "teacher" / "sft" / "run" / "best"

    @property
    def data(self) -> Path:
        """Training examples, and the held-out ones as its dev split, which no training reads."""
        return self.place / "data"

    @property
    def ranking(self) -> Path:
        """The ranking by the student of the start, which all arms share that do not ask for another."""
        return self.place / "difficulty.jsonl"

    @property
    def batch(self) -> int:
        """Examples of an update."""
        return self.regime.batch // self.size.shrink

    @property
    def is_made(self) -> bool:
        """Whether all of it is there."""
        return (self.place / "made.json").is_file()

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher has been trained."""
        return (self.shared / "made.json").is_file()

    def make_teacher(self) -> None:
        """Train the teacher, unless that was done; several processes may ask at once."""
        with alone(self.shared / "making"):
            if not self.has_teacher:
                self._make_teacher()

    def make(self) -> None:
        """Make the data and the student, likewise; they do not wait for the teacher."""
        with alone(self.place / "making"):
            if not self.is_made:
                self._make_own()

    def _draws(self, name: str) -> dict[str, list[dict[str, str]]]:
        """The records of the teacher, or else of this seed: none stands in two of them."""
        taken: set[str] = set()
        regime, shrink = self.regime, self.size.shrink
        drawn = {"teacher": make_records(Draw(self.size.teacher_examples), random.Random("teacher"), taken)}
        if name == "teacher":
            return drawn
        dice = random.Random(f"{regime.name} {self.seed}")
        return {
            "held out": make_records(Draw(self.size.held_out, regime.kinds, noisy=False), dice, taken),
            "train": make_records(Draw(regime.num_train // shrink, regime.kinds), dice, taken),
            "warmup": make_records(Draw(self.size.warmup_examples, regime.kinds), dice, taken),
        }

    def _untrained(self) -> Path:
        """The teacher before its training, with the tokenizer of all models."""
        folder = self.shared / "untrained"
        with alone(self.shared / "beginning"):
            if not folder.is_dir():
                texts = [f"{one['instruction']}\n\n{one['output']}" for one in self._draws("teacher")["teacher"]]
                save_untrained(make_tokenizer(texts), self.size.teacher, 0, self.shared / "new")
                replace_folder(self.shared / "new", folder)
        return folder

    def _make_teacher(self) -> None:
        records, untrained, data = self._draws("teacher")["teacher"], self._untrained(), self.shared / "data"
        write_data(records, [], load_tokenizer(str(untrained)), data)
        train_here(
            [*PLAIN, "--model", str(untrained), "--data-dir", str(data), "--lr", "2e-3"]
            + ["--global-batch-size", "32", "--epochs", str(self.size.teacher_epochs)],
            self.shared / "teacher",
        )
        write_json(self.shared / "made.json", {"teacher": len(records)})

    def _make_own(self) -> None:
        records, untrained = self._draws("own"), self.place / "untrained"
        tokenizer = load_tokenizer(str(self._untrained()))
        save_untrained(tokenizer, self.size.student, self.seed, untrained)
        write_data(records["warmup"], [], tokenizer, self.place / "warmup-data")
        write_data(records["train"], records["held out"], tokenizer, self.data)
        train_here(
            [*PLAIN, "--model", str(untrained), "--data-dir", str(self.place / "warmup-data"), "--lr", "4e-3"]
            + ["--global-batch-size", "16", "--epochs", str(self.regime.warmup_epochs), "--seed", str(self.seed)],
            self.place / "warmup",
        )
        write_json(self.place / "made.json", {name: len(rows) for name, rows in records.items()})


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with FolderLock(folder) as lock:
        while lock.take():
            time.sleep(0.2)
        yield


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A small byte-level BPE of these texts."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END)


def save_untrained(tokenizer: PreTrainedTokenizerFast, shape: tuple[int, int], seed: int, folder: Path) -> None:
    """A model of GPT-2's kind with random weights, without dropout."""
    width, layers = shape
    end = tokenizer.eos_token_id
    names = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=width, n_layer=layers, n_head=4, n_positions=MAX_LENGTH, **names, **dropout
    )
    config.initializer_range = width**-0.5  # GPT-2's own 0.02 is for wide models: these would wait long to learn
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(
    records: Sequence[dict[str, str]],
    held_out: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> None:
    """A processed folder, as tools/process_data.py writes one."""
    shutil.rmtree(folder, ignore_errors=True)
    splits = {}
    for name, rows in (("train", records), ("dev", held_out or records[:1])):
        splits[name] = pocl.encode(rows, tokenizer, template="plain", max_prompt_length=MAX_PROMPT)
        splits[name].table.save_to_disk(str(folder / name))
    write_json(
        folder / "manifest.json",
        {
            "format_version": FORMAT_VERSION,
            "fingerprint": splits["train"].fingerprint,
            "tokenizer": "testbed",
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "max_prompt_length": int(max(split.prompt_lengths.max() for split in splits.values())),
            "template": vars(splits["train"].template),
        },
    )


def train_here(flags: Sequence[str], output_dir: Path) -> pocl.RunFolder:
    """What ``train.py`` does with these flags, in this process -> the finished run's folder."""
    config = parse_train([*SHARED, *flags, "--output-dir", str(output_dir), "--run-name", "run"])
    device = torch.device("cpu")
    seed_everything(config.optimiser.seed)
    run = train.run_folder(config, device)
    config = with_sizes(config, vocabulary_size(load_tokenizer(config.models.model)), device)
    with run.locked():
        train.distil(config, run, device)
    return run
