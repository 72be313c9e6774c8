# SPDX-License-Identifier: MIT
"""ClusterQ: semantic feature distribution alignment (arXiv 2205.00179; ICDM 2022).

A trained classifier P becomes a low-bit one, Q, without any of its data: a generator G learns to
draw images whose batch-norm statistics and classes are those that P remembers, and whose deep
features cluster by class. Q learns from P on them.

    python clusterq.py                              # offline demonstration, minutes on two cores
    python clusterq.py --arch resnet18 --w 4 --a 4  # an ImageNet network; for a GPU
    python clusterq.py --help                       # every flag and its default

Result (README): ResNet-20, CIFAR-10, 3-bit weights and activations, 1,000 iterations of 64, one
seed: 85.9 % of 88.0, where plain quantization leaves 75.5; a quarter of an hour on one core.

Where each part comes from, and the flag without it:

    generator, L_CE + L_BNS, alternate steps         GDFQ, arXiv 2003.03603     (the baseline:
                                                                         --no-sfda)
    class centroids and alignment to them (L_SFDA)   ClusterQ                   --no-sfda
    spread within a class, against mode collapse     ClusterQ                   --no-variance
    moving average of the centroids                  ClusterQ                   --no-ema
    ranges of least error, GPTQ, GPTAQ, corrected    literature of quantization
      batch norms: quant.calibrate                     with data                --plain
    half of the student's images transformed         this project               --plain
    L_BNS in units of each layer, label added to z,
      two rates, clipped gradients, embeddings
      begun from the classifier                      this project               (none)

The algorithm, numbered as in quantize():
 1. Draw noise z, labels y and images x = G(z, y).
 2. Generator step on L_G = L_CE + a L_BNS + b L_SFDA, through the frozen P. It learns alone, and
    without L_SFDA, at first. Then the centroids follow the images.
 3. Once, between the generator's warm-up and the student's first step: Q's ranges are observed on
    20 batches (plain quantization), then Q is calibrated on them, half of each transformed.
 4. Student step on the same images, half of them transformed: L_Q = c CE(Q(x), y) + KL(P || Q) T^2.
 5. Report and save.
 6. Evaluate, and write Q as integers.

The main differences from the paper and its published code (github.com/DiamondSheep/ClusterQ):
 - The noise round a centroid, drawn anew each time as published, leaves the gradient of no noise:
   classes still collapse. Ours is the nearest of its size (sfda_loss). The published code's
   diversity term has no gradient at all.
 - Centroids are each class's own, of images that P recognises. Published: copies of the running
   statistics, the same for all classes.
 - Statistics are of each image, in units of their layer's standard deviation.

Shapes: B batch size, K classes, S image size, C channels (of all semantic layers together where
statistics are meant), D features, H and W height and width.
"""
import argparse
import contextlib
import copy
import difflib
import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import datasets, models, transforms, utils

from quant import calibrate, freeze, pack, quant_layers, quantize_model, unpack

METHOD = "ClusterQ"

# --------------------------------------------------------------------------------------- generator


class UpConv2d(nn.Conv2d):
    """A 3 x 3 convolution of the image upsampled twice, (B, I, H, W) -> (B, O, 2 H, 2 W), in 4/9 of
    the multiplications: of nine upsampled pixels only four differ, so it is a transposed
    convolution, whose 4 x 4 kernel sums the 3 x 3 one over the four places of a pixel's copies."""

    def forward(self, x):
        kernel = sum(F.pad(self.weight, (i, 1 - i, j, 1 - j)) for i in (0, 1) for j in (0, 1))
        kernel = kernel.flip(2, 3).transpose(0, 1)                      # (I, O, 4, 4)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


class Generator(nn.Module):
    """G(z, y): noise (B, latent_dim), labels (B,) -> normalised images (B, C, S, S).

    GDFQ's generator (arXiv 2003.03603), from S/4 on, for S of 64 and more from S/8. The label's
    embedding is added to z (GDFQ multiplies: then the label is found in the variance alone). mean,
    std: of the teacher's normalisation. Pixels stay in [0, 1], the range to which the student's
    input is quantized.
    """

    def __init__(self, image_size, num_classes, mean, std, latent_dim=100):
        super().__init__()
        self.image_size, self.latent_dim, self.num_classes = image_size, latent_dim, num_classes
        widths = (128, 128, 64) if image_size < 64 else (128, 128, 64, 32)
        self.start_size = -(-image_size // 2 ** (len(widths) - 1))      # rounded up
        self.embedding = nn.Embedding(num_classes, latent_dim)
        self.linear = nn.Linear(latent_dim, 128 * self.start_size ** 2)
        layers = [nn.BatchNorm2d(128)]
        for i, o in zip(widths, widths[1:]):                            # twice as high and wide
            layers += [UpConv2d(i, o, 3), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(o, len(mean), 3, padding=1))
        self.last_norm = nn.BatchNorm2d(len(mean), affine=False)
        self.mean, self.std = (nn.Buffer(torch.tensor(v).view(-1, 1, 1)) for v in (mean, std))

    def forward(self, z, labels):
        x = self.linear(z + self.embedding(labels))
        x = x.view(len(z), self.start_size, self.start_size, 128).permute(0, 3, 1, 2)
        x = self.last_norm(self.layers(x).float().tanh())               # (B, C, S or more, ...)
        pixels = (0.5 + 0.25 * x[:, :, :self.image_size, :self.image_size]).clamp(0, 1)
        return (pixels - self.mean) / self.std

    def sample(self, count):
        """Images for z ~ N(0, 1) and y uniform over the classes, and y."""
        z = torch.randn(count, self.latent_dim, device=self.mean.device)
        labels = torch.randint(self.num_classes, (count,), device=z.device)
        return self(z, labels), labels


def class_codes(class_weight, latent_dim):
    """What the embeddings of more than 100 classes start from, (K, D) -> (K, latent_dim): principal
    components of the classifier's rows, root mean square 10. Classes that are alike to the teacher
    have codes that are alike, so what G learns of one serves others too."""
    rows = class_weight.float().cpu()
    u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    codes = F.pad(u * s, (0, latent_dim - len(s)))                      # or cropped, if longer
    return 10 * codes / codes.square().mean().sqrt()


def transformed(images, first):
    """Images, (B, C, S, S), from number `first` on mirrored at random, magnified by 0.5 to 2.5
    (log-uniform) and shifted by up to half their size; the border is reflected. Generated images
    have few layouts. The teacher has to be asked again what it sees."""
    x = images[first:]
    scale = torch.empty(len(x), device=x.device).uniform_(math.log(0.4), math.log(2)).exp()
    theta = x.new_zeros(len(x), 2, 3)                                   # where a pixel comes from
    theta[:, 0, 0] = scale * (torch.rand_like(scale) - 0.5).sign()
    theta[:, 1, 1] = scale
    theta[:, :, 2].uniform_(-1, 1)                                      # 2 is the whole image
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return torch.cat([images[:first], x])


# ------------------------------------------------------------------------------------------ losses


def batch_norm_loss(statistics):
    """L_BNS = mean_l [ MSE(mean(h_l), mu_l) / s_l^2 + MSE(var(h_l), var_l) / s_l^4 ]

    statistics: for each batch norm l the layer, with running means mu_l and variances var_l, and
    means and variances over height and width of its input h_l, (B, C_l) each. mean and var
    (biased) are over batch, height and width, MSE over channels. s_l^2 is the mean of var_l: so
    each layer counts alike. Source: GDFQ, arXiv 2003.03603, eq. 4, where s_l is 1.
    """
    loss = 0
    for norm, means, variances in statistics:
        mean, s2 = means.mean(0), norm.running_var.mean().clamp(min=norm.eps)
        var = variances.mean(0) + (means - mean).square().mean(0)       # within images, and between
        loss = loss + (mean - norm.running_mean).square().mean() / s2
        loss = loss + (var - norm.running_var).square().mean() / s2.square()
    return loss / len(statistics)


def semantic_statistics(statistics, first):
    """Means m_i and variances v_i of each image i, (B, C) each, of the semantic layers, from number
    `first` on, side by side, in units of s_l and s_l^2 (s_l^2: mean running variance of layer l).
    statistics: as of batch_norm_loss. Also weights, (C,), with which a sum over channels is a mean
    over a layer's channels and over layers."""
    means, variances, weights = [], [], []
    for norm, m, v in statistics[first:]:
        s2 = norm.running_var.mean().clamp(min=norm.eps)
        means.append(m / s2.sqrt())
        variances.append(v / s2)
        weights.append(torch.full_like(m[0], 1 / m.shape[1] / len(statistics[first:])))
    return torch.cat(means, 1), torch.cat(variances, 1), torch.cat(weights)


def sfda_loss(values, targets, weights, seen, amplitude):
    """L_SFDA of means or of variances: mean_l [ mean_i MSE(m_il, mu_{y_i,l} + e_i) ].

    values: m, (B, C). targets: mu_y, each image's centroid, (B, C). weights: (C,), see
    semantic_statistics. seen: (B,), 1.0 where the class has a centroid, else 0.0; the mean is over
    those images. amplitude: A, root mean square of the noise e over the batch. Of all such noise
    the nearest to the images is meant: mean_i (d_i - e_i)^2 is least, (rms(d) - A)^2, for
    e = A d / rms(d), d = m - mu. So images are kept at a distance. At A = 0 it is the alignment
    alone. Source: ClusterQ, arXiv 2205.00179, where e is drawn anew each time.
    """
    squares = ((values - targets).square() * seen[:, None]).sum(0) / seen.sum().clamp(min=1)
    if amplitude:
        squares = ((squares + 1e-12).sqrt() - amplitude).square() * seen.any()
    return squares @ weights


class Centroids(nn.Module):
    """For each class the centroid of its images' semantic statistics: buffers means, variances,
    (K, C), and seen, (K,), 1.0 once an image went into it."""

    def __init__(self, num_classes, channels):
        super().__init__()
        self.means = nn.Buffer(torch.zeros(num_classes, channels))
        self.variances = nn.Buffer(torch.zeros(num_classes, channels))
        self.seen = nn.Buffer(torch.zeros(num_classes))

    @torch.no_grad()
    def update(self, means, variances, labels, recognised, rho):
        """centroid_c <- (1 - rho) centroid_c + rho * the batch's mean for class c, all of it the
        first time. means, variances: (B, C). recognised: (B,) bool, the images that count."""
        members = F.one_hot(labels, len(self.seen)).float() * recognised[:, None]       # (B, K)
        count = members.sum(0)
        share = (1 - (1 - rho) * self.seen) * (count > 0)                               # (K,)
        for centroid, values in ((self.means, means), (self.variances, variances)):
            centroid.lerp_(members.T @ values / count.clamp(min=1)[:, None], share[:, None])
        self.seen.copy_((self.seen + count).clamp(max=1))


def kd_loss(student_logits, teacher_logits, temperature):
    """KL(P || Q) T^2 of the softened distributions, the mean over the batch: (B, K), (B, K) -> ().
    T^2 keeps the gradient's size as T changes (Hinton et al., arXiv 1503.02531, section 2)."""
    log_q = F.log_softmax(student_logits / temperature, 1)
    log_p = F.log_softmax(teacher_logits / temperature, 1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature ** 2


# ------------------------------------------------------------------------ seeing inside the teacher


class MeanVariance(torch.autograd.Function):
    """Mean and biased variance of h, (B, C, H, W), over height and width, in float32: with plain
    sums, or torch.var_mean, an iteration takes a tenth longer on a CPU."""

    @staticmethod
    def forward(ctx, h):
        wide = h.float()
        mean = wide.mean((2, 3), keepdim=True)
        ctx.save_for_backward(h, mean)
        return mean.flatten(1), (wide - mean).square_().mean((2, 3))

    @staticmethod
    def backward(ctx, *grads):
        h, mean = ctx.saved_tensors
        shift, slope = (grad[:, :, None, None] / h[0, 0].numel() for grad in grads)
        shift = shift - 2 * slope * mean
        return torch.addcmul(shift.to(h), 2 * slope.to(h), h)


def teacher_forward(teacher, classifier, images):
    """(logits, features, statistics): (B, K), the classifier's input (B, D), and for each
    BatchNorm2d, as they run, the layer and means and variances of its input, (B, C_l) each."""
    features, statistics, hooks = [], [], []

    def keep_statistics(norm, args):
        statistics.append((norm, *MeanVariance.apply(args[0])))

    def keep_features(layer, args):
        features[:] = [args[0].float()]
    for layer in teacher.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.track_running_stats:
            hooks.append(layer.register_forward_pre_hook(keep_statistics))
    hooks.append(classifier.register_forward_pre_hook(keep_features))
    try:
        return teacher(images).float(), features[0].reshape(len(images), -1), statistics
    finally:
        for hook in hooks:
            hook.remove()


# --------------------------------------------------------------------------------------- the method

# What depends on the number of classes: up to 100 of them, or more. With a thousand, labels are
# learnt long after statistics (bns_weight), and the teacher sees another class than the label in
# most images (ce_weight). So do class_codes and make_student_optimizer.
FEW_CLASSES = {"bns_weight": 1.0, "ce_weight": 1.0, "student_lr": 3e-3}
MANY_CLASSES = {"bns_weight": 100.0, "ce_weight": 0.0, "student_lr": 1e-3}


def quantize(teacher, *, image_size, num_classes, mean, std, w_bits, a_bits, iterations, batch_size,
             symmetric=False, plain=False, warmup=0.15, generator_lr=1e-3, student_lr=None,
             norm_lr=1e-2, bns_weight=None, ce_weight=None, sfda=True, sfda_weight=0.9, rho=0.2,
             variance=True, noise=0.5, ema=True, first_layer=None, temperature=4.0, classifier=None,
             evaluate=None, seed=0, device="auto", precision="auto", out=None, resume=False,
             about=None):
    """Quantize a trained classifier without its data. Returns (student, result).

    teacher: an nn.Module, (B, C, S, S) -> logits (B, K), with BatchNorm2d; it is not changed.
    image_size: S, 8 or more. num_classes: K. mean, std: the teacher's normalisation, a number a
    channel, of pixels in [0, 1]. w_bits, a_bits: 2 to 8. classifier: the name of the teacher's last
    layer, found by itself if None. evaluate: a function of a model, on `device`, that returns a
    dict of numbers with "top1", in percent; if None, the models are compared on generated images
    (evaluate_on). out: a folder for result.json, student.pt, checkpoint.pt, log.csv, samples.png.
    about: what else to record there. The rest are the command's flags (--help).

    The student is in evaluation mode, and has to stay there; quant.pack gives its integers. The
    result is what result.json holds. Raises BadInput, a ValueError, before any long work, for what
    cannot be used. Seeds torch's random numbers.
    """
    settings = {"method": METHOD, **locals()}
    for name in ("teacher", "evaluate", "device", "out", "resume"):     # the result is as without
        del settings[name]
    for name, value in (MANY_CLASSES if num_classes > 100 else FEW_CLASSES).items():
        settings[name] = value if settings[name] is None else settings[name]
    bns_weight, ce_weight, student_lr = (settings[name] for name in FEW_CLASSES)
    if iterations < 1 or batch_size < 2 or not 0 <= warmup < 1:
        raise BadInput("iterations: 1 or more; batch_size: 2 or more; warmup: 0 or more, below 1")
    device, dtype = choose_device(device, precision)
    settings["precision"] = str(dtype)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    torch.manual_seed(seed)
    teacher, classifier, student = prepare_models(teacher, settings, device)
    generator = Generator(image_size, num_classes, mean, std)
    if num_classes > 100:
        generator.embedding.weight.data = class_codes(
            classifier.weight.flatten(1), generator.latent_dim)
    generator.to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        *_, statistics = teacher_forward(teacher, classifier, generator.sample(2)[0])
    if first_layer is None:
        first_layer = max(0, (len(statistics) + 1) // 2 - 2)            # as published
    channels = sum(norm.num_features for norm, *_ in statistics[first_layer:])
    if not channels:
        raise BadInput(f"--first-layer {first_layer}: there are {len(statistics)} batch norms")
    centroids = Centroids(num_classes, channels).to(device)
    generator_optimizer = torch.optim.Adam(
        generator.parameters(), generator_lr, betas=(0.5, 0.999), fused=True, capturable=True)
    warm_iterations, half = int(iterations * warmup), batch_size // 2
    student_optimizer, schedule = make_student_optimizer(
        student, settings, iterations - warm_iterations)
    run = start_run(settings, out, resume, {
        "student": student, "generator": generator, "centroids": centroids,
        "student_optimizer": student_optimizer,
        "generator_optimizer": generator_optimizer, "schedule": schedule})

    def measure(name, model):
        on_generated = partial(evaluate_on, fresh_images(generator), teacher)
        found = (evaluate or on_generated)(model)
        run.metrics.update({f"{name}_{key}": value for key, value in found.items()})

    def train_step(learns):
        """Steps 1, 2 and 4. learns: whether the student does too. Returns the losses by name."""
        # 1. Draw noise and labels, and images from them.
        with autocast():
            images, labels = generator.sample(batch_size)               # (B, C, S, S), (B,)
            teacher_logits, _, statistics = teacher_forward(teacher, classifier, images)

        # 2. Generator step on L_G = L_CE + a L_BNS + b L_SFDA, through the frozen teacher.
        losses = {"L_CE": F.cross_entropy(teacher_logits, labels),
                  "L_BNS": batch_norm_loss(statistics)}
        loss = losses["L_CE"] + bns_weight * losses["L_BNS"]
        if sfda:
            means, variances, weights = semantic_statistics(statistics, first_layer)
        if sfda and learns:
            seen, amplitude = centroids.seen[labels], noise if variance else 0
            losses["L_SFDA"] = (
                sfda_loss(means, centroids.means[labels], weights, seen, amplitude)
                + sfda_loss(variances, centroids.variances[labels], weights, seen, amplitude))
            loss = loss + sfda_weight * losses["L_SFDA"]
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
        if sfda and (ema or not learns):                                # the centroids follow
            recognised = teacher_logits.argmax(1) == labels
            centroids.update(means, variances, labels, recognised, rho)

        # 4. Student step on the same images, half transformed: L_Q = c CE(Q(x), y) + T^2 KL.
        if learns:
            images = images.detach() if plain else transformed(images.detach(), half)
            with autocast():
                logits = student(images).float()
                with torch.no_grad():                                   # P sees the other half anew
                    again = teacher(images[half:]).float()
            expected = torch.cat([teacher_logits[:half].detach(), again])
            seen = expected.argmax(1) == labels         # no cross-entropy where P predicts another
            losses["L_QCE"] = (F.cross_entropy(logits, labels, reduction="none") * seen).mean()
            losses["L_KD"] = kd_loss(logits, expected, temperature)
            student_step(student_optimizer, ce_weight * losses["L_QCE"] + losses["L_KD"])
        return {name: loss.detach() for name, loss in losses.items()}

    # Step 5, report and save, is within train. The generator alone at first:
    train(run, partial(train_step, False), warm_iterations)
    # 3. Once, before the student's first step: observe its ranges and calibrate it.
    if "calibrated_top1" not in run.metrics:
        with torch.no_grad():
            with autocast():
                batches = [generator.sample(batch_size)[0] for _ in range(20)]
            for images in batches:
                student(images)
        measure("fp", teacher)
        measure("ptq", freeze(student))
        if not plain:
            print("calibrating: ranges, weights and batch norms, layer by layer", flush=True)
            calibrate(student, teacher, [transformed(images, half) for images in batches])
        measure("calibrated", student)
    train(run, partial(train_step, True), iterations, schedule)
    # 6. Evaluate (how far classes separate is what ClusterQ is about), and write Q as integers.
    measure("q", student)
    with torch.no_grad():
        features, classes = (torch.cat(values) for values in zip(*(
            (teacher_forward(teacher, classifier, images)[1], labels)
            for images, labels in fresh_images(generator))))
    members = F.one_hot(classes, num_classes).float()                   # (1000, K)
    centres = members.T @ features / members.sum(0).clamp(min=1)[:, None]
    within = (features - centres[classes]).square().mean(0)             # (D,)
    between = (centres[classes] - features.mean(0)).square().mean(0)
    run.metrics.update(separability=(between.sum() / within.sum()).item(),
                       spread=within.mean().sqrt().item())
    return student, finish(run, teacher, "" if evaluate else "on generated images: ")


# =========================================================================== shared plumbing: begin
# The same, byte for byte, in lrq.py and clusterq.py: teachers, images, runs, the command line.

TRAINING, STOP = [], []  # while TRAINING, Ctrl-C and SIGTERM add to STOP, asked after an iteration


class BadInput(ValueError):
    """Something that the user gave cannot be used: one line that says what, and what to do."""


@contextlib.contextmanager
def blaming(what):
    """What fails inside is the user's input: BadInput, with `what` and the error in one line."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{what} ({' '.join(str(error).split())[:300] or repr(error)})") from error


# ------------------------------------------------------------------------------ teachers and images

# What the teacher was trained on, and defaults. Of imagenet the preprocessing is the published one.
CIFAR = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010], "image_size": 32,
         "iterations": 1000, "batch_size": 64, "w_bits": 4, "a_bits": 4}
DATASETS = {
    "shapes": {"mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 24, "num_classes": 10,
               "iterations": 300, "batch_size": 32, "w_bits": 2, "a_bits": 4},
    "cifar10": {**CIFAR, "num_classes": 10}, "cifar100": {**CIFAR, "num_classes": 100},
    "imagenet": {"num_classes": 1000, "iterations": 80000, "batch_size": 16, "w_bits": 4,
                 "a_bits": 4}}
CIFAR_URL = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/"
CIFAR_FILES = {"cifar10": "cifar10_resnet20-4118986f.pt",
               "cifar100": "cifar100_resnet20-23dac2f1.pt"}


class CifarResNet(models.ResNet):
    """ResNet for 32 x 32 images (arXiv 1512.03385, section 4.2), named as in
    chenyaofo/pytorch-cifar-models: three stages of `blocks` blocks, 3 for ResNet-20."""

    def __init__(self, blocks, num_classes):
        super().__init__(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes)
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.inplanes, self.maxpool, self.layer4 = 16, nn.Identity(), nn.Identity()
        for name, width, stride in (("layer1", 16, 1), ("layer2", 32, 2), ("layer3", 64, 2)):
            setattr(self, name, self._make_layer(models.resnet.BasicBlock, width, blocks, stride))
        self.fc = nn.Linear(64, num_classes)


def draw_shapes(count, seed):
    """The demonstration's images, (count, 3, 24, 24), normalised, and labels, (count,): ten smooth
    shapes, mirrored, magnified, shifted and tinted at random, in noise."""
    torch.manual_seed(0)
    shapes = F.interpolate(torch.randn(10, 3, 8, 8), 24, mode="bicubic")
    torch.manual_seed(seed)
    labels = torch.randint(10, (count,))
    images = transformed(shapes[labels], 0) + torch.rand(count, 3, 1, 1) - 0.5
    return (images + 0.5 * torch.randn(count, 3, 24, 24)).clamp(-2, 2), labels


def shapes_teacher():
    """State dict of the demonstration's teacher, a ResNet-8 trained on 8,000 images, once."""
    file = Path(torch.hub.get_dir()) / "zsq_shapes_resnet8.pt"
    if not file.exists():
        print("training the demonstration's teacher, once", flush=True)
        (images, labels), model = draw_shapes(8000, seed=1), CifarResNet(1, 10)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=640)
        for step in range(640):
            batch = torch.randint(8000, (100,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, partial(torch.save, model.state_dict()))
    return torch.load(file, weights_only=True)


def load_teacher(arch, dataset, file):
    """(model, quantize's arguments about it, preprocessing of test images), with the state dict in
    `file`, else the published one, downloaded once. arch, dataset: as the flags."""
    names = ["shapes", "resnet20", *models.list_models(module=models)]
    if arch not in names:
        near = difflib.get_close_matches(arch, names, 1, 0)[0]
        raise BadInput(f"--arch {arch} is not known: did you mean {near}?")
    about = DATASETS[dataset]
    with blaming(f"--arch {arch} --dataset {dataset} --weights {file} cannot be loaded: give the "
                 "file of a state dict that fits"):
        if arch in names[:2]:
            model = CifarResNet(1 if arch == "shapes" else 3, about["num_classes"])
        else:
            model = models.get_model(arch, num_classes=about["num_classes"])
            model.transform_input = True  # published Inceptions normalise again, others ignore it
        if dataset == "imagenet":
            published = models.get_model_weights(arch)
            published = getattr(published, "IMAGENET1K_V1", published.DEFAULT)
            preprocess, url = published.transforms(), published.url
            about = {**about, "image_size": preprocess.crop_size[0], "mean": preprocess.mean,
                     "std": preprocess.std}
        else:
            preprocess = transforms.Compose([
                transforms.Resize(about["image_size"]), transforms.ToTensor(),
                transforms.Normalize(about["mean"], about["std"])])
            url = CIFAR_URL + CIFAR_FILES.get(dataset, "")
        if file:
            state = torch.load(file, map_location="cpu", weights_only=True)
        elif arch == "shapes":
            state = shapes_teacher()
        else:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        state = state.get("state_dict", state)
        state = {key.removeprefix("module."): value for key, value in state.items()}
        optional = {key: value for key, value in model.state_dict().items()
                    if "aux" in key.lower() or "num_batches" in key}
        model.load_state_dict({**optional, **state})
    return model.eval(), about, preprocess


def load_images(dataset, folder, preprocess, workers):
    """Labelled test images in batches, or None: those in `folder`; the demonstration draws its."""
    if dataset == "shapes":
        return torch.utils.data.DataLoader(list(zip(*draw_shapes(2000, seed=2))), 250)
    if folder is None:
        return None
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}.get(dataset)
    with blaming(f"--data {folder} is not a folder with one of images for each of the classes of "
                 f"--dataset {dataset}, or torchvision's CIFAR folder"):
        if kind and (Path(folder) / kind.base_folder).exists():
            images = kind(folder, train=False, transform=preprocess)
        else:
            images = datasets.ImageFolder(folder, preprocess)
        if len(images.classes) != DATASETS[dataset]["num_classes"]:
            raise ValueError(f"it has {len(images.classes)} classes")
    return torch.utils.data.DataLoader(images, 100, num_workers=workers)


@torch.no_grad()
def evaluate_on(batches, teacher, model):
    """{"top1", "agreement", "divergence"} on labelled images: how often the model's first choice is
    the label and the teacher's, in percent, and the mean of KL(P || Q) from the teacher."""
    device, rows = next(model.parameters()).device, []
    for images, labels in batches:
        images = images.to(device)
        rows.append((labels.to(device), teacher(images), model(images)))
    labels, expected, logits = map(torch.cat, zip(*rows))
    top1, agreement = ((logits.argmax(1) == right).float().mean().item() * 100
                       for right in (labels, expected.argmax(1)))
    divergence = kd_loss(logits, expected, 1).item()
    return {"top1": top1, "agreement": agreement, "divergence": divergence}


@torch.no_grad()
def fresh_images(generator):
    """1,000 generated images and labels in batches, without using up random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(20):
            yield generator.sample(50)


# ------------------------------------------------------------------------------------------ a run


def choose_device(name, precision):
    """(device, dtype of convolutions in training): bfloat16 where the processor is faster in it. On
    a GPU, beside that, iterations are replayed as a CUDA graph, and sums have no fixed order."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with blaming(f"--device {name} cannot be used: try cpu"):
        device = torch.zeros(1, device=name).device
    torch.backends.cudnn.benchmark = True  # every iteration has the same shapes
    cpu = torch.cpu.get_capabilities()  # an Intel without AMX is slower in bfloat16
    fast = cpu.get("amx_bf16") or cpu.get("avx512_bf16") and "AMD" in cpu["cpu_name"]
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" or fast else "float32"
    return device, getattr(torch, precision)


def prepare_models(teacher, settings, device):
    """(teacher, classifier, student): a frozen copy of the teacher; its last layer, the one that
    `classifier` names, else the last with K outputs; its quantized copy. Both are tried on noise.
    Raises BadInput for a teacher that cannot be used."""
    s = SimpleNamespace(**settings)
    pixels = [(pixel - m) / d for pixel in (0, 1) for m, d in zip(s.mean, s.std)]
    images = torch.randn(2, len(s.mean), s.image_size, s.image_size, device=device)
    teacher = getattr(teacher, "_orig_mod", teacher)                    # of torch.compile
    teacher = teacher.module if isinstance(teacher, nn.DataParallel) else teacher
    with blaming(f"the teacher cannot be used on images of {tuple(images.shape[1:])}: it has to "
                 f"have BatchNorm2d and return the {s.num_classes} logits of its last layer, "
                 f"{s.classifier}, without softmax; check image_size, num_classes, classifier"):
        for key, value in teacher.state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"{key} is NaN or infinite")
        teacher = copy.deepcopy(teacher).float().eval().requires_grad_(False)
        teacher.to(device, memory_format=torch.channels_last)
        layer = [m for key, m in teacher.named_modules() if key == s.classifier or not s.classifier
                 and s.num_classes in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))
                 ][-1]
        logits, features, statistics = teacher_forward(teacher, layer, images.requires_grad_())
        batch_norm_loss(statistics).backward()
        again = F.linear(features, layer.weight.flatten(1), layer.bias)
        torch.testing.assert_close(again, logits, rtol=1e-3, atol=1e-3)
        student = quantize_model(teacher, s.w_bits, s.a_bits, s.symmetric, least_error=not s.plain,
                                 input_range=(min(pixels), max(pixels)))
        copy.deepcopy(student)(images)
    return teacher, layer, student


def make_student_optimizer(student, settings, steps):
    """SGD, rates falling as a cosine. That of batch norms and biases is the higher one: these are
    few and gain by it, while weights at such a rate take a student of many classes away from its
    teacher. In a longer run both are lower, or the student ends farther from its teacher."""
    longest = 1000 if settings["num_classes"] <= 100 else 4000
    scale, groups = min(1, longest / settings["iterations"]) ** 0.5, []
    for name, decay, matrices in (("student_lr", 1e-4, True), ("norm_lr", 0, False)):
        learn = [p for p in student.parameters() if (p.dim() > 1) == matrices]
        lr = torch.tensor(settings[name] * scale, device=learn[0].device)   # for a CUDA graph
        groups.append({"params": learn, "lr": lr, "weight_decay": decay})
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))


def student_step(optimizer, loss):
    """A step with clipped gradients: else a 3-bit student can fall to chance."""
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 3.0)
    optimizer.step()


def cuda_graph(function):
    """On a GPU, a function of nothing that returns tensors is recorded at its fourth call, then
    replayed: its operations start at once, instead of one by one from Python."""
    stream, calls, graph, result = torch.cuda.Stream(), 0, None, None

    def call():
        nonlocal calls, graph, result
        calls += 1
        if calls == 4:
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    result = function()
            except RuntimeError as error:
                print(f"no CUDA graph, so slower: {error}", flush=True)
                graph = None
        if graph:
            graph.replay()
            return result
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            losses = function()
        torch.cuda.current_stream().wait_stream(stream)
        return losses
    return call


def write_file(path, write):
    """write(temporary file), which takes the place of `path` once it is whole."""
    temporary = path.with_suffix(".tmp")
    write(temporary)
    os.replace(temporary, path)


def start_run(settings, out, resume, parts):
    """What a run knows: settings, step, seconds, metrics, rows of log.csv; its folder; its parts,
    {name: what has a state_dict}. With resume all of it is that of the checkpoint in `out`."""
    run = SimpleNamespace(settings=settings, step=0, seconds=0.0, metrics={}, rows=[])
    folder = Path(out or ".")
    file = folder / "checkpoint.pt"
    if resume:
        with blaming(f"--resume: {file} cannot be used"):
            saved = torch.load(file, weights_only=True)
            for key, value in settings.items():
                if saved["settings"][key] != value:
                    raise ValueError(f"{key} was {saved['settings'][key]}, now it is {value}")
            for name, part in parts.items():
                part.load_state_dict(saved.pop(name))
            torch.set_rng_state(saved.pop("rng"))
            torch.cuda.set_rng_state_all(saved.pop("cuda_rng"))
        vars(run).update(saved)
        if "calibrated_top1" in run.metrics:
            freeze(parts["student"])
    elif out:
        folder.mkdir(parents=True, exist_ok=True)
        if file.exists():
            raise BadInput(f"--out {out} holds a run: name another folder, or add --resume")
    print(*(f"{key}={value}" for key, value in settings.items()), flush=True)
    run.folder, run.parts = out and folder, parts
    return run


def save_checkpoint(run):
    """checkpoint.pt, with which --resume goes on to the same bits, and log.csv."""
    state = {**vars(run), "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
    del state["folder"]
    for name, part in state.pop("parts").items():
        state[name] = part.state_dict()
    write_file(run.folder / "checkpoint.pt", partial(torch.save, state))
    lines = [run.rows[-1], *(row.values() for row in run.rows)]
    (run.folder / "log.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))


def train(run, train_step, last, schedule=None):
    """Call train_step, which returns losses by name, up to iteration `last`. Print and keep them
    200 times a run; save each minute, at the end, and at Ctrl-C or SIGTERM, which stop the run."""
    iterations, then = run.settings["iterations"], time.monotonic()
    saved = then
    if run.parts["generator"].mean.is_cuda:
        train_step = cuda_graph(train_step)
    TRAINING.append(1)
    for step in range(run.step + 1, last + 1):
        losses = train_step()
        if schedule:
            schedule.step()
        now = time.monotonic()
        run.step, run.seconds, then = step, run.seconds + now - then, now
        save = step == last or STOP or now - saved > 60
        if save or step % max(1, iterations // 200) == 0:
            row = {"step": step, **{name: value.item() for name, value in losses.items()}}
            run.rows.append(row)
            rate = step / run.seconds
            print(METHOD, *(f"{name} {value:.4g}" for name, value in row.items()),
                  f"{rate:.2f} it/s  {(iterations - step) / rate / 60:.1f} min left", sep="  ",
                  end="  \r" if sys.stdout.isatty() and step < last else "\n", flush=True)
            if not math.isfinite(sum(row.values())):
                raise BadInput("a loss is not finite: lower --student-lr, --norm-lr or "
                               "--generator-lr")
        if save and run.folder:
            save_checkpoint(run)
            saved = now
        if STOP:
            raise KeyboardInterrupt(f"stopped after iteration {step}; --resume goes on")
    TRAINING.clear()


@torch.no_grad()
def finish(run, teacher, images):
    """Write student.pt, samples.png and result.json, whose content is returned; say the result.
    images: what top-1 is of, if not of real images."""
    student, generator = run.parts["student"], run.parts["generator"]
    packed, device = pack(student.to(memory_format=torch.contiguous_format)), generator.mean.device
    fp_mb, q_mb = (sum(value.nbytes for value in state.values()) / 1e6
                   for state in (teacher.state_dict(), packed["state"]))
    left = [name for name, layer in quant_layers(student).items() if layer.observing]
    result = {**run.settings, **run.metrics, "fp_mb": fp_mb, "q_mb": q_mb, "never_ran": left,
              "seconds": run.seconds, "iterations_per_s": run.step / run.seconds,
              "torch": torch.__version__, "device": f"{device}, {torch.get_num_threads()} threads"}
    if device.type == "cuda":
        result["device"] = torch.cuda.get_device_name()
        result["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
    if run.folder:
        write_file(run.folder / "student.pt", partial(torch.save, {**packed, **run.settings}))
        (run.folder / "result.json").write_text(json.dumps(result, indent=2))
        labels = torch.arange(80, device=device) // 8 * generator.num_classes // 10
        z = torch.randn(80, generator.latent_dim, device=device)
        pixels = generator(z, labels) * generator.std + generator.mean
        utils.save_image(pixels, run.folder / "samples.png")
    near = ""
    if "q_divergence" in result:
        near = " (agreement {q_agreement:.1f} %, divergence {q_divergence:.3f})".format(**result)
    print(f"{images}full precision {result['fp_top1']:.1f} %  plain {result['ptq_top1']:.1f} %  "
          f"{METHOD} {result['q_top1']:.1f} %{near}  {fp_mb / q_mb:.1f}x smaller"
          f"{'  never ran, so their input is in float: ' if left else ''}{', '.join(left)}")
    return result


# --------------------------------------------------------------------------------- the command line

# A flag a line: its name, what it takes (- for nothing), its help.
COMMON_FLAGS = """
arch NAME shapes, the offline demonstration (default); resnet20; or any torchvision classifier
dataset shapes|cifar10|cifar100|imagenet what it was trained on (default: the arch's)
weights FILE state dict of the full-precision network (default: the published one, downloaded once)
data FOLDER labelled test images, to measure with: a folder a class, or torchvision's CIFAR folder
workers N processes that load them (default: 4; where shared memory is small, 0)
w BITS bits of the weights, 2 to 8 (default: 4; shapes 2)
a BITS bits of the activations, 2 to 8 (default: 4); the network's own input has 8
symmetric - signed codes with zero point 0 (default: asymmetric)
plain - the paper alone: minimum-to-maximum ranges, no calibration, no image transformed
iterations N in all, warm-up included (default: imagenet 80000, GDFQ; CIFAR 1000, shapes 300)
batch-size N images an iteration (default: imagenet 16, GDFQ; CIFAR 64, shapes 32)
warmup X share of the iterations in which the generator learns alone (default: 0.15)
generator-lr X generator learning rate, Adam (default: 0.001, GDFQ)
student-lr X learning rate of the student's weights, SGD (default: 0.003, above 100 classes 0.001)
norm-lr X learning rate of the student's batch norms and biases, SGD (default: 0.01)
bns-weight X weight of L_BNS in L_G (default: 1, above 100 classes 100; GDFQ 0.1)
ce-weight X weight of the cross-entropy in L_Q (default: 1, above 100 classes 0)
seed N seed of all random numbers (default: 0)
device NAME cuda, cuda:1 or cpu (default: cuda if there is one)
precision auto|float32|bfloat16 of convolutions in training (default: bfloat16 where it is faster)
out FOLDER where the files go (default: out/, method, arch, bits and a number)
resume - go on from the checkpoint in --out, with the same settings, to the same bits
evaluate STUDENT.pt train nothing: measure this student on --data
"""


def fail(message):
    raise BadInput(f"{message}: see --help")


def command_line(argv, method_flags):
    """The command: the flags, the teacher, the images, then quantize."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for line in (COMMON_FLAGS.strip() + method_flags.rstrip()).splitlines():
        name, kind, text = line.split(None, 2)
        options = {"type": {"N": int, "BITS": int, "X": float}.get(kind, str), "metavar": kind}
        if kind == "-":
            options = {"action": "store_true"}
        elif "|" in kind:
            options = {"choices": kind.split("|")}
        parser.add_argument("--" + name, help=text, **options)
    given = vars(parser.parse_args(argv))
    arch, file, folder = (given.pop(name, None) for name in ("arch", "weights", "data"))
    arch = arch or "shapes"
    guess = {"shapes": "shapes", "resnet20": "cifar10"}.get(arch, "imagenet")
    dataset, workers = given.pop("dataset", guess), given.pop("workers", 4)
    model, about, preprocess = load_teacher(arch, dataset, file)
    images = load_images(dataset, folder, preprocess, workers)
    device, _ = choose_device(given.get("device", "auto"), "float32")
    model.to(device)
    if "evaluate" in given:
        with blaming("--evaluate needs a student of this --arch, and --data"):
            packed = torch.load(given["evaluate"], map_location="cpu", weights_only=True)
            student = unpack(packed, model)
            print(evaluate_on(images, model, student))
        return
    options = {**about, **given, "about": {"arch": arch, "dataset": dataset, "weights": file}}
    for name in given:
        if name in ("w", "a"):
            options[f"{name}_bits"] = options.pop(name)
        elif name.startswith("no_"):
            options[name[3:]] = not options.pop(name)
    if "out" not in given:
        name = f"{METHOD.lower()}-{arch}-w{options['w_bits']}a{options['a_bits']}-"
        folders = (f"out/{name}{number}" for number in range(10000))
        options["out"] = next(folder for folder in folders if not Path(folder).exists())
    if images:
        options["evaluate"] = partial(evaluate_on, images, model)
    quantize(model, **options)


def stop(number, frame):
    """Signal handler: lets an iteration end; at once if asked again, or outside of training."""
    if STOP or not TRAINING:
        raise KeyboardInterrupt("stopped")
    STOP.append(number)


def run_command(main):
    """Call main; what the user can fix is one line on stderr and exit code 2."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main()
    except (BadInput, OSError, KeyboardInterrupt) as error:
        print(f"{METHOD}: {error}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)
# ============================================================================= shared plumbing: end


METHOD_FLAGS = """
no-sfda - no alignment to the class centroids
no-variance - no spread round the centroids: alignment alone
no-ema - centroids stay as they were after the warm-up
sfda-weight X weight of L_SFDA in L_G (default: 0.9, published)
rho X share of a batch in the centroids' moving average (default: 0.2, published)
noise X spread round a centroid, in the layer's standard deviations (default: 0.5; published: 0.03)
first-layer N first semantic layer, batch norms counted from 0 (default: (number + 1) // 2 - 2)
temperature X of the distillation (default: 4; published 20)
"""

if __name__ == "__main__":
    run_command(partial(command_line, None, METHOD_FLAGS))
