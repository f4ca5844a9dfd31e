"""lm-evaluation-harness reads a saved student as it is; skipped where it is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_the_documented_command_scores_a_saved_student(gpt2_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    records = [{"question": f"What is {i}?", "choices": ["a number", "a bird"], "answer": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "task.yaml").write_text(TASK.replace("DATA", str(tmp_path / "data.jsonl")))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
    command += [f"pretrained={gpt2_dir},dtype=float32", "--tasks", "tiny_choice", "--device", "cpu"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("results*.json")
    assert 0 <= json.loads(path.read_text())["results"]["tiny_choice"]["acc,none"] <= 1
