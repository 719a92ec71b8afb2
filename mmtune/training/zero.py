"""DeepSpeed's ZeRO over the language model, in place of PyTorch's FSDP2 (arXiv:1910.02054).

DeepSpeed gets the language model alone. Towers and projector, a small part of the weights, stay whole on
every process with an optimizer of their own, so a process whose rows hold no picture keeps none waiting.

Accelerate's own way into DeepSpeed is not taken: its backward pass steps in the same call, which leaves no
place for the look at loss and gradient before the step, and it refuses DeepSpeed on CPU processes.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mmtune.errors import CapabilityError
from mmtune.models.spread import spread_like
from mmtune.models.towers import tower_of
from mmtune.training.ranks import sum_gradients, sum_tensor, together, world_size

_SLOTS = ("exp_avg", "exp_avg_sq")


def deepspeed_is_here(device_type: str) -> None:
    """Raises CapabilityError where DeepSpeed is not installed; tells it on which kind of device it will run."""
    if importlib.util.find_spec("deepspeed") is None:
        raise CapabilityError(
            "finetune.engine deepspeed needs DeepSpeed, which is not installed",
            "install it: pip install 'mmtune[deepspeed]', or take engine: fsdp2",
            "no_deepspeed",
        )
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


class _Held(nn.Module):
    """What DeepSpeed sees of a model: the language model's parts or weights, and whatever runs through them."""

    def __init__(self, parts: list[nn.Module], weights: list[nn.Parameter]) -> None:
        super().__init__()
        self.parts, self.weights = nn.ModuleList(parts), nn.ParameterList(weights)

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


class _Named:
    """Some parameters by name, where a model is asked for."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._parameters.items()


def language_parts(model: nn.Module, name: str = "") -> list[nn.Module]:
    """Returns the largest modules all of whose weights are the language model's."""
    names = [own for own, _ in model.named_parameters(prefix=name)]
    if names and all(tower_of(own) == "llm" for own in names):
        return [model]
    inside = f"{name}." if name else ""
    return [part for own, child in model.named_children() for part in language_parts(child, inside + own)]


class Zero:
    """DeepSpeed's optimizer for the language model and one of ours for the rest, which step as one.

    Takes the steps as ``engine.Plain`` does, and is the optimizer too.

    Args:
        model: On its device; some of its language model trains.
        make: Makes AdamW for what ``named_parameters`` of its argument yields.
        stage: 2 spreads gradients and optimizer state over the processes, 3 the weights too.
        device: Of this process.
        offload: Optimizer state and gradients rest in the CPU's memory, where the optimizer steps.
    """

    together = True

    def __init__(
        self, model: Any, make: Callable[[Any], Any], *, stage: int, device: torch.device, offload: bool
    ) -> None:
        import deepspeed

        if stage == 3:
            # Every process then goes through the same layers backward, also one without a picture.
            model.enable_input_require_grads()
        trains = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._inside = {name: parameter for name, parameter in trains.items() if tower_of(name) == "llm"}
        outside = {name: parameter for name, parameter in trains.items() if name not in self._inside}
        self._outside = list(outside.values())
        self._rest = make(_Named(outside)) if outside else None
        self._base = make(_Named(self._inside))
        self._stage = stage
        held = _Held(language_parts(model), []) if stage == 3 else _Held([], list(self._inside.values()))
        with together("handing the language model to DeepSpeed"):
            self._engine, *_ = deepspeed.initialize(
                model=held,
                optimizer=self._base,
                config=_config(stage, offload, device),
                dist_init_required=False,
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both optimizers, live."""
        return [*self._engine.optimizer.param_groups, *(self._rest.param_groups if self._rest else [])]

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """Each parameter's slots, whole; all processes must ask. Empty before the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state as full

        found = dict(self._rest.state) if self._rest else {}
        steps = [slots["step"] for slots in self._base.state.values() if "step" in slots]
        if steps:
            for parameter in self._inside.values():
                found[parameter] = {"step": steps[0], **{slot: full(parameter, slot) for slot in _SLOTS}}
        return found

    def put_back(self, state: Mapping[nn.Parameter, Mapping[str, torch.Tensor]]) -> None:
        """Takes up whole slots as ``state`` gives them, in place; the weights must stand already."""
        zero = self._engine.optimizer
        zero.refresh_fp32_params()
        if self._rest:
            for parameter in self._outside:
                self._rest.state[parameter] = {
                    slot: value.clone().to(parameter.device) for slot, value in state.get(parameter, {}).items()
                }
        if not any(parameter in state for parameter in self._inside.values()):
            return
        step = next(state[parameter]["step"] for parameter in self._inside.values() if parameter in state)
        own = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for flat in own:
            self._base.state[flat] = {"step": step.clone().to(flat.device)}
            self._base.state[flat] |= {slot: torch.zeros_like(flat) for slot in _SLOTS}
        if self._stage == 2:
            zero._lazy_init_hp_params_optimizer_state()
        for parameter in self._inside.values():
            for slot in _SLOTS:
                self._put_slot(parameter, state[parameter][slot], slot)

    def _put_slot(self, parameter: nn.Parameter, value: torch.Tensor, slot: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 3:
            safe_set_local_optimizer_state(parameter, spread_like(value, parameter), slot)
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), slot)

    def run(self, compute: Callable[[], Any]) -> Any:
        """Returns what ``compute``, a forward pass, returns."""
        return self._engine(compute)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds a share of the step's loss to the gradients; ``last`` of this process's in the step."""
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over the processes; the loss is divided by all label tokens already.
        self._engine.backward(loss * world_size(), scale_wrt_gas=False)

    def exchange(self) -> None:
        """Sums the gradients of the rest over the processes; DeepSpeed has summed its own."""
        sum_gradients(self._outside)
        for parameter in self._outside:
            if parameter.grad is not None:
                parameter.grad /= world_size()

    def norm(self, clip: float | None) -> float:
        """Returns the norm of the gradient over all processes, and sees to it that the step is clipped."""
        inside = self._norm_inside()
        gradients = [parameter.grad for parameter in self._outside if parameter.grad is not None]
        total = math.hypot(inside, float(nn.utils.get_total_norm(gradients)) if gradients else 0.0)
        share = 1.0 if clip is None else min(clip / (total + 1e-6), 1.0)
        for gradient in gradients:
            gradient.mul_(share)
        # DeepSpeed divides by (its norm + 1e-6) / clip_grad where that is above one, and 0 stands for no limit.
        self._engine.optimizer.clip_grad = (inside + 1e-6) * share if share < 1.0 else 0.0
        return total

    def _norm_inside(self) -> float:
        if self._stage == 2:
            norm = float(self._engine.optimizer.scaled_global_norm())
            # What is not finite comes as -1.
            return norm if norm >= 0 else math.nan
        from deepspeed.utils import safe_get_local_grad

        squares = [safe_get_local_grad(parameter).float().square().sum() for parameter in self._inside.values()]
        return float(sum_tensor(torch.stack(squares).sum(), "measuring the gradient").sqrt())

    def step(self) -> None:
        """Moves the weights and forgets the gradients."""
        with together("stepping"):
            self._engine.step()
        if self._rest:
            self._rest.step()
            self._rest.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Forgets the gradients."""
        zero = self._engine.optimizer
        zero.zero_grad(set_to_none=True)
        if self._stage == 2:
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
            zero.all_grad_tensors = dict.fromkeys(zero.all_grad_tensors)
        if self._rest:
            self._rest.zero_grad(set_to_none=True)


def _config(stage: int, offload: bool, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": on_gpu}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Ours is torch's AdamW, whose fused kernel runs on a CPU too.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
