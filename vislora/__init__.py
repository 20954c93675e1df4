"""LoRA for computer vision: adapters for timm vision transformers and diffusers pipelines, from Hydra recipes."""

__version__ = "0.1.0"
