"""Modules to train in full beside the low-rank pairs, by kind or by name."""

from collections.abc import Sequence

from torch import nn

from vislora.errors import AdapterError
from vislora.lora.names import fits, inside


def find_trained(model: nn.Module, wanted: Sequence[str], besides: Sequence[str] = ()) -> list[str]:
    """Names of the modules chosen by `wanted`, the outermost where one contains another.

    Args:
        model: any model.
        wanted: "norms" for every normalisation layer that has parameters, or a regular expression for the end of a
            module's name, beginning where a word between dots does: `norm`, `blocks\\.11\\.mlp`.
        besides: names that are trained anyway, left out of the result.

    Raises:
        AdapterError: one of `wanted` fits no module with parameters; a module that is chosen is in the model by a
            second name, where it would stay as it is; or PEFT, which finds such modules by the ends of their names,
            couldn't tell one that is chosen, or trained anyway, from one that isn't.
    """
    with_parameters = {n: m for n, m in model.named_modules() if n and next(m.parameters(), None) is not None}
    chosen: set[str] = set()
    for word in wanted:
        if word == "norms":
            found = {name for name, module in with_parameters.items() if _is_norm(module)}
        else:
            found = {name for name in with_parameters if fits(word, name)}
        if not found:
            raise AdapterError(_nothing_found(model, word))
        chosen |= found
    whole = [*chosen, *besides]
    outermost = [n for n in chosen if n not in besides and not any(inside(n, other) for other in whole if other != n)]
    outermost.sort(key=list(with_parameters).index)
    trained = [*outermost, *besides]
    _check_single(model, outermost)
    for name in trained:
        if confused := [n for n in with_parameters if n.endswith(name) and n not in trained]:
            raise AdapterError(
                f"{name} can't be trained in full without {confused[0]}: PEFT finds modules by the ends of their "
                f"names; choose both, by adapter.trained=[{','.join([*wanted, confused[0]])}]"
            )
    return outermost


def _check_single(model: nn.Module, chosen: Sequence[str]) -> None:
    """Refuse a module that is part of another one too, as CoaT has one MLP in three places: an adapter's own copy would
    take one of them, and the merged model's file holds one for all."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for name in chosen:
        for module in model.get_submodule(name).modules():
            elsewhere = [other for other in names[module] if not inside(other, name)]
            if elsewhere and next(module.parameters(), None) is not None:
                raise AdapterError(
                    f"{name} can't be trained in full: it has a module in common with {elsewhere[0]}, which wouldn't "
                    "change with it; choose one that holds both, or leave it out"
                )


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and bool(module._parameters)


def _nothing_found(model: nn.Module, word: str) -> str:
    single = [n for n, _ in model.named_parameters() if word != "norms" and fits(word, n)]
    if single:
        return (
            f"{single[0]} is a single parameter; only whole modules can be trained in full, as PEFT's files hold them"
        )
    return f"{type(model).__name__} has no module with parameters that fits {word!r}; nothing to train in full"
