"""A pass of a model over a split, divided over processes, without a trace of the division in its result."""

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vislora.config.training import Precision
from vislora.data.order import eval_loader
from vislora.data.splits import ImageSplit
from vislora.data.transforms import Preprocessing, eval_transform
from vislora.errors import ModelError, first_three
from vislora.precision import autocast_dtype


@dataclass(frozen=True)
class Inference:
    """How models are run."""

    batch_size: int
    precision: Precision
    workers: int
    accelerator: Accelerator

    @torch.inference_mode()
    def outputs(self, model: nn.Module, split: ImageSplit, preprocessing: Preprocessing) -> tuple[Tensor, float]:
        """The model's outputs of all of the split's images, in their order, float32 [N, D] on the CPU of every process;
        and how many images a second it took in, decoding included.

        Raises:
            ModelError: it computes no finite numbers of an image, from which no figure could be taken.
        """
        device, rank, world = self.accelerator.device, self.accelerator.process_index, self.accelerator.num_processes
        loader = eval_loader(split, eval_transform(preprocessing), self.batch_size, self.workers, rank, world)
        dtype = autocast_dtype(self.precision)
        mine, since = [], time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            for images, _, indices in loader:
                mine.append((indices[0].item(), model(images.to(device)).float().cpu()))
        # whole batches were dealt out, each starting at an index of its own
        batches = sorted(gather_object(mine), key=lambda batch: batch[0])
        speed = round(len(split) / (time.perf_counter() - since), 1)
        found = torch.cat([outputs for _, outputs in batches])
        if infinite := (~found.isfinite().all(1)).nonzero()[:, 0].tolist():
            remedy = "its weights may be broken; train or export it again"
            if dtype is torch.float16:  # which ends at 65,504
                remedy = "give precision=fp32 (in a training trainer.precision=fp32)"
            raise ModelError(
                f"in {self.precision.value} the model computes no finite numbers of "
                f"{first_three([split.names[i] for i in infinite])}; {remedy}"
            )
        return found, speed
