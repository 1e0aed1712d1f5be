"""Pretrain the base, or quantize it and fine-tune its scales to a subject: python train.py --bits 4"""
import argparse
import copy
import os
import time

import torch
from tqdm import tqdm

from data import toy
from model import Diffusion, UNet
from quant import load, save


def pretrain(args):
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = UNet(vocab=len(toy.VOCAB), slots=toy.SLOTS).to(args.device, memory_format=torch.channels_last)
    ema, diffusion = copy.deepcopy(model), Diffusion()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    state, first = os.path.join(args.out, "pretrain.pt"), 0
    if args.resume:
        saved = load(state, "pretraining")
        first = saved["step"]
        model.load_state_dict(saved["model"]), ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"]), generator.set_state(saved["generator"])
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=5)
    losses = torch.zeros(4)
    for step in bar:
        for group in optimizer.param_groups:  # warm up, hold, then down to zero over the last third
            group["lr"] = args.lr * min(1, (step + 1) / 100, (args.steps - step) / (args.steps / 3))
        x0, words = toy.sample_scenes(args.batch, generator)
        t = ((torch.arange(len(x0)) + torch.rand(1, generator=generator)) * diffusion.T / len(x0)).long()
        eps = torch.randn(x0.shape, generator=generator)
        x0, words, t, eps = (a.to(args.device) for a in (x0.to(memory_format=torch.channels_last), words, t, eps))
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = diffusion.loss(model, x0, words, t, eps)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(0.999, (step + 1) / (step + 10)))
        losses.lerp_(loss.detach().cpu().view(4, -1).mean(1), 0.01 if step > first else 1)
        bar.set_postfix_str("loss by quarter of T " + " ".join(f"{v:.4f}" for v in losses), refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save({"kind": "pretraining", "step": step + 1, "model": model.state_dict(), "ema": ema.state_dict(),
                  "optimizer": optimizer.state_dict(), "generator": generator.get_state(), "config": model.config}, state)
            save({"kind": "model", "config": model.config, "step": step + 1,
                  "model": {k: v.half() for k, v in ema.state_dict().items()}}, os.path.join(args.out, "base.pt"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrain", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="out/pretrain")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    pretrain(args)
