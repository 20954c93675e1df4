"""LoRA for computer vision: adapters for timm vision transformers and diffusers pipelines, from Hydra recipes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vislora.pipeline import Applied, apply, unapply

__version__ = "0.1.0"
__all__ = ["Applied", "apply", "unapply"]


def __getattr__(name: str) -> Any:
    """torch is imported when the first of `__all__` is asked for, so that the commands can check a configuration
    before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vislora import pipeline

    return getattr(pipeline, name)
