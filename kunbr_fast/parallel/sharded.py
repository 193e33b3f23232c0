"""A model's decoder layers in parts on several processes, by torch's FSDP2 (`fully_shard`).

Inside `sharded` each rank holds some rows of every parameter of the layers. A layer is put together when it runs,
forward and backward, and taken apart again; its gradient is summed into the same rows. Embedding, final norm and head
stay whole on every rank. Afterwards the model is what it was, with the weights that it has then.

FSDP takes hold of a module around each layer, so that the layer keeps its class, its hooks and a fused `forward`, and
nothing is gathered where only the layer's arguments are recorded (`Decoder.layer_calls`). All ranks must run the same
layers in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kunbr_fast.files.row_files import rows_in, rows_of
from kunbr_fast.files.tensors import WeightSnapshot, placeholder
from kunbr_fast.parallel.group import Group

SHARDING = ("none", "fsdp", "fsdp_cover")
MARK = "_kunbr_shards"  # on a model: its `RankShards`
UNUSED = "set_reduce_scatter_unused_params"
HALF = (torch.float16, torch.bfloat16)


def check_shardable(model: nn.Module, layers: Sequence[nn.Module], sharding: str = "fsdp") -> None:
    """ValueError, naming the parameter, where the layers' parameters, or all of them, cannot be divided by rows."""
    from torch.distributed.fsdp import FSDPModule

    listed = [layer for layer in layers if any(isinstance(module, nn.ModuleList) for module in layer.modules())]
    if listed and not hasattr(FSDPModule, UNUSED):
        raise ValueError(
            f"sharding={sharding!r}: {type(listed[0]).__name__} has a list of modules, such as experts, of which a "
            f"rank may use none, and FSDP in torch {torch.__version__} has no {UNUSED}: take a later torch"
        )
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    inside = {id(parameter): layer for layer in layers for parameter in layer.parameters()}
    for parameter in model.parameters():
        name, *others = names[id(parameter)]
        whys = ["it is a single number, without rows"] * (parameter.dim() == 0)
        if id(parameter) in inside:
            dtype = next(inside[id(parameter)].parameters()).dtype
            whys += [f"it is {others[0]} too"] if others else []
            whys += ["it is not contiguous"] * (not parameter.is_contiguous())
            whys += [f"it is {parameter.dtype}, others of its layer {dtype}"] * (parameter.dtype != dtype)
        if whys:
            raise ValueError(f"sharding={sharding!r}: {name} cannot be in parts, since {whys[0]}: leave sharding out")


class _Around(nn.Module):
    """A layer, as FSDP holds it: calls the forward that the layer had."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self._forward = layer, layer.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


class _All(nn.Module):
    """All of them, so that they share FSDP's streams, and a layer is gathered while the one before it runs."""

    def __init__(self, layers: Sequence[_Around]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class RankShards:
    """This rank's parts of a model in which `layers` are sharded.

    parts: where it is trained, by the model's names this rank's rows of every parameter, of those that stay whole too;
    plain parameters on the storage that the model uses. A part may be empty. `spread` tells the other ranks the rows of
    what stays whole.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], group: Group, trained: bool):
        self.group, self._model, self._layers, self._trained = group, model, list(layers), trained
        self._originals = dict(model.named_parameters())
        inside = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        self._places = [
            (module, name, parameter)
            for layer in self._layers
            for module in layer.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._hooks = [(m, m._load_state_dict_post_hooks.copy()) for layer in self._layers for m in layer.modules()]
        self._forwards = [(layer, layer.__dict__.get("forward")) for layer in self._layers]
        self._whole = {name: p for name, p in self._originals.items() if id(p) not in inside}
        self._all = self._divide()
        self._held = dict(model.named_parameters())  # FSDP's, of the layers
        self.parts: dict[str, nn.Parameter] = {}
        if trained:
            with torch.no_grad():
                self.parts = {name: nn.Parameter(self._mine(name, p.data)) for name, p in self._held.items()}
        setattr(model, MARK, self)

    def _divide(self) -> _All:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        around, first = [], next(iter(self._originals.values()))
        mesh = init_device_mesh(first.device.type, (self.group.size,))
        # sums as `Group.sum` does
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if first.dtype in HALF else None)
        for layer in self._layers:
            own = list(layer.parameters())
            for parameter in own:
                parameter.requires_grad_(self._trained)
            around.append(_Around(layer))
            fully_shard(around[-1], mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            for parameter in own:  # the same objects come back in `restore`
                parameter.data = placeholder(parameter.shape, parameter.dtype, parameter.device)
            layer.forward = self._calling(around[-1])
        found = fully_shard(_All(around), mesh=mesh, mp_policy=policy)
        for module in around:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
            if hasattr(module, UNUSED):  # an expert without tokens on one rank
                getattr(module, UNUSED)(True)
        found(lambda: None)  # makes it the root of all
        return found

    def _calling(self, around: _Around) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.group.computing():
                return around(*args, **kwargs)

        forward.takes_rows = getattr(around._forward, "takes_rows", False)  # see Decoder.run
        return forward

    def run(self, call: Callable[[], Any]) -> Any:
        """`call()`, a forward pass."""
        return self._all(call)

    def _mine(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """This rank's rows of what is stored or accumulated of a parameter."""
        if name not in self._whole:
            return value.to_local()
        rows = self.rows(name)
        return value[rows.start : rows.stop]

    def rows(self, name: str, rank: int | None = None) -> range:
        """Of a parameter, those that a rank (None: this one) has."""
        return rows_of(len(self._originals[name]), self.group.rank if rank is None else rank, self.group.size)

    # ------------------------------------------------ gradients

    def unsummed(self) -> list[torch.Tensor]:
        """The gradients that FSDP does not sum: of what stays whole. The same tensors on each rank."""
        for parameter in self._whole.values():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self._whole.values() if parameter.grad is not None]

    def gradients(self) -> list[torch.Tensor]:
        """Of the parts, whose `.grad` they become: views of what is accumulated."""
        for name, part in self.parts.items():
            grad = self._held[name].grad
            part.grad = None if grad is None else self._mine(name, grad)
        return [part.grad for part in self.parts.values() if part.grad is not None and part.numel()]

    def drop_gradients(self) -> None:
        for parameters in (self.parts, self._held):
            for parameter in parameters.values():
                parameter.grad = None

    # ------------------------------------------------ weights

    @property
    def whole(self) -> dict[str, torch.Tensor]:
        """What every rank holds whole, by name."""
        return {name: parameter.detach() for name, parameter in self._whole.items()}

    @torch.no_grad()
    def spread(self) -> None:
        """The rows of the whole parameters that each rank has updated become everybody's."""
        for name, parameter in self._whole.items():
            rows = [self.rows(name, rank) for rank in range(self.group.size)]
            self.group.send([parameter.data[part.start : part.stop] for part in rows])

    @torch.no_grad()
    def take(self, weights: Mapping[str, torch.Tensor]) -> None:
        """These, by name (or of several ranks' files, `RowFiles`), become the model's weights."""
        for name, part in self.parts.items():
            if name in self._whole:
                self._whole[name].data.copy_(weights[name])
            elif part.numel():
                part.copy_(rows_in(weights, name, self.rows(name)))

    @torch.no_grad()
    def end(self, gather: bool) -> None:
        """The layers are whole again, with the same parameters as before; without `gather` their values are
        undefined."""
        for module, name, original in self._places:
            sharded = module._parameters[name]
            if gather:
                with self.group.computing():
                    original.data = sharded.full_tensor()
            else:
                original.data = torch.empty(original.shape, dtype=original.dtype, device=original.device)
            module._parameters[name] = original
            del sharded
        for module, hooks in self._hooks:  # what FSDP has left in them
            for name in [name for name in vars(module) if "fsdp" in name]:
                delattr(module, name)
            module._load_state_dict_post_hooks = hooks
        for layer, forward in self._forwards:
            del layer.forward
            if forward is not None:
                layer.forward = forward
        self.parts, self._held, self._all = {}, {}, None
        delattr(self._model, MARK)


def shards_of(model: nn.Module) -> RankShards | None:
    """Of a model inside `sharded`."""
    return vars(model).get(MARK)


@contextlib.contextmanager
def sharded(
    model: nn.Module, layers: Sequence[nn.Module], group: Group, snapshot: WeightSnapshot, trained: bool = True
) -> Iterator[RankShards]:
    """Inside, these layers of the model are in parts on the group's ranks; afterwards they are whole, with the weights
    that they have then, or after an exception with those in `snapshot`, which needs no other rank.

    trained: whether the layers' parameters require grad inside.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    shards = RankShards(model, layers, group, trained)
    try:
        yield shards
        shards.end(True)
    except BaseException:
        shards.end(False)
        snapshot.restore(model)
        raise
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
