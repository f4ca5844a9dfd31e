"""The only file that knows DeepSpeed: forward, backward, one optimiser step, a fresh optimiser, full weights."""

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pocl.common import distributed
from pocl.common.errors import RunStopped, UserError
from pocl.data.batch import Batch
from pocl.losses.chunked import LossValues
from pocl.losses.head import HiddenStates
from pocl.losses.token import StageObjective, Weights
from pocl.models.loading import DTYPES, fuse_activations
from pocl.models.lora import merged_weights
from pocl.training.deepspeed_config import check_precision, zero_stage
from pocl.training.module import StudentObjective
from pocl.training.moments import clear_moments

# fp16 loss scaling: starts at 2^16, as torch's own scaler does.
_FP16 = {"enabled": True, "initial_scale_power": 16}
# Entries of ZeRO's state that describe the code rather than the run.
_NOT_KEPT = ("param_slice_mappings", "zero_stage", "universal_checkpoint_info")


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW, and how DeepSpeed runs it."""

    weight_decay: float = 0.01
    clip_grad: float = 1.0  # maximum global L2 norm
    deepspeed_config: Path | None = None  # a JSON file that sets the ZeRO stage; None: 0, and 1 below fp32


class Engine:
    """Student and objective under DeepSpeed with AdamW. Gradients accumulate over ``backward`` until ``step``."""

    def __init__(self, module: StudentObjective, settings: OptimiserSettings, device: torch.device) -> None:
        deepspeed = _import_deepspeed()
        distributed.join()
        dtype = next(name for name, kind in DTYPES.items() if kind == module.student.dtype)
        config = check_precision(settings.deepspeed_config, dtype, device)
        self.zero_stage, self.scales_loss = zero_stage(config), dtype == "fp16"
        self.world_size = distributed.world_size()
        module.to(device)
        module.sharded = self.zero_stage == 3
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._module, self._norm = module, torch.zeros(())
        self._adamw = torch.optim.AdamW(_groups(parameters, settings.weight_decay), fused=True)
        guard = self._guard(parameters, settings.clip_grad, dtype)
        if guard is not None:
            self._adamw.register_step_pre_hook(lambda *_: self._leave_out_unless_finite(guard()))
        clip_grad = settings.clip_grad if self.zero_stage else 0.0  # without ZeRO the guard clips
        config |= _deepspeed_settings(clip_grad, dtype, self.world_size)
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints about its own build
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=self._adamw, config=config, dist_init_required=False
            )
        self._gathered = deepspeed.zero.GatheredParameters
        if self.zero_stage == 3:
            # Their gradients are returned after the head's call has ended: they must be gathered there too.
            for parameter in module.head.trained_parameters():
                deepspeed.zero.register_external_parameter(module, parameter)

    def _guard(self, parameters: list[nn.Parameter], clip_grad: float, dtype: str) -> Callable[[], Tensor] | None:
        """What knows the norm of the whole gradient just before AdamW's step; None if DeepSpeed checks it by itself.

        Without ZeRO, DeepSpeed steps plain AdamW and would clip without telling the norm, so it is clipped here.
        """
        if self.zero_stage == 0:
            return lambda: torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
        if self.zero_stage < 3 and dtype == "bf16":
            return lambda: self._optimizer._global_grad_norm
        return None

    def forward(
        self,
        batch: Batch,
        objective: StageObjective,
        teacher: HiddenStates | None = None,
        weights: Weights | None = None,
    ) -> LossValues:
        """``StudentObjective.forward``: the objective of a micro-batch, summed, and its parts by token."""
        return LossValues(*self._engine(batch, objective, teacher, weights))

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
        norm = self._norm if self.zero_stage == 0 else self._engine.get_global_grad_norm()
        norm = float("nan" if norm is None else norm)
        return norm, self._engine.was_step_applied() and math.isfinite(norm)

    def _leave_out_unless_finite(self, norm: Tensor) -> None:
        """Skip the AdamW update (weights, moments, step count) if the gradient norm is not finite.

        AdamW's fused kernel reads ``found_inf`` on the device, so nothing waits for the norm.
        """
        self._norm = norm
        weights = self._adamw.param_groups[0]["params"][0]  # on the CPU if DeepSpeed offloads the optimiser
        found_inf = (~(norm.isfinite() & (norm >= 0))).float().reshape(())
        self._adamw.found_inf = found_inf.to(weights.device)  # type: ignore[attr-defined]  # torch reads it if it is there

    def fresh_optimizer(self) -> None:
        """Reset AdamW's moments and its step count, as in a new optimiser; weights stay."""
        clear_moments(self._optimizer)

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


def _deepspeed_settings(clip_grad: float, dtype: str, world_size: int) -> dict[str, Any]:
    """What of DeepSpeed's configuration is not the user's."""
    return {
        # step() is the boundary: the number of micro-batches, and their sizes, may differ from one step to the next.
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
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
