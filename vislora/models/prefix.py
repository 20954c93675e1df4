"""The frozen blocks before the first one that is trained: computed apart from the rest, and left out of it."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from torch import Tensor, nn

from vislora.errors import ConfigError, ModelError


class Prefix:
    """What a model computes before its first trained block, where its trunk is a sequence of blocks (`model.blocks`).

    The model's own code runs in both parts. `features` stops it after the last frozen block; while `skipped`, it starts
    from a blank picture, the frozen blocks pass their input on, and the last of them answers with the features. What
    the later blocks get besides (rotary embeddings, masks, shared biases) is thereby made by the model as always.

    Args:
        model: in eval mode, with everything that is to be trained requiring a gradient.
        images: an example, [B, 3, H, W] with B > 1, to prove on that nothing but the features crosses the cut.

    Attributes:
        count: frozen blocks at the start.
        total: all blocks.
        shape, dtype: of the features of one picture.

    Raises:
        ModelError: no sequence of blocks, or more crosses the cut than one tensor of features.
        ConfigError: the first block is trained, something else before the cut is, or a picture comes out differently
            each time.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model = model
        self.blocks = _blocks(model)
        self.total = len(self.blocks)
        self.count = next((i for i, b in enumerate(self.blocks) if _trained(b)), self.total)
        if self.count == 0:
            raise ConfigError(
                "trainer.prefix_cache: the first block is trained, so that no frozen ones come before it; adapt the "
                "last blocks alone (adapter=lora adapter.blocks=[-4,-3,-2,-1]), or set trainer.prefix_cache=off"
            )
        features = self._prove_deterministic(images)
        self.shape, self.dtype = features.shape[1:], features.dtype
        self._prove_alone(images, features)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the last frozen block answers for images [B, 3, H, W]: [B, *shape]. The model must be in eval mode."""

        def stop(_block: nn.Module, _args: tuple, output: Tensor) -> None:
            raise _Reached(output)

        handle = self.blocks[self.count - 1].register_forward_hook(stop)
        try:
            self.model(images)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise ModelError(f"{type(self.model).__name__} doesn't call its blocks; set trainer.prefix_cache=off")

    @contextmanager
    def skipped(self, size: tuple[int, ...]) -> Iterator[None]:
        """Meanwhile the model takes features [B, *shape] in place of images [B, *size], and starts after the cut."""
        held: list[Tensor] = []

        def take(_model: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            held[:] = [args[0]]
            return (args[0].new_zeros(len(args[0]), *size, dtype=torch.float32),)

        frozen = list(self.blocks)[: self.count]
        handle = self.model.register_forward_pre_hook(take)
        for block in frozen[:-1]:
            block.forward = lambda x, *_, **__: x
        frozen[-1].forward = lambda *_, **__: held.pop()
        try:
            yield
        finally:
            handle.remove()
            for block in frozen:
                del block.forward

    def key(self, settings: str) -> str:
        """A hash of all that decides the features of a picture: frozen weights, `settings` (how the model was built,
        the precision, in what attention is computed), device and versions."""
        device = next(self.model.parameters()).device.type
        text = (
            f"{type(self.model)} {self.count} {self.shape} {settings} {device} {torch.__version__} {timm.__version__}"
        )
        digest = hashlib.sha256(text.encode())
        rest = {id(t) for b in list(self.blocks)[self.count :] for t in b.state_dict(keep_vars=True).values()}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in rest and not tensor.requires_grad:
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _prove_deterministic(self, images: Tensor) -> Tensor:
        """The example's features, with a look at every module that takes part in them."""
        seen: set[nn.Module] = {m for block in list(self.blocks)[: self.count] for m in block.modules()}
        handles = [m.register_forward_pre_hook(lambda m, _: seen.add(m)) for m in self.model.modules()]
        try:
            features = self.features(images)
        finally:
            for handle in handles:
                handle.remove()
        for name, module in self.model.named_modules():
            if module in seen and (varies := _varies(module)) is not None:
                raise ConfigError(
                    f"trainer.prefix_cache: {name} ({type(module).__name__}) {varies} trainer.prefix_cache=off"
                )
        if not isinstance(features, Tensor) or features.shape[:1] != images.shape[:1]:
            raise ModelError(
                f"trainer.prefix_cache: a block of {type(self.model).__name__} doesn't answer with one tensor "
                "[B, …]; set trainer.prefix_cache=off"
            )
        return features

    def _prove_alone(self, images: Tensor, features: Tensor) -> None:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        # with gradients first: autocast in torch 2.9 would take casts made under no_grad, which have none
        with self.skipped(images.shape[1:]), torch.enable_grad():
            found = self.model(features)
            grads = torch.autograd.grad(found.sum(), list(trained.values()), allow_unused=True)
        with torch.no_grad():
            wanted = self.model(images)
        if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max())):
            raise ModelError(
                f"trainer.prefix_cache: {type(self.model).__name__} uses more of a picture than what reaches block "
                f"{self.count}, so that its features can't stand for it; set trainer.prefix_cache=off"
            )
        if before := [name for name, grad in zip(trained, grads, strict=True) if grad is None]:
            raise ConfigError(
                f"trainer.prefix_cache: {before[0]} is trained and comes before block {self.count}, up to which "
                "features are kept; set trainer.prefix_cache=off"
            )


class _Reached(Exception):
    def __init__(self, output: Tensor) -> None:
        self.output = output


def _blocks(model: nn.Module) -> nn.Sequential | nn.ModuleList:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or len(blocks) == 0:
        raise ModelError(
            f"trainer.prefix_cache: {type(model).__name__} has no sequence of blocks (model.blocks) to cut; "
            "set trainer.prefix_cache=off"
        )
    return blocks


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _varies(module: nn.Module) -> str | None:
    """Why a picture comes out of a frozen module differently each time in training, and what to do; None where it
    doesn't, as of BatchNorm with statistics of its own, which the trainer keeps in eval mode."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "goes by the statistics of each batch; set" if module.running_mean is None else None
    rates = [getattr(module, name, None) for name in ("p", "drop_prob", "prob")]  # torch's and timm's names
    if "Drop" in type(module).__name__ and any(rate for rate in rates if isinstance(rate, float | int)):
        return "draws random numbers; set model.drop_path and dropouts in model.args to 0, or"
    return None
