# SPDX-License-Identifier: MIT
"""LRQ: long-range zero-shot generative quantization (arXiv 2211.06816; Neural Networks 166, 2023).

A trained classifier P becomes a low-bit one, Q, without any of its data: a generator G learns to draw images whose
batch-norm statistics and classes are those that P remembers, and Q learns from P on them.

    python lrq.py                                    # offline demonstration, under three minutes on two CPU cores
    python lrq.py --arch resnet18 --w 4 --a 4        # an ImageNet network: 80,000 iterations (20 minutes at an H100's rate)
    python lrq.py --help                             # every flag, its default and where that comes from

Result (README): ResNet-20 on CIFAR-10, 2-bit weights and 4-bit activations, 400 iterations of 64 images, three seeds: 85.4
+- 0.1 % top-1 of 88.0, where plain quantization leaves 29.5; three to five minutes on one CPU core.

The algorithm, as numbered in quantize():
 1. Once, between G's warm-up and Q's first step, by 20 batches of G's images:
    a. the ranges of Q's activations are observed; Q as it is then is plain quantization;
    b. each channel of a depthwise or 1 x 1 convolution's input is multiplied to use more of the range that all share;
    c. half of the images mirrored, magnified and shifted at random from here on, Q's batch norms are corrected for what
       rounded weights do to the mean and the spread of each channel;
    d. layer after layer, Q's weights are moved so that they make up for rounding errors, and batch norms corrected again.
 2. Draw noise z and labels y, and images x = G(z, y) from them.
 3. Generator step on L_G = L_AMA + a L_BNS, through the frozen P; G learns alone at first.
 4. Student step on the same images, half of them transformed as in 1: L_Q = c CE(Q(x), y) + L_DKD, CE only where P sees y
    in x, and c = 0 above 100 classes. Batch norms and biases learn at a higher rate than weights; up to 100 classes, after
    each step, all go back by a share of the way towards what 1 gave.
 5. Report and save.
 6. Evaluate, and write Q as integers.

Differences from the paper: no code of it was published, so where the large-kernel attention stands and what the
Adversarial Margin Add is in equations are our reading of the abstract. Those from GDFQ (arXiv 2003.03603), whose generator
and losses it builds on, are listed in the README, with what was measured of each.

Shapes: B batch_size, K num_classes, D features, S image_size, C channels, H and W height and width.
"""
import argparse
import contextlib
import csv
import difflib
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import datasets, models, transforms, utils

from quant import (compensate_rounding, copy_without_hooks, correct_batch_norm, equalize_channels, freeze, observe, pack,
                   quant_layers, quantize_model, unpack)

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

METHOD = "LRQ"


# ------------------------------------------------------------------------------------------------ generator

class LargeKernelAttention(nn.Module):
    """Attention over 23 x 23 pixels, 21 x 21 in the paper (VAN, arXiv 2202.09741, sections 3.1 and 3.2): (B, C, H, W) -> the same.

    LKA(u) = u * conv1x1(depthwise 7x7, dilation 3 (depthwise 5x5 (u))), between two 1 x 1 convolutions, as a residual
    scaled by a learnt factor a channel that starts at 0.01, so that the block starts near the identity.
    """

    def __init__(self, channels):
        super().__init__()
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.local = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.long_range = nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.project_out = nn.Conv2d(channels, channels, 1)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-2))

    def forward(self, x):
        u = F.gelu(self.project_in(x))
        # On a CPU in float32: in bfloat16 torch gave these weights gradients of 1e30 at times (56 x 56 pixels).
        with torch.autocast("cpu", enabled=False):
            wide = self.dilated(self.local(u.float()))
        return x + self.layer_scale * self.project_out(u * self.mix(wide))

    def dilated(self, x):
        """self.long_range(x), in a quarter of the time at 8 x 8 pixels on a CPU: every third pixel, across and down, makes
        an image of its own, nine in all, on which the convolution has no dilation."""
        B, C, H, W = x.shape
        h, w = -(-H // 3), -(-W // 3)
        x = F.pad(x, (0, 3 * w - W, 0, 3 * h - H)).view(B, C, h, 3, w, 3).permute(0, 3, 5, 1, 2, 4)
        x = F.conv2d(x.reshape(9 * B, C, h, w), self.long_range.weight, self.long_range.bias, padding=3, groups=C)
        return x.view(B, 3, 3, C, h, w).permute(0, 3, 4, 1, 5, 2).reshape(B, C, 3 * h, 3 * w)[:, :, :H, :W]


def class_codes(class_weight, latent_dim):
    """What the embeddings of many classes start from: (K, D) -> (K, latent_dim), of root mean square 10.

    The first principal components of the rows of the teacher's classifier W: classes which are alike to the teacher have
    codes that are alike, so that what G learns of one class serves others too. z has root mean square 1: among noise of
    their own size a thousand codes are hard to tell apart.
    """
    rows = class_weight.float().cpu()
    u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    codes = F.pad(u * s, (0, latent_dim - len(s)))                                      # or cropped, if longer
    return 10 * codes / codes.square().mean().sqrt().clamp(min=1e-12)


def upsampled(conv, x):
    """conv(F.interpolate(x, scale_factor=2)) for a 3 x 3 convolution, (B, I, H, W) -> (B, O, 2H, 2W), in 4/9 of the
    multiplications: of nine upsampled pixels only four differ, so it is a transposed convolution of stride 2, whose
    4 x 4 kernel sums the 3 x 3 one over the four places of a pixel's copies."""
    kernel = sum(F.pad(conv.weight, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1))              # (O, I, 4, 4)
    return F.conv_transpose2d(x, kernel.flip(2, 3).transpose(0, 1), conv.bias, stride=2, padding=1)


class Generator(nn.Module):
    """G(z, y): noise (B, latent_dim) and labels (B,) -> normalised images (B, C, S, S) with pixels in [0, 1].

    GDFQ's generator (arXiv 2003.03603) with large-kernel attention at its coarsest resolution, where one kernel reaches
    furthest and costs least: S/4, for multiples of 8 from 64 on S/8 with a narrow stage more, which takes half of the time on
    a CPU. An embedding of the label is added to z (GDFQ multiplies, or above 100 classes has conditional batch norm); above 100
    classes it starts from the teacher's classifier W = class_weight, (K, D). The first two numbers of z are also each
    image's contrast and brightness, in which generated images would hardly differ otherwise. Pixels stay in [0, 1]: beyond,
    the student, whose input is quantized to that range, would see other images than the teacher.
    """

    def __init__(self, image_size, class_weight, mean, std, latent_dim=100, lka=True):
        super().__init__()
        widths = (128, 128, 64, 32) if image_size >= 64 and image_size % 8 == 0 else (128, 128, 64)
        self.latent_dim, self.start_size = latent_dim, image_size // 2 ** (len(widths) - 1)
        self.embedding = nn.Embedding(len(class_weight), latent_dim)
        if len(class_weight) > 100:
            self.embedding.weight.data.copy_(class_codes(class_weight, latent_dim))
        self.linear = nn.Linear(latent_dim, widths[0] * self.start_size ** 2)
        self.norm0, self.attention = nn.BatchNorm2d(widths[0]), LargeKernelAttention(widths[0]) if lka else nn.Identity()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in widths[1:])
        self.last_conv, self.last_norm = nn.Conv2d(widths[-1], len(mean), 3, padding=1), nn.BatchNorm2d(len(mean), affine=False)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, z, labels):
        contrast, brightness = (z[:, i].view(-1, 1, 1, 1) for i in (0, 1))
        x = self.linear(z + self.embedding(labels)).view(len(z), self.start_size, self.start_size, -1)
        x = x.permute(0, 3, 1, 2)                                                       # (B, 128, S/4, S/4), or S/8
        x = self.attention(self.norm0(x))
        for conv, norm in zip(self.convs, self.norms):
            x = F.leaky_relu(norm(upsampled(conv, x)), 0.2)                             # twice as high and wide
        x = torch.tanh(self.last_conv(x).float())                                       # (B, C, S, S)
        # 0.3 and 0.35: about as far as real CIFAR-10 images differ; 0.5 and 0.25: about what photographs have, all together.
        pixels = (0.5 + 0.25 * self.last_norm((0.3 * contrast).exp() * x + 0.35 * brightness)).clamp(0, 1)
        return (pixels - self.mean) / self.std


def half_transformed(images):
    """The images, (B, C, S, S), with the last half of them (the larger, if B is odd) mirrored at random, magnified by 0.5 to
    2.5 (its logarithm uniform) and shifted by up to half their size; what lies beyond the border is mirrored in.

    Generated images have few layouts, the same place always filled alike. The teacher has to be asked what it sees now.
    """
    x = images[len(images) // 2:]
    scale = torch.empty(len(x), device=x.device).uniform_(math.log(1 / 2.5), math.log(1 / 0.5)).exp()  # below 1 magnifies
    theta = torch.zeros(len(x), 2, 3, device=x.device)                                  # where a pixel comes from
    theta[:, 0, 0] = torch.where(torch.rand_like(scale) < 0.5, scale, -scale)
    theta[:, 1, 1] = scale
    theta[:, :, 2].uniform_(-1, 1)                                                      # 2 is the whole image
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return torch.cat([images[:len(images) // 2], x])


# ------------------------------------------------------------------------------------------------ losses

class MeanVariance(torch.autograd.Function):
    """Mean and biased variance of h, (B, C, H, W), over height and width, in float32: what torch.var_mean gives, in an
    eighth of its time on a CPU (which goes through channels-last values one by one), and one pass backwards."""

    @staticmethod
    def forward(ctx, h):
        wide = h.float()
        mean = wide.mean((2, 3), keepdim=True)
        ctx.save_for_backward(h, mean)
        return mean.squeeze((2, 3)), (wide - mean).square_().mean((2, 3))

    @staticmethod
    def backward(ctx, grad_mean, grad_variance):
        h, mean = ctx.saved_tensors
        grad_mean, slope = (grad[:, :, None, None] / h[0, 0].numel() for grad in (grad_mean, 2 * grad_variance))
        return torch.addcmul((grad_mean - slope * mean).to(h.dtype), slope.to(h.dtype), h)


def image_statistics(inputs):
    """Means m_il and variances v_il over height and width, of each image i and channel of layer l: (B, C), (B, C).

    inputs: the h_l, each (B, C_l, H, W). The channels of all layers stand side by side, C in all, here and in what follows.
    """
    means, variances = zip(*(MeanVariance.apply(h) for h in inputs))
    return torch.cat(means, 1), torch.cat(variances, 1)


def layer_constants(norms):
    """(mu, var, units, channel_weight) of the batch norms l: running means mu_l, variances var_l, units s_l, weights; (C,) each.

    s_l^2 = mean(var_l), or the layer's epsilon if that is more: measured in units of s_l, every layer counts alike, whatever
    the size of its values. The weight is 1 / (L C_l), with which a sum over all channels is the mean over L layers of the mean
    over a layer's channels.
    """
    mu, var = torch.cat([norm.running_mean for norm in norms]), torch.cat([norm.running_var for norm in norms])
    widths = torch.tensor([norm.num_features for norm in norms], device=mu.device)
    units = torch.stack([norm.running_var.mean().clamp(min=norm.eps).sqrt() for norm in norms])
    return mu, var, units.repeat_interleave(widths), (1 / (len(norms) * widths)).repeat_interleave(widths)


def batch_norm_loss(means, variances, mu, var, units, channel_weight):
    """L_BNS = mean over layers l of MSE(mean(h_l), mu_l) + MSE(var(h_l), var_l), h_l in units of s_l
    (GDFQ, arXiv 2003.03603, eq. 4, where s_l is 1).

    means, variances: of each image, (B, C), see image_statistics. The others: (C,), see layer_constants. Mean
    and biased variance are over batch, height and width; MSE is the mean over a layer's channels.
    """
    batch_mean = means.mean(0)
    batch_var = variances.mean(0) + (means - batch_mean).square().mean(0)               # within images, and between
    return (((batch_mean - mu) / units).square() + ((batch_var - var) / units.square()).square()) @ channel_weight


def ama_logits(features, weight, bias, labels, margin):
    """Logits with an additive angular margin m on the label's: |f| |W_y| cos(theta_y + m) + b_y; the others as they are.

    features: f, (B, D). weight: W, (K, D). bias: b, (K,) or None. labels: y, (B,). margin: m, radians. Returns (B, K).
    theta_y is the angle between f and W_y. With r the part of f orthogonal to W_y,
        |f| |W_y| cos(theta + m) = cos(m) f.W_y - sin(m) |W_y| |r|,
    whose gradient is finite everywhere and which at m = 0 is the plain logit. Where theta + m leaves [0, pi] it goes on
    linearly in cos(theta), so that it always falls as theta grows. Source: our reading of LRQ's Adversarial Margin Add
    (arXiv 2211.06816), after ArcFace (arXiv 1801.07698, equation 3), at the classifier's own scale.
    """
    logits = F.linear(features, weight, bias)
    w_y = weight[labels]                                                                # (B, D)
    dot, w_norm = (features * w_y).sum(1), w_y.norm(dim=1)                              # (B,)
    norms = features.norm(dim=1) * w_norm
    r = features - (dot / w_norm.square().clamp(min=torch.finfo(dot.dtype).tiny))[:, None] * w_y
    change = (math.cos(margin) - 1) * dot - math.sin(margin) * w_norm * r.norm(dim=1)
    sign = math.copysign(1, margin)
    beyond = -sign * dot > math.cos(margin) * norms                                     # theta + m above pi, or below 0
    change = torch.where(beyond, sign * (math.cos(margin) - 1) * norms, change)
    return logits.scatter_add(1, labels[:, None], change[:, None])


def label_angles(features, weight, labels):
    """theta_y, in degrees: the angle between f, (B, D), and the label's class weight W_y of W, (K, D) -> (B,)."""
    return F.cosine_similarity(features, weight[labels]).clamp(-1, 1).acos().rad2deg()


def kd_loss(student_logits, teacher_logits, temperature):
    """KL(P || Q) T^2 of the softened distributions, averaged over the batch: (B, K), (B, K) -> scalar.

    T^2 keeps the gradient's size as T changes (Hinton et al., arXiv 1503.02531, section 2).
    """
    log_q = F.log_softmax(student_logits / temperature, 1)
    log_p = F.log_softmax(teacher_logits / temperature, 1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature ** 2


def dkd_loss(student_logits, teacher_logits, labels, alpha, beta, temperature):
    """L_DKD = (alpha TCKD + beta NCKD) T^2, averaged over the batch: (B, K), (B, K), (B,) -> scalar.

    TCKD = KL([p_t, 1 - p_t] of P || that of Q), target class against the rest; NCKD = KL of the softmax over the other
    classes. KL(P || Q) = TCKD + (1 - p_t of P) NCKD. Source: decoupled distillation, arXiv 2203.08679, equations 5, 7.
    """
    def split(logits):
        others = torch.arange(logits.shape[1] - 1, device=logits.device)                # all classes but the label
        others = others + (others >= labels[:, None])                                   # (B, K - 1)
        target, others = logits.gather(1, labels[:, None]), logits.gather(1, others)
        binary = torch.cat([target, others.logsumexp(1, keepdim=True)], 1)
        return F.log_softmax(binary, 1), F.log_softmax(others, 1)                       # (B, 2), (B, K - 1)

    log_b_q, log_hat_q = split(student_logits / temperature)
    log_b_p, log_hat_p = split(teacher_logits / temperature)
    tckd = F.kl_div(log_b_q, log_b_p, reduction="batchmean", log_target=True)
    nckd = F.kl_div(log_hat_q, log_hat_p, reduction="batchmean", log_target=True)
    return (alpha * tckd + beta * nckd) * temperature ** 2


# ------------------------------------------------------------------------------------------------ batch-norm statistics

def teacher_forward(teacher, classifier, images):
    """One forward pass of the teacher, seen from inside: (logits, features, norms, inputs).

    logits: (B, K). features: f, the classifier's input, (B, D). norms: the BatchNorm2d layers l in the order in which
    they run, and inputs: their inputs h_l, (B, C_l, H, W). The hooks are gone afterwards.
    """
    features, norms, inputs = [], [], []

    def keep(layer, args):
        norms.append(layer)
        inputs.append(args[0])
    hooks = [layer.register_forward_pre_hook(keep) for layer in teacher.modules()
             if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None]
    hooks.append(classifier.register_forward_pre_hook(lambda layer, args: features.append(args[0])))
    try:
        logits = teacher(images)
    finally:
        for hook in hooks:
            hook.remove()
    f = features[-1].float()
    return logits.float(), f.mean((2, 3)) if f.dim() == 4 else f, norms, inputs


# ------------------------------------------------------------------------------------------------ the method

def quantize(teacher, *, image_size, num_classes, w_bits, a_bits, mean, std, iterations, batch_size, seed=0,
             device="auto", evaluate=None, out=None, symmetric=False, classifier=None, precision="auto", lka=True,
             margin=None, kd="dkd", temperature=4.0, alpha=1.0, beta=1.0, bns_weight=None, ce_weight=None, pull=None,
             generator_lr=1e-3, student_lr=None, norm_lr=None, warmup=0.15, resume=False, checkpoint_every=60, about=None):
    """Quantize a trained classifier without its data. Returns (student, result).

    teacher: any nn.Module, (B, C, S, S) -> (B, num_classes), with BatchNorm2d; left as it is. Its hooks do not run.
    image_size: S, a multiple of 4, 8 at least.
    w_bits, a_bits: 2 to 8.
    mean, std: the teacher's normalisation, one number a channel, of pixels in [0, 1].
    evaluate: a function of a model, on `device`, that returns its top-1 in percent, or a dict of numbers that has it as
        "top1" (and no "agreement"), all of which the result will have; or None.
    out: a folder for result.json, student.pt, checkpoint.pt, samples.png and log.csv, or None.
    classifier: the name of the teacher's last layer, found by itself if None.
    resume: go on from the checkpoint in `out`.
    about: further settings to record in the files.
    The rest are the flags of the same names (`python lrq.py --help`).

    The student is in evaluation mode, ready to use or to train on; `quant.pack` gives its integers. The result is the dict
    that result.json holds.
    Raises BadInput, a ValueError, for settings or a teacher that cannot be used, before any long work (and quantize_model's
    TypeError). It seeds torch's random numbers and sets cuDNN's flags.
    """
    settings = check_settings(locals())
    few = num_classes <= 100  # few classes; other defaults for more
    # In a longer run the student's steps are shorter, or it ends farther from its teacher on real images (README).
    shorter = min(1, (1000 if few else 4000) / iterations) ** 0.5
    defaults = {"student_lr": (3e-3 if few else 1e-3) * shorter, "norm_lr": 1e-2 * shorter,
                "bns_weight": 1.0 if few else 100.0, "ce_weight": 1.0 if few else 0.0,
                "margin": -0.5 if few else 0.0, "pull": 1e-2 * shorter if few else 0.0}
    settings.update((name, value) for name, value in defaults.items() if settings[name] is None)
    student_lr, norm_lr, bns_weight, ce_weight, margin, pull = (settings[name] for name in defaults)  # in their order above
    mean, std, generator_lr = (settings[name] for name in ("mean", "std", "generator_lr"))
    device, dtype = choose_device(device, precision)
    settings["precision"] = str(dtype).removeprefix("torch.")
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    teacher, layer, norms = prepare_teacher(teacher, image_size, num_classes, len(mean), classifier, device)
    weight, bias = layer.weight.flatten(1), layer.bias                                  # W, (K, D); b, (K,)
    constants = layer_constants(norms)                                                  # mu, var, s, weight: (C,)
    torch.manual_seed(seed)
    generator = Generator(image_size, weight, mean, std, lka=lka).to(device, memory_format=torch.channels_last)
    student = quantize_model(teacher, w_bits, a_bits, symmetric, input_range=pixel_range(mean, std))
    generator_optimizer = torch.optim.Adam(generator.parameters(), generator_lr, betas=(0.5, 0.999), fused=True,
                                           capturable=True)  # within a CUDA graph, see Repeated
    student_optimizer = torch.optim.SGD([
        {"params": [p for p in student.parameters() if p.dim() > 1], "rate": student_lr, "weight_decay": 1e-4},
        {"params": [p for p in student.parameters() if p.dim() < 2], "rate": norm_lr},          # batch norms and biases
    ], momentum=0.9, nesterov=True, fused=True)
    warm_iterations, cosine = int(iterations * warmup), torch.ones((), device=device)
    with Run(settings, teacher, student, generator, device, evaluate, out, resume, checkpoint_every,
             generator_optimizer=generator_optimizer, student_optimizer=student_optimizer) as run:
        def calibrate():
            """Step 1, once, by generated images."""
            observe(student)  # a
            with torch.no_grad():
                with autocast():
                    batches = [generator(*draw(batch_size, num_classes, generator, device)) for _ in range(20)]
                for images in batches:
                    student(images)
            freeze(student)
            run.measure("ptq")
            print("\nmaking up for rounding errors, layer after layer, before the student learns", flush=True)
            equalize_channels(student, teacher, batches)  # b
            batches = [half_transformed(images) for images in batches]
            correct_batch_norm(observe(student), teacher, batches)  # c, activations in float; their ranges go on moving
            compensate_rounding(freeze(student), teacher, batches)  # d, activations quantized
            if pull:  # what the student is pulled back to; the optimizer keeps it, so that a checkpoint has it
                for p in student.parameters():
                    student_optimizer.state[p]["start"] = p.detach().clone()

        def iteration(learns):
            """Steps 2 to 4; learns: whether the student does, or the generator alone. Returns the losses by name."""
            # 2. Draw noise and labels, and images from them.
            z, labels = draw(batch_size, num_classes, generator, device)
            with autocast():
                images = generator(z, labels)                                           # (B, C, S, S)
                teacher_logits, features, _, inputs = teacher_forward(teacher, layer, images)

            # 3. Generator step: L_G = L_AMA + a L_BNS, through the frozen teacher.
            loss_ama = F.cross_entropy(ama_logits(features, weight, bias, labels, margin), labels)
            loss_bns = batch_norm_loss(*image_statistics(inputs), *constants)
            generator_optimizer.zero_grad()
            (loss_ama + bns_weight * loss_bns).backward()
            generator_optimizer.step()
            losses = {"L_AMA": loss_ama.detach(), "L_BNS": loss_bns.detach()}

            # 4. Student step on these images, half of them transformed: L_Q = c CE(Q(x), y) + L_DKD; its rates fall as a cosine.
            if learns:
                images, half = half_transformed(images.detach()), batch_size // 2
                with autocast():
                    with torch.no_grad():
                        teacher_logits = torch.cat([teacher_logits[:half], teacher(images[half:]).float()])
                    logits = student(images)
                recognised = teacher_logits.argmax(1) == labels  # a label that P does not see in x would teach Q an error
                loss_qce = (F.cross_entropy(logits, labels, reduction="none") * recognised).mean()
                loss_kd = (dkd_loss(logits, teacher_logits, labels, alpha, beta, temperature) if kd == "dkd"
                           else kd_loss(logits, teacher_logits, temperature))
                student_optimizer.zero_grad()
                (ce_weight * loss_qce + loss_kd).backward()
                for group in student_optimizer.param_groups:
                    group["lr"] = group["rate"] * cosine
                    nn.utils.clip_grad_norm_(group["params"], 3.0)  # else a 3-bit student can fall to chance
                student_optimizer.step()
                if pull:  # back towards what step 1 gave: images teach the student some errors too (L2-SP, arXiv 1802.01483)
                    share = pull * cosine
                    with torch.no_grad():
                        for p in student.parameters():
                            p.lerp_(student_optimizer.state[p]["start"], share)
                losses.update({"L_QCE": loss_qce.detach(), f"L_{kd.upper()}": loss_kd.detach()})
            return losses

        begun = run.step
        for step in range(begun, iterations):
            if step in (begun, warm_iterations):
                iterate = Repeated(functools.partial(iteration, learns=step >= warm_iterations), device)
            if step == warm_iterations:
                run.save()  # calibration takes long on a large network
                calibrate()
            done = max(0, step - warm_iterations) / (iterations - warm_iterations)
            cosine.fill_(0.5 * (1 + math.cos(math.pi * done)))  # in its place: a CUDA graph reads it anew
            losses = iterate()

            # 5. Report and save.
            run.report(step + 1, losses)

        # 6. Evaluate (how far images spread round their class's weight is what AMA is about), and write Q as integers.
        with torch.no_grad():
            angles = torch.cat([label_angles(teacher_forward(teacher, layer, images)[1], weight, labels)
                                for images, labels in run.fresh_images()])
        run.figures.update(angle_mean=angles.mean().item(), angle_std=angles.std().item())
        return student, run.finish()


# ================================================================================================ shared plumbing: begin
# Repeated byte for byte in lrq.py and clusterq.py (a test compares them): teachers, data, files, progress, common flags.

# ------------------------------------------------------------------------------------------------ settings

class BadInput(ValueError):
    """Something that the user gave cannot be used; the message is one line that says what and what to do."""


def whole(low, high=2 ** 63 - 1):
    return lambda v: isinstance(v, int) and low <= v <= high


def numbers(v):
    return isinstance(v, list) and len(v) > 0 and all(isinstance(x, (int, float)) and math.isfinite(x) for x in v)


def python_values(v):
    """Tuples, arrays, tensors and NumPy's numbers as lists and Python's own numbers, as result.json can hold them."""
    if isinstance(v, dict):
        return {key: python_values(x) for key, x in v.items()}
    return v.tolist() if hasattr(v, "tolist") else [python_values(x) for x in v] if isinstance(v, (tuple, list)) else v


POSITIVE = (lambda v: 0 < v < math.inf, "a number above 0")
NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "a finite number, 0 or more")
NONE_OR_NOT_NEGATIVE = (lambda v: v is None or NOT_NEGATIVE[0](v), NOT_NEGATIVE[1])  # None: chosen later
YES_OR_NO = (lambda v: isinstance(v, bool), "True or False")
COMMON_RULES = {  # setting: (whether a value will do, what to choose)
    "w_bits": (whole(2, 8), "2 to 8 bits"), "a_bits": (whole(2, 8), "2 to 8 bits"),
    "image_size": (lambda v: whole(8)(v) and v % 4 == 0, "a multiple of 4, 8 or more"),
    "num_classes": (whole(2), "a whole number, 2 or more"),
    "mean": (numbers, "numbers, one a channel"),
    "std": (lambda v: numbers(v) and min(v) > 0, "numbers above 0, one a channel"),
    "iterations": (whole(1), "a whole number, 1 or more"),
    "batch_size": (whole(2), "a whole number, 2 or more, the least that has statistics"),
    "seed": (whole(0), "a whole number from 0 to 2^63 - 1"),
    "checkpoint_every": (lambda v: v >= 0, "a number of seconds"),
    "evaluate": (lambda v: v is None or callable(v), "a function of a model that returns its top-1 in percent, or None"),
    "warmup": (lambda v: 0 <= v < 1, "a share of the iterations, at least 0 and below 1"),
    "generator_lr": NOT_NEGATIVE,
    "student_lr": NONE_OR_NOT_NEGATIVE,
    "norm_lr": NONE_OR_NOT_NEGATIVE,
    "precision": (lambda v: v in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
    "about": (lambda v: v is None or isinstance(v, dict) and json.dumps(v), "a dict of strings and numbers, or None"),
    "symmetric": YES_OR_NO, "resume": YES_OR_NO}
NOT_SETTINGS = ("teacher", "device", "evaluate", "out", "resume", "checkpoint_every", "about", "separability")


def check_settings(arguments):
    """Of quantize's arguments, those that the result depends on. Raises BadInput for one that cannot be used."""
    arguments = python_values({**arguments, "teacher": None})
    for name, (will_do, choose) in {**COMMON_RULES, **RULES}.items():
        with contextlib.suppress(TypeError):
            if will_do(arguments[name]):
                continue
        flag = {"w_bits": "--w", "a_bits": "--a"}.get(name, "--" + name.replace("_", "-"))
        if name in ("image_size", "num_classes", "mean", "std", "evaluate", "about") or choose == YES_OR_NO[1]:
            flag = name  # these have no flag, or one without a value
        raise BadInput(f"{flag} {arguments[name]!r}: choose {choose}")
    if len(arguments["mean"]) != len(arguments["std"]):
        raise BadInput(f"mean has {len(arguments['mean'])} channels and std has {len(arguments['std'])}: give one number each")
    if arguments["out"] is not None or arguments["resume"]:
        check_folder(arguments["out"], arguments["resume"])
    return {**json.loads(json.dumps(arguments["about"] or {})), "method": METHOD,
            **{key: value for key, value in arguments.items() if key not in NOT_SETTINGS}}


# ------------------------------------------------------------------------------------------------ teachers and images

# name: (mean, std, image size, classes, default iterations, default batch size)
DATASETS = {
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 24, 10, 500, 32),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 32, 10, 1000, 64),
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 32, 100, 1000, 64),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 1000, 80000, 16)}
CIFAR_WEIGHTS = {dataset: f"https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/{dataset}_{name}.pt"
                 for dataset, name in (("cifar10", "resnet20-4118986f"), ("cifar100", "resnet20-23dac2f1"))}


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 images (arXiv 1512.03385, section 4.2), parameters named as in chenyaofo/pytorch-cifar-models.
    Three stages of `blocks` blocks: 3 is ResNet-20, 1 is the ResNet-8 of the demonstration."""

    def __init__(self, blocks, num_classes):
        super().__init__()
        def block(i, o, stride):
            conv = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if i != o else None
            return models.resnet.BasicBlock(i, o, stride, conv)
        def stage(i, o, stride):
            return nn.Sequential(block(i, o, stride), *[block(o, o, 1) for _ in range(blocks - 1)])
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def draw_shapes(count, seed):
    """Ten classes of pictures, random in colour, place, size, angle and noise: (count, 3, 24, 24) in [0, 1], (count,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=count)
    def uniform(low, high, *shape):
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)
    grid = np.linspace(-1, 1, 24, dtype=np.float32)
    size, angle = uniform(0.5, 0.9, 1, 1), uniform(0, 2 * np.pi, 1, 1)
    x, y = grid[None, None, :] - uniform(-0.3, 0.3, 1, 1), grid[None, :, None] - uniform(-0.3, 0.3, 1, 1)
    u, v = (np.cos(angle) * x + np.sin(angle) * y) / size, (np.cos(angle) * y - np.sin(angle) * x) / size
    a, b, radius, phi = np.abs(u), np.abs(v), np.hypot(u, v), np.arctan2(v, u)
    distance = np.choose(labels[:, None, None], [          # below zero inside, above zero outside
        radius - 0.8,                                                               # disc
        np.abs(radius - 0.7) - 0.17,                                                # ring
        np.maximum(a, b) - 0.75,                                                    # square
        np.abs(np.maximum(a, b) - 0.65) - 0.17,                                     # frame
        np.maximum(-v, np.maximum(0.866 * u, -0.866 * u) + 0.5 * v) - 0.5,          # triangle
        radius - 0.65 - 0.3 * np.cos(5 * phi),                                      # star
        np.maximum(np.minimum(a, b) - 0.25, np.maximum(a, b) - 0.9),                # cross
        np.cos(9 * u) / 6,                                                          # stripes
        np.cos(6 * u) * np.cos(6 * v) / 4,                                          # checkerboard
        0.22 - np.hypot(np.mod(u, 0.7) - 0.35, np.mod(v, 0.7) - 0.35)])             # dots
    inside = np.clip(0.5 - 9 * size * distance, 0, 1)[:, None]
    background, contrast = uniform(0.2, 0.8, 3, 1, 1), uniform(0.2, 0.5, 3, 1, 1)
    contrast *= np.sign(uniform(-1, 1, 3, 1, 1))
    images = background + inside * contrast + 0.1 * rng.standard_normal((count, 3, 24, 24), np.float32)
    return torch.from_numpy(images.clip(0, 1)), torch.from_numpy(labels)


def shapes_teacher():
    """The demonstration's teacher: a ResNet-8 trained on 8,000 drawn pictures from a fixed seed, cached by torch.hub."""
    cache = Path(torch.hub.get_dir()) / "checkpoints" / "zsq_shapes_resnet8_v3.pt"
    with torch.random.fork_rng(devices=[]):
        with contextlib.suppress(Exception):  # not there, or not whole: train it
            model = CifarResNet(1, 10).to(memory_format=torch.channels_last)
            model.load_state_dict(torch.load(cache, weights_only=True))
            return model.eval()
        torch.manual_seed(0)
        model = CifarResNet(1, 10).to(memory_format=torch.channels_last)  # anew: what did not fit may have loaded in part
        mean, std, *_ = DATASETS["shapes"]
        images, labels = draw_shapes(8000, seed=0)
        images = ((images - mean[0]) / std[0]).contiguous(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        batches = [batch for _ in range(8) for batch in torch.randperm(len(images)).split(100)]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=len(batches))
        progress = Progress("teacher", len(batches))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums in one order, so the same teacher for any number of cores
        for step, batch in enumerate(batches):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress(step + 1, {"L_CE": loss.detach()})
        torch.set_num_threads(threads)
    with contextlib.suppress(OSError, BadInput):  # a read-only home: train again next time
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomically(cache) as path:
            torch.save(model.state_dict(), path)
    return model.eval()


def build_teacher(arch, dataset):
    """The untrained network: (model, image size, mean, std, preprocessing of its test images, published weights)."""
    mean, std, size, num_classes, *_ = DATASETS[dataset]
    published = CIFAR_WEIGHTS.get(dataset) if arch == "resnet20" else None
    preprocess = transforms.Compose([transforms.Resize(256 if size == 224 else size), transforms.CenterCrop(size),
                                     transforms.ToTensor(), transforms.Normalize(mean, std)])
    if arch in ("shapes", "resnet20"):
        model = CifarResNet(1 if arch == "shapes" else 3, num_classes)
    else:
        with warnings.catch_warnings():  # of slow initial weights, which are not kept
            warnings.simplefilter("ignore")
            model = models.get_model(arch, weights=None, num_classes=num_classes)
        if dataset == "imagenet":
            choices = models.get_model_weights(arch)
            published = getattr(choices, "IMAGENET1K_V1", choices.DEFAULT)
            if hasattr(model, "transform_input"):  # the published Inceptions normalise once more
                model.transform_input = True
            preprocess = published.transforms()
            mean, std, size = tuple(preprocess.mean), tuple(preprocess.std), preprocess.crop_size[0]
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()):
        raise BadInput(f"--arch {arch} has no batch norm, whose statistics the method needs: choose one that has")
    return model.eval(), -(-size // 4) * 4, mean, std, preprocess, published


def load_teacher(args, model, published):
    """The network of build_teacher with its trained weights: those of --weights, or the published ones."""
    if args.weights:
        load_weights(model, args.weights, args.arch, args.dataset)
    elif args.arch == "shapes":
        model = shapes_teacher()
    elif published is None:
        raise BadInput(f"no weights are published for --arch {args.arch} on {args.dataset}: give --weights FILE")
    else:
        try:
            cifar = args.arch == "resnet20"
            state = (torch.hub.load_state_dict_from_url(published, map_location="cpu", check_hash=True, weights_only=True)
                     if cifar else models.get_model(args.arch, weights=published).state_dict())  # some rename their keys
            model.load_state_dict(state, strict=cifar)  # a published GoogLeNet has no auxiliary heads
        except (OSError, RuntimeError) as error:
            raise BadInput(f"the weights of {args.arch} could not be fetched ({first_line(error)}): "
                           "--weights FILE takes a state dict that you have") from error
    return model


def load_weights(model, file, arch, dataset):
    """Load a state dict (plain or under `state_dict`, `model_state_dict` or `model`, with or without `module.`) into the model."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        why = getattr(error, "strerror", None) or "not a file of tensors that torch.load reads"
        raise BadInput(f"--weights {file}: {why}: name what torch.save(model.state_dict(), FILE) wrote") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise BadInput(f"--weights {file} holds no state dict: save one with torch.save(model.state_dict(), FILE)")
    wanted = model.state_dict()  # keeps the versions of its modules; all but counts of batches must be in the file
    for key in list(wanted):
        if not key.endswith("num_batches_tracked"):
            del wanted[key]
    wanted.update((key.removeprefix("module."), value) for key, value in state.items())
    try:
        model.load_state_dict(wanted)
    except RuntimeError as error:
        raise BadInput(f"--weights {file}, which begins with '{next(iter(state), None)}', does not fit --arch {arch} --dataset "
                       f"{dataset}, choose those that do: {textwrap.shorten(str(error), 240)}") from error


def find_classifier(model, num_classes, name=None):
    """The layer that gives the logits: the one called `name`, else the last Linear or 1 x 1 Conv2d with K outputs."""
    if name is not None:
        layer = dict(model.named_modules()).get(name)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise BadInput(f"classifier '{name}' is not a Linear or Conv2d layer of the teacher: name one that is")
        return layer
    found = [layer for layer in model.modules()
             if isinstance(layer, nn.Linear) and layer.out_features == num_classes
             or isinstance(layer, nn.Conv2d) and layer.out_channels == num_classes and layer.kernel_size == (1, 1)]
    if not found:
        raise BadInput(f"no layer of the teacher gives {num_classes} classes: check num_classes, or name its classifier")
    return found[-1]


def prepare_teacher(teacher, image_size, num_classes, channels, classifier, device):
    """(teacher, classifier, norms): a frozen copy of the teacher, its last layer, its BatchNorm2d layers in the order in
    which they run. Tried on noise; raises BadInput if it cannot be used."""
    if not isinstance(teacher, nn.Module):
        raise BadInput(f"the teacher is a {type(teacher).__name__}: give the nn.Module itself, its weights loaded")
    if torch.get_default_dtype() != torch.float32:
        raise BadInput(f"torch's default dtype is {torch.get_default_dtype()}: set it back to torch.float32")
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(device.type):
        raise BadInput("quantize trains: call it outside of torch.no_grad(), torch.inference_mode() and torch.autocast()")
    if any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules()):
        print("the teacher's hooks do not run here: if they change what it gives, put that into its forward", flush=True)
    noise = torch.randn(2, channels, image_size, image_size, device="cpu", generator=torch.Generator().manual_seed(0))
    images = noise.requires_grad_().to(device, copy=True)  # with gradient, as generated ones
    try:
        teacher = copy_without_hooks(teacher).float().eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        layer = find_classifier(teacher, num_classes, classifier)
        logits, features, norms, inputs = teacher_forward(teacher, layer, images)
        again = F.linear(features, layer.weight.flatten(1), layer.bias)
    except (BadInput, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BadInput(f"the teacher cannot be copied and run on {image_size} x {image_size} images of {channels} channels, or not "
                       f"through its classifier on one vector an image ({first_line(error)}): check image_size, mean, std and "
                       "classifier; it has to return logits alone, be free of pruning and weight normalisation, and use .reshape "
                       "or .flatten, not .view, since tensors are channels-last") from error
    for wrong, what in (
            (not norms, "has no BatchNorm2d with running statistics, which the method needs: convert those of other kinds"),
            (any(len(h) != 2 for h in inputs), "has a batch norm that sees other than one map an image (patches, say), which the "
             "method cannot compare with its statistics"),
            (not torch.equal(images.cpu(), noise), "changes its images in place, and the student sees them after it: clone them"),
            (not logits.requires_grad, "gives no gradient to its images: take torch.no_grad() or inference_mode() out of its forward"),
            (logits.shape != (2, num_classes), f"gives outputs of shape {tuple(logits.shape)} for two images: check num_classes"),
            (not logits.isfinite().all(), "gives NaN or infinite outputs for images of plain noise: check its weights"),
            (again.shape != logits.shape or not (again - logits).abs().max() <= 2e-3 * logits.abs().max(),
             "does not return what the layer taken for its classifier gives: name the right one with classifier")):
        if wrong:
            raise BadInput(f"the teacher {what}")
    return teacher, layer, norms


def decode(path):
    try:
        return datasets.folder.default_loader(path)
    except Exception as error:
        raise BadInput(f"--data: {path} is not an image that can be decoded: remove or replace it") from error


def load_images(args, preprocess):
    """Labelled test images in batches: drawn ones for `shapes`, else those of --data, or None without it."""
    mean, std, size, num_classes, *_ = DATASETS[args.dataset]
    if args.dataset == "shapes" and not args.data:
        images, labels = draw_shapes(2000, seed=2)
        return torch.utils.data.DataLoader(list(zip((images - mean[0]) / std[0], labels)), 250)
    if not args.data:
        return None
    root = Path(args.data)
    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}.get(args.dataset)
    unpacked = cifar is not None and os.path.isdir(root / cifar.base_folder)
    folder = root if unpacked else next((root / name for name in ("val", "test") if os.path.isdir(root / name)), root)
    try:
        dataset = (cifar(root, train=False, transform=preprocess) if unpacked else
                   datasets.ImageFolder(folder, preprocess, loader=decode))
    except (OSError, RuntimeError) as error:
        kind = "a whole CIFAR folder" if unpacked else "a folder with one of images for each class"
        raise BadInput(f"--data {folder} is not {kind} ({first_line(error)}): mend it, or name another") from error
    if len(dataset.classes) != num_classes:
        raise BadInput(f"--data {folder} has {len(dataset.classes)} classes, --dataset {args.dataset} has {num_classes}: "
                       "choose the folder or the --dataset that fits")
    if all(name.isdecimal() for name in dataset.classes) and dataset.classes != sorted(dataset.classes, key=int):
        raise BadInput(f"--data {folder}: its classes are numbers, which sorted by name come as 0, 1, 10: rename them to "
                       "as many digits each, 000, 001")
    workers = 0 if size < 224 else min(os.cpu_count() or 1, 16)
    return torch.utils.data.DataLoader(dataset, 250 if size < 224 else 50, num_workers=workers,
                                       pin_memory=torch.cuda.is_available() and args.device != "cpu")


def draw(batch_size, num_classes, generator, device):
    """z ~ N(0, 1), (B, latent_dim), and y uniform over the classes, (B,)."""
    return (torch.randn(batch_size, generator.latent_dim, device=device),
            torch.randint(num_classes, (batch_size,), device=device))


def pixel_range(mean, std):
    """(min, max) of a normalised image: pixels lie in [0, 1], so the range of the network's input is known without data."""
    return min(-m / s for m, s in zip(mean, std)), max((1 - m) / s for m, s in zip(mean, std))


@torch.no_grad()
def figures_on(batches, model, teacher, device):
    """A model's figures on labelled images. "top1": how often its first choice is the label, in percent. "real_agreement": how
    often it is the teacher's. "divergence": mean KL(P || Q) from the teacher. teacher: None for a model that is its own.
    batches: a DataLoader; says how fast it is."""
    sums, count = torch.zeros(3, device=device), 0
    progress = Progress("evaluation", len(batches.dataset), unit="images")
    try:
        for images, labels in batches:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            logits = model(images)
            expected, choice = logits if teacher is None else teacher(images), logits.argmax(1)
            sums += torch.stack([(choice == labels).sum(), (choice == expected.argmax(1)).sum(),
                                 kd_loss(logits, expected, 1) * len(labels)])
            count += len(labels)
            progress(count, {})
    except BadInput as error:
        raise BadInput(str(error).strip().split("BadInput: ")[-1]) from None  # without a loader worker's traceback
    right, same, divergence = sums.tolist()
    return {"top1": 100 * right / count, "real_agreement": 100 * same / count, "divergence": divergence / count}


# ------------------------------------------------------------------------------------------------ device and files

def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def choose_device(name, precision):
    """(device, number type): that of convolutions while training, bfloat16 where the processor is faster in it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name} cannot be used here ({first_line(error)}): try --device cpu") from error
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.backends.cudnn.benchmark = True  # every iteration has the same shapes
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    if precision == "auto":
        able = torch.cpu.get_capabilities()
        intel = "Intel" in able.get("cpu_name", "")  # whose bfloat16 is slower than its float32, but for AMX (README)
        fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else device.type == "cpu" and
                (able.get("amx_bf16") or able.get("avx512_bf16") and not intel))
        precision = "bfloat16" if fast else "float32"
    return device, getattr(torch, precision)


@contextlib.contextmanager
def atomically(path):
    """Write to a temporary file beside `path`, which takes the place of `path` once it is whole. Raises BadInput if it cannot."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save's are RuntimeErrors
        raise BadInput(f"{path} cannot be written ({first_line(error)}): make room, and go on from the last checkpoint with "
                       "--resume") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(out, resume):
    """Raise BadInput unless the folder can be written and, to resume, holds a checkpoint."""
    if resume and (out is None or not os.path.isfile(Path(out) / "checkpoint.pt")):
        raise BadInput(f"--resume: there is no checkpoint.pt in {out}: leave --resume out, or name its folder with --out")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise BadInput(f"--out {out} is not a folder that can be written ({error.strerror}): name another") from error


def lock_folder(folder):
    """Keep other runs out of this folder until the handle that it returns is closed, or the process ends."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BadInput(f"--out {folder}: another run is writing there: name another folder") from error
    except OSError:  # a file system without locks
        pass
    return handle


def fingerprint(model):
    """A hash of all parameters and buffers: whether two models are the same, bit for bit."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        if torch.is_tensor(value):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def peak_memory_mb(device):
    """Largest memory in use so far, in MB: the GPU's, or the process's own (None where the system does not say)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    if resource is None:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))


# ------------------------------------------------------------------------------------------------ the run

class Progress:
    """One line that says how far a loop is: refreshed in a terminal, a plain line every ten seconds in a log."""

    def __init__(self, name, total, first=0, unit="it"):
        self.name, self.total, self.unit, self.terminal = name, total, unit, sys.stdout.isatty()
        self.last_step, self.last_time, self.rate = first, time.monotonic(), None

    def __call__(self, step, losses):
        """step: iterations done. losses: name -> scalar tensor, read (and waited for) only when a line is printed."""
        now = time.monotonic()
        if now - self.last_time < (0.5 if self.terminal else 10) and step < self.total:
            return
        rate = (step - self.last_step) / max(now - self.last_time, 1e-9)
        self.rate = rate if self.rate is None else 0.7 * self.rate + 0.3 * rate
        self.last_step, self.last_time = step, now
        left = round((self.total - step) / max(self.rate, 1e-9))
        line = f"{self.name} {step}/{self.total}  " + "  ".join(f"{key} {float(value):.4f}" for key, value in losses.items())
        line += f"  {self.rate:.2f} {self.unit}/s  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        end = "" if self.terminal and step < self.total else "\n"
        print(("\r\x1b[K" if self.terminal else "") + line, end=end, flush=True)


class Repeated:
    """An iteration, time after time. On a GPU, from the fourth time on, a CUDA graph of it: hundreds of operations started at
    once, where starting each from Python takes longer than most take to run.

    function: takes nothing, and nothing from outside but tensors that stay in their places, and returns tensors, whose values
    the next time replaces. Its Python runs only until it is recorded. One whose teacher waits for the GPU is not recorded:
    a recording that fails leaves torch's allocator (2.11) as if it still went on, so that is found out before.
    """

    def __init__(self, function, device):
        self.function, self.device, self.times, self.graph, self.why_not = function, device, 0, None, None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self):
        if self.stream is None:
            return self.function()
        self.times += 1  # three first: cuDNN chooses its algorithms, optimizers make their state
        if self.times == 4 and not self.why_not:
            self.record()
        if self.graph is not None:
            self.graph.replay()
            return self.result
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            result = self.watched() if self.times == 3 else self.function()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        if self.times == 4:
            print(f"\nno CUDA graph ({self.why_not}): each operation is started from Python", flush=True)
        return result

    def watched(self):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                result = self.function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        if any("synchronizing" in str(warning.message) for warning in said):
            self.why_not = "the teacher waits for the GPU"
        return result

    def record(self):
        random = torch.cuda.default_generators[self.device.index]
        state, graph = random.clone_state(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(torch.cuda.current_stream(self.device)), torch.cuda.graph(  # the outer one: if this fails
                    graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.function()
            self.graph = graph
        except RuntimeError as error:
            random.graphsafe_set_state(state)
            self.why_not = first_line(error)


class Run:
    """Everything round the loop: checkpoints, Ctrl-C, progress, log.csv, and the figures and files at the end; used by
    quantize(). parts: name -> what has a state_dict and belongs in the checkpoint beside student and generator."""

    def __init__(self, settings, teacher, student, generator, device, evaluate, out, resume, checkpoint_every, **parts):
        self.settings = {**settings, "teacher": fingerprint(teacher)}
        self.teacher, self.student, self.generator, self.device, self.evaluate = teacher, student, generator, device, evaluate
        self.out, self.resume, self.checkpoint_every = None if out is None else Path(out), resume, checkpoint_every
        self.parts = {"student": student, "generator": generator, **parts}
        self.step, self.seconds, self.figures, self.rows, self.requests, self.handlers = 0, 0.0, {}, [], [], {}
        self.start = self.lock = None

    def __enter__(self):
        if self.out is not None:
            self.lock = lock_folder(self.out)
        if threading.current_thread() is threading.main_thread():  # no other may catch signals
            self.handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self.resume:
                self.load()
            if "fp_top1" not in self.figures:  # as after a first part that had no images to measure on
                self.measure("fp")
            if self.out is not None and not self.resume:
                self.set_aside()
        except BaseException:
            self.__exit__()
            raise
        print("  ".join(f"{key}={value}" for key, value in self.settings.items()) + f"  device={self.device}", flush=True)
        self.progress = Progress(METHOD, self.settings["iterations"], self.step)
        self.start = self.saved = time.monotonic()
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock is not None:
            os.close(self.lock)

    def stop(self, number, frame):
        """Signal handler: the loop stops between two iterations; asked a second time, or outside of it, at once."""
        if self.requests or self.start is None or self.step == self.settings["iterations"]:
            raise KeyboardInterrupt
        self.requests.append(number)
        with contextlib.suppress(OSError):  # where there is no stderr
            os.write(2, b"\nstopping after this iteration; once more: at once, and what came after the last checkpoint is lost\n")

    def report(self, step, losses):
        """After each iteration. step: iterations done. losses: name -> scalar tensor, read only when it is written."""
        iterations, self.step = self.settings["iterations"], step
        self.progress(step, losses)
        log = step % max(1, iterations // 200) == 0 or step == iterations
        due = self.out is not None and time.monotonic() - self.saved > self.checkpoint_every
        save = self.requests or step == iterations or due
        if log or save:
            row = {"step": step, **{key: float(value) for key, value in losses.items()}}
            for key, value in row.items():
                if not math.isfinite(value):
                    raise BadInput(f"{key} is {value} at iteration {step}: lower --generator-lr, --student-lr or --norm-lr")
            if log:
                self.rows.append(row)
        if save:
            self.save()
        if step == iterations:  # what follows is measuring
            self.seconds += time.monotonic() - self.start
        if self.requests:
            where = f"saved in {self.out}, --resume goes on from there" if self.out else "nothing saved without `out`"
            raise KeyboardInterrupt(f"stopped after iteration {step} of {iterations}; {where}")

    def measure(self, name):
        """figures: those of `evaluate`, NAME_top1 and so on; and, of a student, on fresh synthetic images, how often its first
        choice is the teacher's, and the teacher's the label, in percent. Leaves the random numbers as they are."""
        begun, model = time.monotonic(), self.teacher if name == "fp" else self.student
        if self.evaluate is not None:
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                measured = python_values(self.evaluate(model))
            figures = measured if isinstance(measured, dict) else {"top1": measured}
            if (not all(isinstance(v, (int, float)) for v in figures.values()) or not 0 <= figures.get("top1", -1) <= 100
                    or "agreement" in figures):
                raise BadInput(f"evaluate returns {measured!r}: it has to return a model's top-1 in percent, 0 to 100, or a dict of "
                               "numbers that has it as top1 (and no agreement: that is on generated images)")
            self.figures.update({f"{name}_{key}": float(value) for key, value in figures.items()})
            model.eval()  # whatever mode `evaluate` leaves it in
        if name != "fp":
            with torch.no_grad():
                own, teachers, labels = torch.cat([torch.stack([model(x).argmax(1), self.teacher(x).argmax(1), y])
                                                   for x, y in self.fresh_images()], 1)  # (images,) each
            for key, right in ((f"{name}_agreement", own == teachers), ("recognised", teachers == labels)):
                self.figures[key] = 100 * right.sum().item() / len(right)
        if name == "ptq":  # the only one within the loop, whose seconds are those of iterations and calibration
            self.seconds -= time.monotonic() - begun

    @torch.no_grad()
    def fresh_images(self):
        """1,000 generated images (as many as were trained on, if less) and their labels, in batches of 50, for any run the same
        noise, without using up random numbers."""
        count = min(1000, self.settings["iterations"] * self.settings["batch_size"])
        random = torch.Generator().manual_seed(1)
        labels = torch.randint(self.settings["num_classes"], (count,), device="cpu", generator=random)
        noise = torch.randn(count, self.generator.latent_dim, device="cpu", generator=random)
        self.generator.eval()
        for z, y in zip(noise.split(50), labels.split(50)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings["precision"] == "bfloat16"):
                images = self.generator(z.to(self.device), y.to(self.device))
            yield images, y.to(self.device)
        self.generator.train()

    @torch.no_grad()
    def save_samples(self):
        """samples.png: generated images, the same noise for any run, one row a class, ten classes at the most."""
        num_classes = self.settings["num_classes"]
        rows, columns = min(num_classes, 10), 8 if self.generator.start_size <= 16 else 4
        labels = (torch.arange(rows) * num_classes // rows).repeat_interleave(columns).to(self.device)
        z = torch.randn(len(labels), self.generator.latent_dim, device="cpu", generator=torch.Generator().manual_seed(0))
        pixels = self.generator.eval()(z.to(self.device), labels) * self.generator.std + self.generator.mean
        with atomically(self.out / "samples.png") as path:
            utils.save_image(pixels, path, nrow=columns, format="png")

    def save(self):
        if self.out is None:
            return
        now = time.monotonic()
        state = {"settings": self.settings, "step": self.step, "seconds": self.seconds + now - self.start,
                 "figures": self.figures, "rows": self.rows, "rng": torch.get_rng_state(),
                 "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                 **{name: part.state_dict() for name, part in self.parts.items()}}
        with atomically(self.out / "checkpoint.pt") as path:
            torch.save(state, path)
        with atomically(self.out / "log.csv") as path, open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[-1]) if self.rows else ["step"], restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        self.saved = time.monotonic()

    def load(self):
        """Go on from checkpoint.pt. Raises BadInput if it cannot be read or was made with other settings."""
        file = self.out / "checkpoint.pt"
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            made_with = state["settings"]
        except Exception as error:
            raise BadInput(f"--resume: {file} cannot be read ({first_line(error)}): start without --resume") from error
        for key, value in self.settings.items():
            if made_with.get(key) != value:
                made = "from another teacher" if key == "teacher" else f"with {key} = {made_with.get(key)}, now it is {value}"
                raise BadInput(f"--resume: the checkpoint in {self.out} was made {made}: use the same, or another --out")
        for name, part in self.parts.items():
            try:
                part.load_state_dict(state[name])
            except (KeyError, RuntimeError, ValueError) as error:
                raise BadInput(f"--resume: {file} is from another version of this program ({name} does not fit): "
                               "start without --resume") from error
        self.step, self.seconds, self.figures, self.rows = (state[key] for key in ("step", "seconds", "figures", "rows"))
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def set_aside(self):
        """Move the files of an earlier run in this folder into a folder of their own: nothing computed is ever lost."""
        earlier = [self.out / name for name in ("checkpoint.pt", "result.json", "student.pt", "samples.png", "log.csv")
                   if (self.out / name).exists()]
        if earlier:
            aside = next(path for path in (self.out / f"earlier-{n}" for n in itertools.count(1)) if not path.exists())
            aside.mkdir()
            for path in earlier:
                os.replace(path, aside / path.name)
            print(f"the earlier run in {self.out} is now in {aside}")

    def finish(self):
        """Measure the student; write student.pt and result.json, whose content is returned; print the line for people."""
        self.measure("q")
        self.student.to(memory_format=torch.contiguous_format)
        files = io.BytesIO(), io.BytesIO()
        torch.save(self.teacher.state_dict(), files[0])
        torch.save({**pack(self.student), "settings": self.settings}, files[1])
        fp_mb, q_mb = (file.getbuffer().nbytes / 1e6 for file in files)
        cuda = self.device.type == "cuda"
        result = {**self.settings, **self.figures, "seconds": round(self.seconds, 1),
                  "iterations_per_s": round(self.step / self.seconds, 3), "peak_memory_mb": peak_memory_mb(self.device),
                  "fp_mb": round(fp_mb, 3), "q_mb": round(q_mb, 3), "device": str(self.device), "device_name":
                  torch.cuda.get_device_name(self.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
                  "torch": torch.__version__, "numpy": np.__version__}
        if self.out is not None:
            with atomically(self.out / "student.pt") as path:
                path.write_bytes(files[1].getbuffer())
            with atomically(self.out / "result.json") as path:
                valid = json.loads(json.dumps(result), parse_constant=lambda name: None)  # NaN and Infinity are no JSON
                path.write_text(json.dumps(valid, indent=2) + "\n")
            if len(self.settings["mean"]) in (1, 3):  # what a picture can show
                self.save_samples()
        w, a = self.settings["w_bits"], self.settings["a_bits"]
        plain, smaller = f"plain {w}-bit" if w == a else f"plain W{w}A{a}", f"{fp_mb / q_mb:.1f}x smaller"
        if self.evaluate is not None:
            middle = f"{plain} {result['ptq_top1']:.1f} %  " if "ptq_top1" in result else ""  # if images came with --resume
            nearness = (f" (agreement {result['q_real_agreement']:.1f} %, divergence {result['q_divergence']:.3f})"
                        if {"q_real_agreement", "q_divergence"} <= result.keys() else "")
            print(f"full precision {result['fp_top1']:.1f} %  {middle}{METHOD} {result['q_top1']:.1f} %{nearness}  {smaller}")
        else:
            print(f"agreement with the teacher on synthetic images: {plain} {result['ptq_agreement']:.1f} %  "
                  f"{METHOD} {result['q_agreement']:.1f} %  {smaller}")
        return result


# ------------------------------------------------------------------------------------------------ the command line

def evaluate_student(args):
    """--evaluate: measure a packed student again on test images; nothing is trained."""
    try:
        packed = torch.load(args.evaluate, map_location="cpu", weights_only=True)
        args.arch, args.dataset = packed["settings"]["arch"], packed["settings"]["dataset"]
        model, _, _, _, preprocess, _ = build_teacher(args.arch, args.dataset)
        student = unpack(packed, model)
    except Exception as error:
        why = getattr(error, "strerror", None) or f"it is not a student.pt written by this command ({first_line(error)})"
        raise BadInput(f"--evaluate {args.evaluate}: {why}: name another") from error
    if not args.data and args.dataset != "shapes":
        raise BadInput("--evaluate needs --data FOLDER, the labelled images to measure on")
    device, _ = choose_device(args.device, "float32")
    figures = figures_on(load_images(args, preprocess), student.to(device), None, device)
    print(f"{args.evaluate}: top-1 {figures['top1']:.2f} %")


def common_flags(parser):
    add = parser.add_argument_group("network and data").add_argument
    add("--arch", default="shapes", metavar="NAME", help="shapes: the offline demonstration (default); resnet20: for CIFAR; or any "
        "torchvision classifier with batch norm, such as resnet18")
    add("--dataset", choices=DATASETS, help="what it was trained on: classes, image size, normalisation (default: the arch's)")
    add("--weights", metavar="FILE", help="state dict of the full-precision network (default, downloaded once: torchvision's "
        "IMAGENET1K_V1, or for resnet20 that of chenyaofo/pytorch-cifar-models)")
    add("--data", metavar="FOLDER", help="labelled test images, to measure with, never to train: a folder for each class, "
        "directly or in val/ or test/, or torchvision's CIFAR folder (default: none; shapes draws its own)")
    add = parser.add_argument_group("quantization").add_argument
    add("--w", dest="w_bits", type=int, metavar="BITS", help="bits of the weights, 2 to 8 (default: 4; 3 for shapes)")
    add("--a", dest="a_bits", type=int, metavar="BITS", help="the same of activations; the network's own input always has 8")
    add("--symmetric", action="store_true", help="signed codes with zero point 0 (default: asymmetric)")
    add = parser.add_argument_group("run").add_argument
    add("--iterations", type=int, metavar="N", help="warm-up included (default: 80000 for imagenet, GDFQ; CIFAR 1000, shapes 500)")
    add("--batch-size", type=int, metavar="N", help="images an iteration (default: 16 for imagenet, GDFQ; CIFAR 64, shapes 32)")
    add("--warmup", type=float, metavar="SHARE", help="of iterations in which the generator learns alone (default: %(default)s)")
    add("--generator-lr", type=float, metavar="RATE", help="of Adam (default: %(default)s, GDFQ)")
    add("--student-lr", type=float, metavar="RATE", help="of SGD for the student's weights, falling as a cosine to zero (default: "
        "0.003, above 100 classes 0.001; lower in longer runs: README; published: 0.0001 CIFAR, 0.000001 ImageNet)")
    add("--norm-lr", type=float, metavar="RATE", help="the same for its batch norms and biases (default: 0.01, lower in longer "
        "runs; with both 0 the student is only corrected)")
    add("--seed", type=int, metavar="N", help="seed of all random numbers (default: %(default)s)")
    add("--device", help="cuda, cuda:1, cpu, ... (default: cuda if there is one, else cpu)")
    add("--precision", help="float32, bfloat16, or auto (default: bfloat16 where it is faster); of convolutions in training alone")
    add("--out", metavar="FOLDER", help="where result.json, student.pt, checkpoint.pt, samples.png and log.csv go (default: a "
        "folder in out/ named after the settings); an earlier run there is moved aside, not lost")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, exactly (on a GPU up to the order of sums)")
    add("--checkpoint-every", type=float, metavar="SECONDS", help="(default: %(default)s); Ctrl-C saves one too")
    add("--evaluate", metavar="STUDENT.pt", help="train nothing: measure this packed student on --data")


def command_line(parser, argv):
    """The command: `parser` has the flags, whose names and defaults are quantize's. All is checked before long work."""
    def error(message):
        raise BadInput(f"{message} (--help explains the flags)")
    parser.error = error
    parameters = inspect.signature(quantize).parameters
    parser.set_defaults(**{name: value.default for name, value in parameters.items() if value.default is not value.empty})
    args = parser.parse_args(argv)
    if args.evaluate is not None:
        return evaluate_student(args)
    names = ["shapes", "resnet20"] + models.list_models(module=models)
    if args.arch not in names:
        near = difflib.get_close_matches(args.arch, names, 3, 0.3)
        raise BadInput(f"--arch {args.arch} is not known: did you mean {' or '.join(near) or 'resnet18'}?")
    args.dataset = args.dataset or {"shapes": "shapes", "resnet20": "cifar10"}.get(args.arch, "imagenet")
    if (args.arch == "shapes") != (args.dataset == "shapes"):
        raise BadInput("--arch shapes and --dataset shapes go together: change one of them")
    *_, num_classes, iterations, batch_size = DATASETS[args.dataset]
    bits = 3 if args.arch == "shapes" else 4
    for name, default in (("w_bits", bits), ("a_bits", bits), ("iterations", iterations), ("batch_size", batch_size)):
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.out = args.out or os.path.join("out", f"{METHOD.lower()}-{args.arch}-w{args.w_bits}a{args.a_bits}-seed{args.seed}")
    model, image_size, mean, std, preprocess, published = build_teacher(args.arch, args.dataset)
    options = {name: value for name, value in vars(args).items() if name in parameters} | dict(
        image_size=image_size, num_classes=num_classes, mean=mean, std=std, about={"arch": args.arch, "dataset": args.dataset})
    check_settings(options)
    device, _ = choose_device(args.device, args.precision)
    images, teacher = load_images(args, preprocess), load_teacher(args, model, published)
    if images is not None:  # the full-precision model, which quantize() measures too, is its own teacher
        options["evaluate"] = lambda model: figures_on(
            images, model, teacher.to(device) if quant_layers(model) else None, device)
    return quantize(teacher, **options)


def run(main):
    """Call main; what the user can mend is one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)):
            raise
        print(f"{Path(sys.argv[0]).name}: not enough memory ({first_line(error)}): choose a smaller --batch-size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"\n{Path(sys.argv[0]).name}: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
# ================================================================================================ shared plumbing: end


RULES = {"lka": YES_OR_NO, "margin": (lambda v: v is None or abs(v) < math.pi, "a number of radians between -pi and pi"),
         "kd": (lambda v: v in ("kl", "dkd"), "kl or dkd"), "temperature": POSITIVE, "alpha": NOT_NEGATIVE,
         "beta": NOT_NEGATIVE, "bns_weight": NONE_OR_NOT_NEGATIVE, "ce_weight": NONE_OR_NOT_NEGATIVE,
         "pull": (lambda v: v is None or 0 <= v <= 1, "a share, from 0 to 1")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_flags(parser)
    add = parser.add_argument_group("method (--no-lka --margin 0 --kd kl --pull 0: GDFQ's losses; README, differences)").add_argument
    add("--no-lka", dest="lka", action="store_false", help="generator without large-kernel attention")
    add("--margin", type=float, metavar="RADIANS", help="AMA's angular margin on the label's logit; below 0 it widens the "
        "angles (default: -0.5 up to 100 classes, 0 above)")
    add("--kd", choices=("dkd", "kl"), help="distillation: decoupled (default) or plain KL divergence")
    add("--temperature", type=float, metavar="T", help="temperature of the distillation (default: %(default)s, as in the "
        "decoupled distillation paper)")
    add("--alpha", type=float, help="weight of TCKD (default: %(default)s)")
    add("--beta", type=float, help="weight of NCKD (default: %(default)s)")
    add("--bns-weight", type=float, help="weight of L_BNS (default: 1 up to 100 classes, 100 above; GDFQ has 0.1)")
    add("--ce-weight", type=float, help="weight of the student's cross-entropy (default: 1 up to 100 classes, 0 above)")
    add("--pull", type=float, metavar="SHARE", help="of the way back to where the student began to learn, that its weights, batch "
        "norms and biases go after each step, falling as their rates do (default: 0.01, lower in longer runs; above 100 "
        "classes 0)")
    command_line(parser, argv)


if __name__ == "__main__":
    run(main)
