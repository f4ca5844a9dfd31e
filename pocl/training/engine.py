"""The only file that knows DeepSpeed: forward, backward, one optimiser step, a fresh optimiser, full weights."""

import contextlib
import io
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pocl.common import distributed
from pocl.common.errors import RunStopped, UserError
from pocl.common.files import read_json
from pocl.data.batch import Batch
from pocl.losses.head import Head
from pocl.losses.token import StageObjective, Weights
from pocl.models.loading import fuse_activations
from pocl.models.lora import merged_weights
from pocl.training.student import StudentObjective

# fp16 loss scaling: starts at 2^16, as torch's own scaler does.
_FP16 = {"enabled": True, "initial_scale_power": 16}
# Entries of ZeRO's state that describe the code rather than the run.
_NOT_KEPT = ("param_slice_mappings", "zero_stage", "universal_checkpoint_info")


class Engine:
    """Student and objective under DeepSpeed with AdamW. Gradients accumulate over ``backward`` until ``step``."""

    def __init__(
        self,
        module: StudentObjective,
        *,
        lr: float,
        weight_decay: float,
        clip_grad: float,
        dtype: str,
        config_path: Path,
        global_batch_size: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        deepspeed = _import_deepspeed()
        config = check_precision(config_path, dtype, device)
        self.zero_stage = zero_stage(config)
        module.to(device)
        module.sharded = self.zero_stage == 3
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.scales_loss = dtype == "fp16"
        optimizer = torch.optim.AdamW(_groups(parameters, weight_decay), lr=lr, fused=True)
        config |= {
            "train_batch_size": global_batch_size,
            "train_micro_batch_size_per_gpu": global_batch_size // world_size,
            "gradient_accumulation_steps": 1,
            # step() is the boundary: the number of micro-batches may differ from one step to the next.
            "managed_gradient_accumulation": False,
            "gradient_clipping": clip_grad,
            "fp16": _FP16 if dtype == "fp16" else {"enabled": False},
            # Its check looks at every gradient separately; the global norm tells the same.
            "bf16": {"enabled": dtype == "bf16", "check_grad_overflow": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, even if its states are offloaded to the CPU
            "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU before every micro-batch
            "steps_per_print": None,
        }
        self._module, self.world_size = module, world_size
        self._adamw, self._norm = optimizer, torch.zeros(())
        if self.zero_stage == 0 and dtype == "fp32":
            # DeepSpeed steps plain AdamW here and clips without reporting the norm: clip just before the step instead.
            config["gradient_clipping"] = 0.0
            optimizer.register_step_pre_hook(lambda *_: self._clip(parameters, clip_grad))
        elif self.zero_stage < 3 and dtype == "bf16":
            optimizer.register_step_pre_hook(
                lambda *_: self._leave_out_unless_finite(self._optimizer._global_grad_norm)
            )
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints about its own build
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        self._gathered = deepspeed.zero.GatheredParameters
        if self.zero_stage == 3:
            # Their gradients are returned after the head's call has ended: they must be gathered there too.
            for parameter in module.head.trained_parameters():
                deepspeed.zero.register_external_parameter(module, parameter)

    def forward(
        self,
        batch: Batch,
        term: StageObjective,
        teacher_states: Tensor | None = None,
        teacher_head: Head | None = None,
        weights: Weights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``StudentObjective.forward``: (summed loss [], cross-entropy [N], divergence [N]) of a micro-batch."""
        return self._engine(batch, term, teacher_states, teacher_head, weights)

    def backward(self, loss_sum: Tensor, num_tokens: float) -> None:
        """Add the gradient of ``loss_sum / num_tokens``; ``num_tokens`` counts the whole step, over all ranks.

        DeepSpeed averages over ranks, which the factor ``world_size`` undoes.
        """
        self._engine.backward(loss_sum * (self.world_size / num_tokens))

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip, update, clear the gradients -> (global gradient norm before clipping, whether it was applied).

        A gradient that is not finite is not applied, in any precision; under fp16 the loss scale is lowered then.
        Raises RunStopped if that scale cannot be lowered any further.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        try:
            self._engine.step()
        except Exception as error:
            if not self.scales_loss or "minimum" not in str(error):
                raise
            raise RunStopped(
                "fp16 gradients overflow at the smallest loss scale: the run diverges, this is not a lack of range; "
                "lower `lr`, or use `dtype` bf16"
            ) from error
        clips = self.zero_stage == 0 and not self.scales_loss
        norm = self._norm if clips else self._engine.get_global_grad_norm()
        norm = float("nan" if norm is None else norm)
        return norm, self._engine.was_step_applied() and math.isfinite(norm)

    def _clip(self, parameters: list[nn.Parameter], clip_grad: float) -> None:
        self._norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
        self._leave_out_unless_finite(self._norm)

    def _leave_out_unless_finite(self, norm: Tensor) -> None:
        """Skip the AdamW update (weights, moments, step count) if the gradient norm is not finite.

        AdamW's fused kernel reads ``found_inf`` on the device, so nothing waits for the norm.
        """
        weights = self._adamw.param_groups[0]["params"][0]  # on the CPU if DeepSpeed offloads the optimiser
        self._adamw.found_inf = (~(norm.isfinite() & (norm >= 0))).float().reshape(()).to(weights.device)

    def fresh_optimizer(self) -> None:
        """Reset AdamW's moments and its step count, as in a new optimiser; weights stay."""
        optimizer = self._optimizer
        while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        # In place: ZeRO keeps references to these tensors.
        for state in optimizer.state.values():
            for name, value in state.items():
                state[name] = value.zero_() if isinstance(value, Tensor) else type(value)(0)

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The full weights of ``model`` (a part of the module), on the CPU of every rank; tied ones once."""
        weights, seen = {}, set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            with self._gathered([parameter], enabled=self.zero_stage == 3):
                weights[name] = parameter.detach().cpu().clone()
        kept = model.state_dict()  # for names: a non-persistent buffer is in no model folder
        weights.update({name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers() if name in kept})
        return weights

    def gathered(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with all of its weights here: itself, or a copy if ZeRO-3 has sharded them."""
        if self.zero_stage < 3:
            return model
        with torch.random.fork_rng(devices=[]):  # its initial weights are random, and overwritten
            copy = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
        fuse_activations(copy)
        copy.load_state_dict(merged_weights(model, self.full_state_dict(model)), strict=False)
        copy.generation_config = model.generation_config
        return copy.to(model.device).eval()

    def trained_weights(self) -> dict[str, Tensor]:
        """The trained weights, unsharded, on the CPU of every rank; tied ones once, under the module's names."""
        weights = {}
        for name, parameter in self._trained():
            with self._gathered([parameter], enabled=self.zero_stage == 3):
                weights[name] = parameter.detach().cpu().clone()
        return weights

    def optimizer_state(self) -> dict[str, Any]:
        """This rank's shard of the optimiser: AdamW's moments, fp32 weights under ZeRO, the loss scale."""
        with self._at_rest():
            state = dict(self._optimizer.state_dict())
        if self.zero_stage == 0:
            return state
        scaler = vars(self._optimizer.loss_scaler)
        state["loss_scaler"] = {name: value for name, value in scaler.items() if isinstance(value, (bool, int, float))}
        return {name: value for name, value in state.items() if name not in _NOT_KEPT}

    def load(self, weights: Mapping[str, Tensor], optimizer_state: dict[str, Any] | None) -> None:
        """Load unsharded trained weights and this rank's optimiser state; if that is None, AdamW starts anew.

        Raises UserError for weights of another model.
        """
        trained = dict(self._trained())
        if {name: list(tensor.shape) for name, tensor in weights.items()} != {
            name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trained.items()
        }:
            raise UserError("the checkpoint holds the weights of a model other than the student")
        for name, parameter in trained.items():
            with torch.no_grad(), self._gathered([parameter], modifier_rank=0, enabled=self.zero_stage == 3):
                if self.zero_stage < 3 or distributed.is_main():
                    parameter.copy_(weights[name])
        if optimizer_state is None:
            if self.zero_stage:
                self._optimizer.refresh_fp32_params()
        elif self.zero_stage == 0:
            self._optimizer.load_state_dict(optimizer_state)
        else:
            scaler = self._optimizer.loss_scaler
            vars(scaler).update(optimizer_state["loss_scaler"])
            state = optimizer_state | {"loss_scaler": scaler}
            with self._at_rest():
                self._optimizer.load_state_dict({distributed.rank(): state}, load_from_fp32_weights=True)

    def _trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Keep ZeRO-3's weights sharded while its state is read or written."""
        if self.zero_stage < 3:
            yield
            return
        self._optimizer.checkpoint_event_prologue()
        yield
        self._optimizer.checkpoint_event_epilogue()


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """The DeepSpeed JSON.  Raises UserError for keys that train.py's own flags set."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}; a DeepSpeed configuration is a JSON object")
    ours = {
        "train_batch_size": "`global_batch_size`",
        "train_micro_batch_size_per_gpu": "`batch_size`",
        "gradient_accumulation_steps": "`global_batch_size` and `batch_size`",
        "gradient_clipping": "`clip_grad`",
        "optimizer": "`lr` and `weight_decay`",
        "scheduler": "`lr` and `min_lr`",
        "fp16": "`dtype`",
        "bf16": "`dtype`",
    }
    for key, parameters in ours.items():
        if key in config:
            raise UserError(f"{path} sets {key!r}; use {parameters} instead")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        raise UserError(f"{path}: 'zero_optimization' must be an object whose 'stage' is 0, 1, 2 or 3")
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage that a DeepSpeed configuration asks for."""
    return config.get("zero_optimization", {}).get("stage", 0)


def check_precision(path: Path, dtype: str, device: torch.device) -> dict[str, Any]:
    """The DeepSpeed JSON at ``path``.  Raises UserError if it or the device cannot train in ``dtype``."""
    config = read_deepspeed_config(path)
    if dtype == "fp16" and device.type != "cuda":
        raise UserError("`dtype` fp16 needs a GPU; on the CPU use fp32 (or bf16)")
    if dtype != "fp32" and zero_stage(config) == 0:
        raise UserError(
            f"`dtype` {dtype} needs ZeRO stage 1 to 3, which keep fp32 master weights; {path} sets stage 0 "
            f"(use `deepspeed_config` scripts/deepspeed/zero1.json)"
        )
    return config


def _groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay, biases and the weights of norms do not (as in DistiLLM's code)."""
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _import_deepspeed() -> Any:
    """DeepSpeed, logging only warnings."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if os.environ["DS_ACCELERATOR"] == "cpu":
        # It would compile its own all-reduce at the first start, which takes a compiler and a minute. On a GPU nothing
        # needs it, and accessing this dictionary probes every CUDA extension.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
