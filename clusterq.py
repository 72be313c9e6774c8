# SPDX-License-Identifier: MIT
"""ClusterQ: semantic feature distribution alignment (arXiv 2205.00179; ICDM 2022).

A trained classifier P becomes a low-bit one, Q, without any of its data: a generator G learns to
draw images whose batch-norm statistics and classes are those that P remembers, and whose deep
features cluster by class; Q learns from P.

    python clusterq.py                              # offline demonstration: 1 to 2 minutes
    python clusterq.py --arch resnet18 --w 4 --a 4  # an ImageNet network; for a GPU

Result (README): ResNet-20, CIFAR-10, 2-bit weights, 4-bit activations, 400 iterations of 64, three
seeds: 84.9 +- 0.1 % top-1 (full precision 88.0, quantization alone 29). A few minutes, one core.

Where each part comes from, and the flag that leaves it out:
    generator, L_CE + L_BNS, alternate steps    GDFQ, arXiv 2003.03603
    class centroids and alignment (L_SFDA)      ClusterQ, --no-sfda
    spread, against class-wise mode collapse    ClusterQ, --no-variance
    moving average of the centroids             ClusterQ, --no-ema
    least-error ranges, GPTQ, batch norms       papers on quantization with data, --plain
    transformed images                          this project, --plain
    z + label, L_BNS units, gradients clipped   this project; all: README, Differences

The algorithm, numbered as in quantize():
 1. Draw noise z, labels y and images x = G(z, y).
 2. Generator step on L_G = L_CE + a L_BNS + b L_SFDA, through the frozen P. It learns alone, and
    without L_SFDA, at first. The centroids follow the images from the first on.
 3. Then, once: observe Q's ranges on 20 batches; calibrate Q on them, half of each transformed.
 4. Student step on the same images, half of them transformed: L_Q = T^2 KL(P || Q).
 5. Report and save. 6. At the end: evaluate, and write Q as integers.

Differences from the paper and its code (github.com/DiamondSheep/ClusterQ; the README has more). The
noise round a centroid, drawn anew each time as published, leaves the gradient of no noise: classes
still collapse. Ours is the nearest of its size (sfda_loss). The published code's diversity term has
no gradient at all, and its centroids are copies of the running statistics, the same for all
classes; here they are each class's own, of images that P recognises.

Shapes: B batch size, K classes, S image size, C channels, D features, H and W height and width,
M all semantic statistics of an image.
"""
import argparse, contextlib, copy, difflib, json, math, os, re, signal, sys, time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision import datasets, models, transforms, utils
from quant import batch_norms, calibrate, freeze, pack, quant_layers, quantize_model, unpack

METHOD = "ClusterQ"
METHOD_FLAGS = """\
no-sfda - no alignment to the class centroids
no-variance - no spread round the centroids: alignment alone
no-ema - after the warm-up centroids stay, those of classes without any excepted
sfda-weight X b, weight of L_SFDA in L_G (default: 0.9, published)
rho X share of a batch in the centroids' moving average (default: 0.2, published)
noise X spread round a centroid, in the layer's standard deviations (default: 0.5; published: 0.03)
first-layer N first semantic layer, batch norms counted from 0 (default: (number + 1) // 2 - 2)
temperature X of the distillation (default: 4; published 20)
"""
# --------------------------------------------------------------------------------------- generator
class Generator(nn.Module):
    """G(z, y): noise (B, 100), labels (B,) -> normalised images (B, C, S, S).
    GDFQ's generator (arXiv 2003.03603) from S/4 on (S/8 if S >= 64). The label's embedding is added
    to z (GDFQ multiplies: then it shows in variance alone)."""
    def __init__(self, image_size, num_classes, mean, std):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 100)
        widths = (32, 64, 128) if image_size < 64 else (32, 64, 128, 128)      # at S, S/2, ...
        start = image_size >> len(widths) - 1
        layers = [nn.Linear(100, 128 * start ** 2), nn.Unflatten(1, (128, start, start)),
                  nn.BatchNorm2d(128)]
        for level in reversed(range(len(widths) - 1)):
            o = widths[level]
            layers += [nn.Upsample(image_size >> level), nn.Conv2d(widths[level + 1], o, 3, 1, 1),
                       nn.BatchNorm2d(o), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(o, len(mean), 3, 1, 1), nn.Tanh())
        self.norm = nn.BatchNorm2d(len(mean), affine=False)
        self.mean, self.std = (nn.Buffer(torch.Tensor(v).view(-1, 1, 1)) for v in (mean, std))

    def forward(self, z, labels):
        x = self.norm(self.layers(z + self.embedding(labels)).float())
        return ((0.5 + 0.25 * x).clamp(0, 1) - self.mean) / self.std

    def sample(self, count):
        """Images for z ~ N(0, 1) and y uniform over the classes, and y."""
        z = torch.randn(count, 100, device=self.mean.device)
        labels = torch.randint(self.embedding.num_embeddings, (count,), device=z.device)
        return self(z, labels), labels

def transformed(images):
    """Images, (B, C, S, S), mirrored at random, magnified by 0.5 to 2.5 (log-uniform), shifted by
    up to half their size, reflected at the border: generated ones have few layouts."""
    zoom = images.new_empty(len(images), 1, 1).uniform_(math.log(0.4), math.log(2)).exp()
    theta = images.new_empty(len(images), 2, 3).uniform_(-1, 1)         # third column: the shift
    mirror = theta[:, 0, 0].sign()
    theta[:, :, :2] = zoom * torch.eye(2, device=zoom.device)           # where a pixel comes from
    theta[:, 0, 0] *= mirror
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
# ------------------------------------------------------------------------------------------ losses
def batch_norm_loss(statistics):
    """L_BNS = mean_l [ MSE(mean(h_l), mu_l) / s_l^2 + MSE(var(h_l), var_l) / s_l^4 ]
    statistics: for each batch norm l the layer, with running means mu_l and variances var_l, and
    mean and biased variance of its input h_l over height and width, (B, C_l) each; mean and var are
    over the batch too. MSE is over channels. s_l^2 is the mean of var_l: so each layer counts
    alike. Source: GDFQ, arXiv 2003.03603, eq. 4, where s_l is 1."""
    loss = 0
    for norm, means, variances in statistics:
        s2 = norm.running_var.mean().clamp(min=norm.eps)
        var = variances.mean(0) + means.var(0, correction=0)            # within images, and between
        loss += F.mse_loss(means.mean(0), norm.running_mean) / s2
        loss += F.mse_loss(var, norm.running_var) / s2.square()
    return loss / len(statistics)

def semantic_statistics(statistics, first):
    """Means and variances of each image in the semantic layers, from number `first` on (None: as
    published), side by side, (B, M), in units of s_l and s_l^2. statistics: as of batch_norm_loss.
    Also weights, (M,), with which a sum is a mean over a layer's channels and over layers."""
    values, weights = [], []
    for norm, means, variances in statistics[
            max(0, (len(statistics) + 1) // 2 - 2) if first is None else first:]:
        s2 = norm.running_var.mean().clamp(min=norm.eps)
        values.append(torch.cat([means / s2.sqrt(), variances / s2], 1))
        weights.append(torch.full_like(values[-1][0], 1 / means.shape[1]))
    return torch.cat(values, 1), torch.cat(weights) / len(weights)

def sfda_loss(values, targets, weights, seen, amplitude):
    """L_SFDA = mean_l [ mean_i MSE(m_il, mu_{y_i,l} + e_i) ], of means and of variances.
    values: m, (B, M). targets: mu_y, each image's centroid, (B, M). weights: (M,), see
    semantic_statistics. seen: (B,), 1.0 where the class has a centroid, else 0.0; the mean is over
    those images. amplitude: A, root mean square of the noise e over the batch. Of all such noise
    the nearest to the images is meant: mean_i (d_i - e_i)^2 is least, (rms(d) - A)^2, for
    e = A d / rms(d), d = m - mu. So images are kept at a distance. At A = 0 it is the alignment
    alone. Source: ClusterQ, arXiv 2205.00179, where e is drawn anew each time."""
    squares = ((values - targets).square() * seen[:, None]).sum(0) / seen.sum().clamp(min=1)
    if amplitude:
        squares = ((squares + 1e-12).sqrt() - amplitude).square() * seen.any()
    return squares @ weights

class Centroids(nn.Module):
    """For each class the centroid of its images' semantic statistics: buffers values, (K, M), and
    seen, (K,), 1.0 once an image went into it."""
    def __init__(self, num_classes, width):
        super().__init__()
        self.values = nn.Buffer(torch.zeros(num_classes, width))
        self.seen = nn.Buffer(torch.zeros(num_classes))

    @torch.no_grad()
    def update(self, values, labels, recognised, rho):
        """centroid_c <- (1 - rho) centroid_c + rho * the batch's mean for class c, all of it the
        first time. values: (B, M). recognised: (B,) bool, the images that count."""
        members = F.one_hot(labels, len(self.seen)).float() * recognised[:, None]       # (B, K)
        count = members.sum(0)
        share = (1 - (1 - rho) * self.seen) * (count > 0)                               # (K,)
        self.values.lerp_(members.T @ values / count.clamp(min=1)[:, None], share[:, None])
        self.seen.copy_((self.seen + count).clamp(max=1))

def kd_loss(student_logits, teacher_logits, temperature):
    """KL(P || Q) T^2 of the softened distributions, the mean over the batch: (B, K), (B, K) -> ().
    T^2 keeps the gradient's size as T changes (Hinton et al., arXiv 1503.02531, section 2)."""
    log_q, log_p = ((v / temperature).log_softmax(1) for v in (student_logits, teacher_logits))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature ** 2
# ------------------------------------------------------------------------ seeing inside the teacher
def teacher_forward(teacher, classifier, images):
    """(logits, features, statistics): (B, K), the classifier's input (B, D), and for each batch
    norm, as they run, the layer and mean and biased variance of each image's input, (B, C_l)."""
    features, statistics = [], []
    def keep(layer, args):
        if layer is classifier:
            return features.append(args[0].float().flatten(1))
        h = args[0].movedim(1, -1).reshape(len(images), -1, layer.num_features).float()
        mean, square = (v.sum(1) / h.shape[1] for v in (h, h * h))      # h.mean(1) would be slower
        statistics.append((layer, mean, square - mean * mean))
    with contextlib.ExitStack() as hooks:
        for layer in [classifier, *batch_norms(teacher).values()]:
            hooks.enter_context(layer.register_forward_pre_hook(keep))
        return teacher(images).float(), features[-1], statistics
# --------------------------------------------------------------------------------------- the method
def quantize(teacher, *, image_size, num_classes, mean, std, iterations, batch_size, w_bits=4,
             a_bits=4, symmetric=False, plain=False, warmup=0.15, generator_lr=1e-3,
             student_lr=None, bns_weight=None, sfda=True, sfda_weight=0.9, rho=0.2, variance=True,
             noise=0.5, ema=True, first_layer=None, temperature=4.0, seed=0, precision="auto",
             device="auto", evaluate=None, out=None, resume=False, about=None):
    """Quantize a trained classifier without its data. Returns (student, what result.json holds).
    teacher: an nn.Module, (B, C, S, S) -> logits (B, K), with batch norms; it is not changed.
    image_size: S, 8 or more. num_classes: K. mean, std: lists, the normalisation of each channel's
    pixels in [0, 1]. evaluate: a function of a model, a copy on `device`: returns a dict of numbers
    with "top1", in percent; None: measured on generated images. out: a folder for the files. about:
    what else to record. The rest are the flags (--help). The student has to stay in evaluation
    mode. Raises BadInput, a ValueError. Seeds torch's random numbers."""
    few = num_classes <= 100
    if bns_weight is None:  # L_CE of many classes, large for long, hides L_BNS
        bns_weight = 1.0 if few else 100.0
    if student_lr is None:  # a student of many classes is easily taken away from its teacher
        student_lr = 3e-3 if few else 1e-3
    if iterations < 1 or batch_size < 2 or not 0 <= warmup < 1:
        raise BadInput("iterations >= 1, batch_size >= 2, 0 <= warmup < 1")
    device = choose_device(device)
    if precision == "auto":  # above 6 bits Q would learn bfloat16's errors, larger than its own
        precision = "bfloat16" if {w_bits, a_bits} - {7, 8} and (device.type == "cuda" or
            torch.cpu.get_capabilities().get("avx512_bf16")) else "float32"
    settings = {"method": METHOD, **locals()}
    for name in ("teacher", "few", "device", "evaluate", "out", "resume"):
        del settings[name]                                              # not settings
    autocast = partial(torch.autocast, device.type, getattr(torch, precision),
                       enabled=precision != "float32")
    torch.manual_seed(seed)
    teacher, classifier, student = prepare_models(teacher, settings, device)
    generator = Generator(image_size, num_classes, mean, std).to(device)
    with torch.no_grad(), blaming(f"--first-layer {first_layer} is not one of the batch norms"):
        *_, statistics = teacher_forward(teacher, classifier, generator.sample(2)[0])
        width = semantic_statistics(statistics, first_layer)[0].shape[1]
    centroids = Centroids(num_classes, width).to(device)
    generator_optimizer = torch.optim.Adam(
        generator.parameters(), generator_lr, betas=(0.5, 0.999), fused=True, capturable=True)
    warm, half, total = int(iterations * warmup), batch_size // 2, iterations * batch_size
    lr = torch.tensor(float(student_lr), device=device)
    student_optimizer = torch.optim.SGD(student.parameters(), lr, 0.9, nesterov=True, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(student_optimizer, iterations - warm)
    run = start_run(settings, out, resume, {
        "student": student, "generator": generator, "centroids": centroids,
        "student_optimizer": student_optimizer, "generator_optimizer": generator_optimizer,
        "schedule": schedule})
    def measure(name, model):
        with torch.no_grad(), torch.random.fork_rng(), blaming('evaluate fails or gives no "top1"'):
            new = (generator.sample(batch_size) for _ in range(20))
            found = evaluate(copy.deepcopy(model)) if evaluate else evaluate_on(new, teacher, model)
            assert "top1" in found
        run.metrics.update({f"{name}_{key}": float(value) for key, value in found.items()})
    def train_step(learns):
        """Steps 1, 2 and 4. learns: whether the student does too. Returns the losses by name."""
        # 1. Draw noise and labels, and images from them.
        with autocast():
            images, labels = generator.sample(batch_size)               # (B, C, S, S), (B,)
            expected, _, statistics = teacher_forward(teacher, classifier, images)
        # 2. Generator step on L_G = L_CE + a L_BNS + b L_SFDA, through the frozen teacher.
        losses = {"L_CE": F.cross_entropy(expected, labels), "L_BNS": batch_norm_loss(statistics)}
        if sfda:
            values, weights = semantic_statistics(statistics, first_layer)
            if learns:
                losses["L_SFDA"] = sfda_loss(values, centroids.values[labels], weights,
                                             centroids.seen[labels], noise if variance else 0)
            recognised = expected.argmax(1) == labels
            centroids.update(values, labels, recognised, rho if ema or not learns else 0)
        loss = losses["L_CE"] + bns_weight * losses["L_BNS"]
        loss = loss + sfda_weight * losses.get("L_SFDA", 0)
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
        # 4. Student step on the same images, half transformed: L_Q = T^2 KL.
        if learns:
            images, expected = images.detach(), expected.detach()
            if not plain:
                images[half:] = transformed(images[half:])
            with autocast():
                if not plain:                                           # P sees these anew
                    expected[half:] = teacher(images[half:]).float()
                logits = student(images).float()
            losses["L_Q"] = kd_loss(logits, expected, temperature)
            student_optimizer.zero_grad()
            losses["L_Q"].backward()
            nn.utils.clip_grad_norm_(student.parameters(), 3.0)         # else Q can fall to chance
            student_optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}
    train(run, partial(train_step, False), warm)  # the generator alone; within: 5. report and save
    # 3. Once: observe ranges (PTQ, quantization alone); calibrate, which finds them anew.
    if "calibrated_top1" not in run.metrics:
        with torch.no_grad():
            with autocast():
                batches = [generator.sample(batch_size)[0] for _ in range(20)]
            for images in batches:
                student(images)
            measure("fp", teacher)
            measure("ptq", freeze(student))
            if not plain:
                say("calibrating: ranges, weights and batch norms, layer by layer")
                for images in batches:
                    images[half:] = transformed(images[half:])
                calibrate(student, teacher, batches)
            measure("calibrated", student)
            # Lower, where training takes Q from P: little left, few images a class, a long run.
            left = kd_loss(student(images), teacher(images), 1).item()
            student_optimizer.param_groups[0]["lr"] *= min(
                1, (left / 0.05) ** 2, total / num_classes / 64, (64000 / total) ** 0.5)
    train(run, partial(train_step, True), iterations, schedule)
    measure("q", freeze(student))
    return student, finish(run, teacher, "" if evaluate else "on generated images: ")   # step 6
# =========================================================================== shared plumbing: begin
STOP = []  # Ctrl-C and SIGTERM add to it; it is asked after each iteration

class BadInput(ValueError):
    """Something that the user gave cannot be used: one line that says what, and what to do."""

@contextlib.contextmanager
def blaming(what):
    """What fails inside is the user's input: BadInput, with `what` and the error in one line."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{what} ({' '.join(str(error).split())[:600] or repr(error)})") from error
# ------------------------------------------------------------------------------ teachers and images
# What the teacher was trained on, and defaults. Of imagenet the preprocessing is the published one.
CIFAR10 = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010], "image_size": 32,
           "num_classes": 10, "iterations": 1000, "batch_size": 64}
DATASETS = {
    "shapes": {**CIFAR10, "image_size": 24, "iterations": 300, "batch_size": 32, "w_bits": 2},
    "cifar10": CIFAR10,
    "imagenet": {"num_classes": 1000, "iterations": 80000, "batch_size": 16}}
RESNET20_URL = ("https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/"
                "cifar10_resnet20-4118986f.pt")
OLD_NAMES = r"^(?:module\.|_orig_mod\.)+|(denselayer\d+\.\w+)\.(?=\d)"  # wrappers', DenseNet's

class CifarResNet(models.ResNet):
    """arXiv 1512.03385, section 4.2: three stages of `blocks` blocks, 3 for ResNet-20."""
    def __init__(self, blocks, num_classes):
        super().__init__(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes)
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.inplanes, self.maxpool, self.layer4 = 16, nn.Identity(), nn.Identity()
        self.layer1, self.layer2, self.layer3 = (
            self._make_layer(models.resnet.BasicBlock, width, blocks, stride)
            for width, stride in ((16, 1), (32, 2), (64, 2)))
        self.fc = nn.Linear(64, num_classes)

def draw_shapes(count, seed):
    """Images, (count, 3, 24, 24), of ten smooth shapes, transformed, in noise; labels, (count,)."""
    torch.manual_seed(0)
    shapes = F.interpolate(torch.randn(10, 3, 8, 8), 24, mode="bicubic")
    torch.manual_seed(seed)
    labels = torch.randint(10, (count,))
    images = transformed(shapes[labels]) + 0.5 * torch.randn(count, 3, 24, 24)
    return images.clamp(-2, 2), labels

def shapes_teacher():
    """The demonstration's teacher, a ResNet-8 trained on 8,000 images: the same each time."""
    say("training the demonstration's teacher")
    (images, labels), model = draw_shapes(8000, seed=1), CifarResNet(1, 10)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(640):
        batch = torch.randint(8000, (100,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model

def load_teacher(arch, dataset, file):
    """(model, quantize's arguments about it, preprocessing of test images); arguments as flags."""
    about, names = DATASETS[dataset], ["shapes", "resnet20", *models.list_models(module=models)]
    if arch not in names:
        near = difflib.get_close_matches(arch, names, 1, 0)
        raise BadInput(f"--arch {arch} is not known: did you mean {near[0]}?")
    with blaming(f"--arch {arch} --dataset {dataset} --weights {file} do not fit"):
        if dataset == "imagenet":
            published, *_ = models.get_model_weights(arch)
            preprocess, url = published.transforms(), published.url
            about = {**about, "image_size": preprocess.crop_size[0], "mean": preprocess.mean,
                     "std": preprocess.std}
        else:
            url, pixels = RESNET20_URL, transforms.Normalize(about["mean"], about["std"])
            preprocess = transforms.Compose([transforms.ToTensor(), pixels])
        if arch == dataset == "shapes" and not file:
            return shapes_teacher().eval(), about, preprocess
        if arch in names[:2]:
            model = CifarResNet(1 if arch == "shapes" else 3, about["num_classes"])
        else:
            model = models.get_model(arch, num_classes=about["num_classes"])
            model.transform_input = True  # published Inceptions normalise again, others ignore it
        state = (torch.load(file, map_location="cpu") if file else
                 torch.hub.load_state_dict_from_url(url))
        state = state.get("state_dict", state)
        for key in list(state):  # in place: what else a state dict carries stays
            state[re.sub(OLD_NAMES, r"\1", key)] = state.pop(key)
        model.load_state_dict(state)
    return model.eval(), about, preprocess

def load_images(dataset, folder, preprocess, workers):
    """Labelled test images in batches, or None: those in `folder`; the demonstration draws its."""
    if dataset == "shapes":
        return [draw_shapes(2000, seed=2)]
    if not folder:
        return
    with blaming(f"--data {folder} needs a folder a class; --workers 0 if shared memory is small"):
        archive = dataset == "cifar10" and os.path.exists(f"{folder}/cifar-10-batches-py")
        images = (datasets.CIFAR10(folder, train=False, transform=preprocess) if archive else
                  datasets.ImageFolder(folder, preprocess))
        if len(images.classes) != DATASETS[dataset]["num_classes"]:
            raise ValueError(f"it has {len(images.classes)} classes")
        batches = torch.utils.data.DataLoader(images, 100, num_workers=workers)
        list(zip(range(4), batches))                                    # a trial
    return batches

@torch.no_grad()
def evaluate_on(batches, teacher, model):
    """{"top1", "agreement" with the teacher, in percent, "divergence": the mean of KL(P || Q)}."""
    device, rows = next(model.parameters()).device, []
    for images, labels in batches:
        images = images.to(device)
        rows.append((labels.to(device), teacher(images), model(images)))
    labels, expected, logits = map(torch.cat, zip(*rows))
    top1, agreement = (100 * (logits.argmax(1) == right).float().mean().item()
                       for right in (labels, expected.argmax(1)))
    return {"top1": top1, "agreement": agreement, "divergence": kd_loss(logits, expected, 1).item()}
# ------------------------------------------------------------------------------------------ a run
def choose_device(name):
    """The device, tried. A GPU means a CUDA graph (see train) and sums in no fixed order."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True  # every iteration has the same shapes
    with blaming(f"--device {name} cannot be used: try cpu"):
        return torch.zeros(1, device=name).device

def prepare_models(teacher, settings, device):
    """(a frozen copy of the teacher, its last layer of K outputs, the student), tried on noise."""
    s = argparse.Namespace(**settings)
    images = torch.randn(2, len(s.mean), s.image_size, s.image_size, device=device)
    pixels = [(pixel - m) / d for pixel in (0, 1) for m, d in zip(s.mean, s.std)]
    teacher = getattr(teacher, "_orig_mod", teacher)                    # of torch.compile
    teacher = teacher.module if isinstance(teacher, nn.DataParallel) else teacher
    with blaming(f"from images of {tuple(images.shape[1:])} the teacher has to return the "
                 f"{s.num_classes} logits of its last layer, no softmax, and have batch norms"):
        for key, value in teacher.state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"{key} is NaN or infinite")
        teacher = copy.deepcopy(teacher).eval().requires_grad_(False).to(device, torch.float32)
        with contextlib.suppress(RuntimeError):                         # not if it has a .view
            copy.deepcopy(teacher).to(memory_format=torch.channels_last)(images)
            teacher.to(memory_format=torch.channels_last)
        student = quantize_model(teacher, s.w_bits, s.a_bits, s.symmetric, least_error=not s.plain,
                                 input_range=(min(pixels), max(pixels)))
        classifier = [m for m in teacher.modules() if s.num_classes in (
            getattr(m, "out_features", 0), getattr(m, "out_channels", 0))][-1]
        logits, features, statistics = teacher_forward(teacher, classifier, images.requires_grad_())
        batch_norm_loss(statistics).backward()
        torch.testing.assert_close(logits, F.linear(
            features, classifier.weight.flatten(1), classifier.bias), rtol=1e-3, atol=1e-3)
        copy.deepcopy(student)(images)
    return teacher, classifier, student

def cuda_graph(function):
    """Call `function` three times, then record it: (what replays it, the result, overwritten)."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):                        # CUDA asks for another one
        for _ in range(3):
            function()
    try:
        with torch.cuda.graph(graph):
            return graph.replay, function()
    except RuntimeError as error:
        say(f"no CUDA graph, so slower: {error}")
        return function, None

def start_run(settings, out, resume, parts):
    """What a run knows, with resume from the checkpoint. parts: {name: what has a state_dict}."""
    run = argparse.Namespace(settings=settings, step=0, seconds=0.0, metrics={}, rows=[])
    file = f"{out}/checkpoint.pt"
    if resume:
        with blaming(f"--resume needs --out with a run: {file} cannot be used"):
            saved = torch.load(file)
            for key, value in saved["settings"].items():
                if settings[key] != value:
                    raise ValueError(f"{key} was {value}, now it is {settings[key]}")
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
            torch.set_rng_state(saved["rng"])
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
        vars(run).update(saved)
        if "calibrated_top1" in run.metrics:
            freeze(parts["student"])
    elif out:
        os.makedirs(out, exist_ok=True)
        if os.path.exists(file):
            raise BadInput(f"--out {out} holds a run: name another folder, or add --resume")
    say(json.dumps(settings))  # what result.json cannot hold fails here, not after training
    run.out, run.parts = out and str(out), parts
    return run

def save_checkpoint(run):
    """checkpoint.pt: settings, step, metrics, log, states of all parts, random states. log.csv."""
    state = {**vars(run), "parts": {name: part.state_dict() for name, part in run.parts.items()},
             "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
    torch.save(state, f"{run.out}/checkpoint.tmp")
    os.replace(f"{run.out}/checkpoint.tmp", f"{run.out}/checkpoint.pt")
    lines = [run.rows[-1], *map(dict.values, run.rows)]
    Path(run.out, "log.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))

def train(run, train_step, last, schedule=None):
    """Iterate up to `last`; train_step returns losses by name. Save each minute, and if stopped."""
    iterations = run.settings["iterations"]
    then = saved = time.monotonic()
    losses = None
    if run.step < last and run.parts["generator"].mean.is_cuda:
        train_step, losses = cuda_graph(train_step)
    for step in range(run.step + 1, int(last) + 1):
        losses = train_step() or losses
        if schedule:
            schedule.step()
        now = time.monotonic()
        run.step, run.seconds, then = step, run.seconds + now - then, now
        save = step == last or STOP or now - saved > 60
        if save or step % max(1, iterations // 200) == 0:
            row = {"step": step, **{name: value.item() for name, value in losses.items()}}
            run.rows.append(row)
            text = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
            left = (iterations - step) * run.seconds / step / 60
            say(f"{METHOD}  {text}  {step / run.seconds:.2f} it/s  {left:.1f} min left",
                end="  \r" if os.isatty(1) and step < last else "\n")
            if not math.isfinite(sum(row.values())):
                raise BadInput("a loss is not finite: lower --student-lr or --generator-lr")
        if save and run.out:
            save_checkpoint(run)
            saved = now
        if STOP:
            raise KeyboardInterrupt(f"stopped after iteration {step}; --resume goes on")

@torch.no_grad()
def finish(run, teacher, on):
    """Write student.pt, samples.png, result.json; say and return it. on: of what images it is."""
    student, generator = run.parts["student"], run.parts["generator"]
    packed = pack(student.to(memory_format=torch.contiguous_format))    # as unpack's: the same sums
    fp_mb, q_mb = (sum(value.nbytes for value in state.values()) / 1e6
                   for state in (teacher.state_dict(), packed["state"]))
    left = [name for name, layer in quant_layers(student).items() if layer.observing]
    result = {**run.settings, **run.metrics, "fp_mb": fp_mb, "q_mb": q_mb, "never_ran": left,
              "seconds": run.seconds, "iterations_per_s": run.step / run.seconds,
              "gpu_memory_mb": torch.cuda.max_memory_allocated() / 1e6, "torch": torch.__version__,
              "device": torch.cuda.get_device_name() if generator.mean.is_cuda else "cpu"}
    if run.out:
        torch.save({**packed, **run.settings}, f"{run.out}/student.pt")
        Path(run.out, "result.json").write_text(json.dumps(result, indent=2))
        images, labels = generator.sample(80)
        pixels = images[labels.argsort()] * generator.std + generator.mean
        utils.save_image(pixels[:, :3], f"{run.out}/samples.png")
    line = "fp {fp_top1:.1f}, ptq {ptq_top1:.1f}, calibrated {calibrated_top1:.1f}, q {q_top1:.1f}"
    if "q_agreement" in result and "q_divergence" in result:
        line += " (agreement {q_agreement:.1f} %, divergence {q_divergence:.3f})"
    say(f"{METHOD}, {on}top-1: {line.format(**result)}, tensors {fp_mb / q_mb:.1f}x smaller")
    if left:
        say(f"never ran, so left in float: {' '.join(left)}")
    return result
# ------------------------- the command line: a flag a line, what it takes (- for nothing), its help
COMMON_FLAGS = """\
arch NAME shapes, a demonstration (default), resnet20, or one of torchvision with batch norms
dataset shapes|cifar10|imagenet what it was trained on (default: the arch's)
weights FILE state dict of the full-precision network (default: the published one, downloaded once)
data FOLDER labelled test images, to measure with: a folder a class, or torchvision's CIFAR folder
workers N processes that load them (default: 4); give 0 where shared memory is small
w N bits of the weights, 2 to 8 (default: 4; shapes 2)
a N bits of the activations, 2 to 8 (default: 4); the network's own input has 8
symmetric - signed codes with zero point 0 (default: asymmetric)
plain - nearest to the paper: ranges from minimum to maximum, nothing calibrated or transformed
iterations N in all, warm-up included (default: imagenet 80000, GDFQ; CIFAR 1000, shapes 300)
batch-size N images an iteration (default: imagenet 16, GDFQ; CIFAR 64, shapes 32)
warmup X share of the iterations in which the generator learns alone (default: 0.15, ours)
generator-lr X generator learning rate, Adam (default: 0.001, GDFQ)
student-lr X highest learning rate of the student, SGD (default: 0.003, above 100 classes 0.001)
bns-weight X a, weight of L_BNS in L_G (default: 1, above 100 classes 100; GDFQ 0.1)
seed N seed of all random numbers (default: 0)
device auto|cuda|cpu auto (default): cuda if there is one; CUDA_VISIBLE_DEVICES says which
precision auto|float32|bfloat16 in training (bfloat16 on a GPU or AVX512-BF16, to 6 bits)
out FOLDER where the files go (default: out/, method, arch and time)
resume - go on from the checkpoint in --out, with the same settings (on a CPU, to the same bits)
evaluate STUDENT.pt train nothing: measure this student on --data
"""

def stop(number, frame):
    """Signal handler: lets an iteration end and be saved; at once if asked again."""
    if STOP:
        raise KeyboardInterrupt("stopped")
    STOP.append(number)
    os.write(2, b"stopping after an iteration; once more: at once\n")   # print is not reentrant

def say(text, end="\n"):
    """Print at once. That nobody reads any more is no reason to end a run."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        sys.stdout = None

def main():
    """The flags, the teacher, the images, then quantize."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for line in (COMMON_FLAGS + METHOD_FLAGS).splitlines():
        name, kind, text = line.split(None, 2)
        dest = {"w": "w_bits", "a": "a_bits"}.get(name, name.removeprefix("no-").replace("-", "_"))
        options = {"type": {"N": int, "X": float}.get(kind, str), "metavar": kind}
        if kind == "-":
            options = {"action": "store_false" if name.startswith("no-") else "store_true"}
        elif "|" in kind:
            options = {"choices": kind.split("|")}
        parser.add_argument(f"--{name}", dest=dest, help=text, **options)
    given = vars(parser.parse_args())
    arch, file, folder = (given.pop(name, None) for name in ("arch", "weights", "data"))
    arch = arch or "shapes"
    dataset = given.pop("dataset", {"shapes": "shapes", "resnet20": "cifar10"}.get(
        arch, "imagenet"))
    model, about, preprocess = load_teacher(arch, dataset, file)
    images = load_images(dataset, folder, preprocess, given.pop("workers", 4))
    model.to(choose_device(given.get("device", "auto")))
    if "evaluate" in given:
        with blaming("--evaluate needs a student of this --arch, and --data"):
            return say(evaluate_on(images, model, unpack(torch.load(given["evaluate"]), model)))
    quantize(model, **{
        **about, "about": {"arch": arch, "dataset": dataset, "weights": file, "data": folder},
        "evaluate": images and partial(evaluate_on, images, model),
        "out": time.strftime(f"out/{METHOD.lower()}-{arch}-%m%d-%H%M%S"), **given})

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main()
    except (ValueError, OSError, KeyboardInterrupt) as error:           # the user can fix it
        print(f"{METHOD}: {error}", file=sys.stderr)
        sys.exit(2)
# ============================================================================= shared plumbing: end
