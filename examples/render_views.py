"""Render a trained run from Python: `python render_views.py [RUN]` writes pictures and depths of its test views to views/.

Without an argument, it first trains the bundled garden for 100 steps: enough to see what it is.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

import prismfield as pf

run = sys.argv[1] if len(sys.argv) > 1 else pf.train_run(pf.TrainConfig(steps=100, downscale=2))[0]
scene = pf.load(run)
Path("views").mkdir(exist_ok=True)
for number, camera in enumerate(scene.cameras("test")[:4]):
    with torch.no_grad():
        out = pf.render(scene, camera, extras=("depth",))
    nearness = out.depth[0].clamp(min=1e-6).reciprocal()  # of user units
    picture = torch.cat([out.rgb[0], (nearness / nearness.quantile(0.99))[..., None].expand(-1, -1, 3)], dim=1)
    Image.fromarray((picture.clamp(0, 1) * 255).byte().numpy()).save(f"views/{number}.png")
    print(f"views/{number}.png: {camera.width}x{camera.height}, nearest {out.depth[out.alpha > 0.5].min():.2f}")
