"""LearnedOptimizer in timm's registry: its factory, and so its train.py, then knows it as --opt learned. Optional argument: steps.

In an environment of its own, since torchvision loads only beside the torch that it was made with:

    pip install . timm torchvision -c constraints-timm.txt
"""

import sys

import timm
import torch
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry

from learned_optim import LearnedOptimizer

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 30

# No underscore in the name, which timm removes when it looks one up.
default_registry.register(OptimInfo("learned", LearnedOptimizer, "A pretrained LSTM in place of AdamW", has_eps=False, has_momentum=False))

if __name__ == "__main__":
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    model = timm.create_model("resnet10t", num_classes=4)
    optimizer = create_optimizer_v2(model, opt="learned", lr=1.0, weight_decay=0.05)  # lr multiplies the learned update
    losses = []
    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at step {STEPS}")
