"""Writes optim.json: 14 steps of torch's RMSprop with linear warm-up and clipping on a small problem (extra: parity).

The gradient is `scale[step] * curvature * params`, so that some steps are clipped and some are not. Everything is float32.
"""

import json
from pathlib import Path

import torch

PEAK, WARMUP, MAX_NORM, STEPS = 0.05, 4, 10.0, 14

start = {"a": [[1.0, -2.0, 0.5], [0.25, 3.0, -1.5]], "b": [0.35, -0.7]}
curvature = {"a": [[1.0, 2.0, 0.1], [5.0, 0.5, 1.0]], "b": [3.0, 0.01]}
scale = [0.1 if step % 3 == 0 else 4.0 for step in range(STEPS)]

params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
optimizer = torch.optim.RMSprop(list(params.values()), lr=PEAK)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: min(1.0, (step + 1) / (WARMUP + 1)))
steps = []
for step in range(STEPS):
    for name, value in params.items():
        value.grad = scale[step] * torch.tensor(curvature[name]) * value.detach()
    norm = torch.nn.utils.clip_grad_norm_(list(params.values()), MAX_NORM)
    rate = scheduler.get_last_lr()[0]
    optimizer.step()
    scheduler.step()
    steps.append({"lr": rate, "grad_norm": norm.item(), "params": {name: value.tolist() for name, value in params.items()}})

settings = {"peak": PEAK, "warmup_steps": WARMUP, "max_grad_norm": MAX_NORM, "torch": torch.__version__}
content = {"settings": settings, "start": start, "curvature": curvature, "scale": scale, "steps": steps}
Path(__file__).with_name("optim.json").write_text(json.dumps(content, indent=1) + "\n")
