# SPDX-License-Identifier: MIT
"""Everything that must hold, in three minutes on two cores and without a download: python -m pytest -q."""
import argparse
import copy
import csv
import functools
import itertools
import json
import math
import re
import runpy
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.nn import functional as F
from torchvision import models, utils

import clusterq
import lrq
import quant

HERE = Path(__file__).parent
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
assert_close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
each_symmetric = pytest.mark.parametrize("symmetric", (False, True))
each_bits = pytest.mark.parametrize("bits", range(2, 9))


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)              # Ctrl-C stays pytest's
    yield
    lrq.STOP.clear()
    clusterq.STOP.clear()


@pytest.fixture(params=(lrq, clusterq), ids=("lrq", "clusterq"))
def script(request):
    return request.param


class Padded(nn.Conv2d):
    """A convolution with a forward of its own and a method that its model may call."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 2, 1, 1)), self.weight, self.bias, self.stride, groups=self.groups)

    def gain(self):
        return self.out_channels / 16


class Small(nn.Module):
    """A teacher, the same each time: the first layer is nested, one has two places, one never runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.padded, self.norm2 = Padded(16, 16, 3, groups=2), nn.BatchNorm2d(16)
        self.twice, self.unused, self.head = nn.Conv2d(16, 16, 1), nn.Conv1d(16, 4, 1), nn.Linear(16, 5)
        self.again = self.twice
        self.factor = nn.Parameter(torch.ones(1))
        self.count = nn.Parameter(torch.tensor(3), requires_grad=False)
        for _ in range(20):
            self(pictures(32))
        self.eval()

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.norm2(self.padded(x))) * self.padded.gain() * self.factor
        return self.head(self.again(F.relu(self.twice(x))).view(-1, 1024).view(-1, 16, 64).mean(2))


def pictures(count):
    return torch.randn(count, 3, 8, 8) + 2 * torch.randn(count, 3, 1, 1)


def state_of(model):
    return copy.deepcopy(model.state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_hooks(model):
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def frozen(model, images, *args, **options):
    student = quant.quantize_model(model, *args, **options)
    student(images)
    return quant.freeze(student)


def per_channel(x, scale, zero_point, low, high):
    return torch.fake_quantize_per_channel_affine(x, scale.flatten(), zero_point.flatten(), 0, low, high)


# -------------------------------------------------------------------------------------------- quant.py

noise = torch.randn(4, 60)
INPUTS = {"normal": noise, "constant": 0 * noise + 3, "zero": 0 * noise, "negative": -1 - noise.abs(),
          "positive": 1 + noise.abs(), "huge": 3e37 * noise, "tiny": 1e-35 * noise,
          "ties": torch.linspace(0, 3.3, 511).expand(4, -1)}


@each_symmetric
@each_bits
@pytest.mark.parametrize("name", INPUTS)
def test_fake_quantize_is_torchs_bit_for_bit(name, bits, symmetric):
    x, grad = INPUTS[name].clone().requires_grad_(), torch.randn_like(INPUTS[name])
    codes = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2 ** bits - 1)
    for share in (1, 0.5):                                              # at 0.5 some are clipped
        bounds = (share * bound[:, None] for bound in x.detach().aminmax(dim=1))
        qparams = quant.calculate_qparams(*bounds, bits, symmetric)
        assert qparams[2:] == codes and (not symmetric or not qparams[1].any())
        one = qparams[0][0, 0], qparams[1][0, 0], *codes
        for ours, torchs in ((quant.fake_quantize(x, *qparams), per_channel(x, *qparams)),
                             (quant.fake_quantize(x, *one), torch.fake_quantize_per_tensor_affine(x, *one))):
            assert torch.equal(ours, torchs) and ours.isfinite().all()
            assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (ours, torchs)))


def test_other_bits_are_refused():
    for bits in (1, 9, 3.5):
        for pair in ((bits, 4), (4, bits)):
            with pytest.raises(ValueError, match="2 to 8"):
                quant.quantize_model(Small(), *pair)


@each_symmetric
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_range_has_the_least_mean_cubed_error(bits, symmetric):
    rows = torch.cat([torch.randn(4, 500), torch.randn(4, 500).pow(3)])
    low, high = (bound[:, None] for bound in rows.aminmax(dim=1))

    def errors(low, high):
        rounded = per_channel(rows, *quant.calculate_qparams(low, high, bits, symmetric))
        return (rounded - rows).abs().pow(3).mean(1)
    least = torch.stack([errors(share * low, share * high) for share in torch.arange(0.3, 1.05, 0.1)])
    found = quant.calculate_range(rows, bits, symmetric)
    assert (errors(*found) <= 1.0001 * least.amin(0)).all() and (bits > 2 or (found[1] < 0.95 * high).any())
    assert_close(quant.calculate_range(rows, bits, symmetric, least_error=False), (low, high))


def test_no_range_of_what_is_not_finite():
    for bad in ([1, torch.nan], [1, -torch.inf], []):
        layer = quant.QuantLayer(nn.Linear(2, 2), 4, 4)
        layer(torch.randn(8, 2))
        before = state_of(layer)
        with pytest.raises(ValueError):
            layer(torch.tensor([bad]))
        assert same(before, state_of(layer))


LAYERS = (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 2)), nn.Conv2d(4, 6, (3, 2), padding="same", groups=2),
          nn.Conv2d(4, 6, 3, padding="valid", dilation=2), nn.Conv1d(4, 6, 5, 3, 2), nn.Linear(4, 6))
same_of_even = pytest.mark.filterwarnings("ignore:Using padding='same'")


def input_of(layer):
    return torch.randn(40, 4, *[9] * (layer.weight.dim() - 2))


@same_of_even
@each_symmetric
@pytest.mark.parametrize("layer", (*LAYERS, Padded(4, 6, 3)))
def test_quant_layer_alone(layer, symmetric):
    quantized, plain = quant.QuantLayer(copy.deepcopy(layer), 3, 4, symmetric), copy.deepcopy(layer)
    x = input_of(layer)

    def rounded(x, bits):
        rows = x.detach().flatten(1)
        bounds = quant.calculate_range(rows, bits, symmetric)
        return per_channel(rows, *quant.calculate_qparams(*bounds, bits, symmetric)).view_as(x)
    quantized(x)
    quantized.observing = False
    y, plain.weight.data = quantized(x), rounded(layer.weight, 3)
    assert_close(y, plain(rounded(x[None], 4)[0]))
    y.square().sum().backward()
    assert quantized.weight.grad.any() and quantized.bias.grad.any()
    assert not isinstance(layer, Padded) or quantized.gain() == layer.gain()


def test_threads_share_a_student():
    images = torch.randn(40, 2, 3, 8, 8)
    student = frozen(Small(), images[0], 4, 4)
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, map(student, images), pool.map(student, images)))


def test_quantize_model_is_a_copy_that_learns():
    model = Small().train()
    before = state_of(model.requires_grad_(False))
    model.factor.requires_grad_(True)
    student = frozen(model, torch.rand(8, 3, 8, 8), 3, 2, input_range=(-2, 6))
    student(pictures(8)).square().sum().backward()
    assert same(before, state_of(model)) and not model.head.weight.requires_grad
    assert model.training and not student.training
    assert len(quant.quant_layers(student)) == 6                        # one of them twice
    assert_close(student.stem[0].scale, torch.tensor(8 / 255))          # 8 bits of -2 to 6
    assert student.head.scale > student.head.max_val / 4                # 2 bits
    still = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name for name in still if "unused" not in name} == {"factor", "count"}
    assert torch.equal(student.count, model.count) and student.again is student.twice


def test_other_precisions():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model, images = Small(), pictures(64)
        expected = model(images)
        student = quant.calibrate(quant.quantize_model(model.to(dtype), 8, 8), model, [images])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float64):
            assert (student(images) - expected).abs().max() < 0.1 * expected.std()
        assert model.head.weight.dtype == dtype


def test_computed_weights_are_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match="computed"):
        quant.quantize_model(nn.Sequential(layer), 4, 4)


@same_of_even
@pytest.mark.parametrize("layer", LAYERS)
def test_samples_are_those_of_a_matrix_product(layer):
    x, names = input_of(layer), ("stride", "padding", "dilation", "groups")
    options = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    y = layer(x)
    for count in (9, 40_000):
        outputs, inputs = quant.samples(y, x, layer.weight, layer.bias, **options, count=count)
        assert_close(layer.weight.flatten(1).unflatten(0, (len(inputs), -1)) @ inputs, outputs)
        assert (outputs.numel() == y.numel()) == (count > 9)


def test_calibrate_comes_nearer_to_the_teacher():
    teacher, images, unseen, seen = Small(), pictures(256), pictures(256), []
    plain, student = frozen(teacher, images, 3, 3), quant.quantize_model(teacher, 3, 3)
    before = state_of(teacher)
    assert quant.calibrate(student, teacher, images.split(64)) is student
    for x in (images, unseen):
        far, near = ((model(x) - teacher(x)).square().mean() for model in (plain, student))
        assert near < 0.7 * far
    assert same(before, state_of(teacher)) and without_hooks(teacher) and without_hooks(student)
    assert student.twice.input_range == (0, 0)
    assert not any(layer.observing for name, layer in quant.quant_layers(student).items() if name != "unused")
    for model in (teacher, student):                                    # what batch norms give
        for norm, mean, var in lrq.teacher_forward(model, model.head, images)[2]:
            mean = (mean - norm.running_mean) / norm.running_var.sqrt()
            seen.append(torch.stack([var / norm.running_var, mean]))
    assert (torch.stack(seen[2:]) - torch.stack(seen[:2])).abs().max() < 0.02


# ---------------------------------------------------------------------------------- integers on disk

@each_symmetric
@each_bits
def test_packed_student_is_exact(bits, symmetric, tmp_path):
    model, images, features = Small(), pictures(16), torch.randn(9, 16, 4)
    student = frozen(model, images, bits, 4, symmetric)
    torch.save(quant.pack(student), tmp_path / "student.pt")
    packed = torch.load(tmp_path / "student.pt", weights_only=True)
    again = quant.unpack(packed, Small())
    assert packed["state"]._metadata                                    # the versions of modules
    assert packed["state"]["again.layer.weight"].dtype == torch.uint8
    assert torch.equal(again(images), student(images))
    assert torch.equal(again.unused(features), student.unused(features))
    assert torch.equal(again.unused.weight, model.unused.weight)        # never ran: left in float
    with pytest.raises(ValueError, match="architecture"):
        quant.unpack(packed, nn.Sequential(nn.Conv2d(3, 4, 1)))


@each_bits
def test_packed_weights_take_their_bits(bits, tmp_path):
    student = frozen(nn.Sequential(nn.Linear(256, 999)), torch.randn(9, 256), bits, 8)
    torch.save(quant.pack(student), tmp_path / "student.pt")
    size = 999 * (256 * bits / 8 + 12)                                  # and scale, zero point, bias
    assert 0 < (tmp_path / "student.pt").stat().st_size - size < 6000


def test_without_ranges_nothing_is_frozen_or_packed():
    student = quant.quantize_model(Small(), 4, 4)
    with pytest.raises(RuntimeError):
        quant.freeze(student)
    for _ in range(2):                                                  # before images, and after
        with pytest.raises(RuntimeError):
            quant.pack(student)
        student(pictures(2))
    assert quant.freeze(student) is student and quant.pack(student)
    with pytest.raises(RuntimeError):
        quant.pack(quant.observe(student))


# --------------------------------------------------------------------------------------------- losses

def gradient(loss, x):
    """Of what the loss trains: finite, and not zero."""
    grad, = torch.autograd.grad(loss, x)
    assert grad.isfinite().all() and grad.any()
    return grad


def logits_pair():
    student, teacher = torch.randn(2, 6, 5)
    return student.requires_grad_(), teacher, torch.randint(5, (6,))


def test_kd_loss_is_a_divergence(script):
    student, teacher, _ = logits_pair()
    loss = script.kd_loss(student, teacher, 3.0)
    assert_close(loss, 9 * kl_divergence(*(Categorical(logits=v / 3) for v in (teacher, student))).mean())
    gradient(loss, student)


def test_dkd_loss_is_two_divergences():
    student, teacher, labels = logits_pair()
    target, pairs = F.one_hot(labels, 5).bool(), []
    for logits in (teacher / 4, student / 4):
        pairs.append((Bernoulli(logits.softmax(1)[target]), Categorical(logits=logits[~target].view(6, 4))))
    tckd, nckd = (kl_divergence(p, q).mean() for p, q in zip(*pairs))
    loss = lrq.dkd_loss(student, teacher, labels, 2.0, 3.0, 4.0)
    assert_close(loss, 16 * (2 * tckd + 3 * nckd))
    gradient(loss, student)


def test_batch_norm_loss_against_torch(script):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Flatten(),
                          nn.Linear(84, 2))
    x, expected = (2 * torch.randn(4, 3, 5, 6) + 1).requires_grad_(), 0
    for index in (0, 2):
        norm = model[index].eval()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        var, mean = torch.var_mean(model[:index](x), (0, 2, 3), correction=0)
        unit = norm.running_var.mean()
        expected += F.mse_loss(mean, norm.running_mean) / unit + F.mse_loss(var, norm.running_var) / unit ** 2
    logits, features, statistics = script.teacher_forward(model, model[4], x)
    loss = script.batch_norm_loss(statistics)
    assert_close([loss, logits, logits], [expected / 2, model(x), model[4](features)])
    assert_close(gradient(loss, x), gradient(expected / 2, x))


def test_ama_logits_have_the_margin_on_the_angle():
    for margin in (0.0, 0.4, -0.5):
        f, w, b = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8), torch.randn(5)
        labels = torch.arange(6) % 5
        logits, expected, w_y = lrq.ama_logits(f, w, b, labels, margin), F.linear(f, w, b).detach(), w[labels]
        if margin:
            cosine = (F.cosine_similarity(f, w_y).acos() + margin).cos()
            expected[range(6), labels] = f.norm(dim=1) * w_y.norm(dim=1) * cosine + b[labels]
        assert_close(logits, expected)
        assert_close(lrq.ama_logits(f, w, None, labels, margin), logits - b)
        gradient(F.cross_entropy(logits, labels), f)


def test_ama_centre_loss_is_zero_between_its_angles():
    def at(*degrees):
        theta = torch.tensor(degrees).deg2rad()
        return torch.stack([theta.cos(), theta.sin()], 1)
    centres, labels = torch.tensor([[2.0, 0], [0, 0]]), torch.tensor([0, 0, 0, 1])  # class 1 has none
    assert lrq.ama_centre_loss(at(17.5, 35.0, 49.0, 120.0), centres, labels) == 0
    features = (3 * at(5.0, 16.0, 51.0, 120.0)).requires_grad_()
    loss = lrq.ama_centre_loss(features, centres, labels)
    d = 1 - (torch.tensor([5.0, 16.0, 51.0]).deg2rad() + 0.5).cos()
    assert_close(loss, torch.maximum(0.3 - d, d - 0.8).mean())
    assert gradient(loss, features).any(1).tolist() == [True, True, True, False]


def test_semantic_statistics_are_those_of_the_deeper_layers():
    model, x = nn.Sequential(*[nn.BatchNorm2d(3) for _ in range(7)]).eval(), torch.randn(4, 3, 5, 6)
    statistics = clusterq.teacher_forward(nn.Sequential(model, nn.Flatten()), model, x)[2]
    for first, count in ((None, 5), (6, 1)):
        values, weights = clusterq.semantic_statistics(statistics, first)
        inputs = [model[:i](x) for i in range(7 - count, 7)]
        parts = [v for h in inputs for v in torch.var_mean(h, (2, 3), correction=0)[::-1]]
        assert_close(values, torch.cat(parts, 1))
        assert_close(weights, torch.full((6 * count,), 1 / 3 / count))


def test_sfda_loss_is_the_least_over_noise():
    for amplitude in (0, 0.5, 3.0):
        values, targets, weights = torch.randn(6, 7, requires_grad=True), torch.randn(6, 7), torch.rand(7)
        seen = torch.tensor([1.0, 0, 1, 1, 0, 1])
        loss = clusterq.sfda_loss(values, targets, weights, seen, amplitude)
        d = (values - targets)[seen.bool()].detach()

        def with_noise(e):
            e = amplitude * e / e.square().mean(0).sqrt()
            return (d - e).square().mean(0) @ weights
        assert_close(loss, with_noise(d))
        assert all(with_noise(torch.randn_like(d)) >= loss - 1e-5 for _ in range(100))
        assert not gradient(loss, values)[1].any()
        assert clusterq.sfda_loss(values, targets, weights, 0 * seen, amplitude) == 0


def test_centroids_against_a_plain_loop():
    centroids, expected = clusterq.Centroids(4, 3), {}
    for _ in range(5):
        values = torch.randn(6, 3)
        labels, recognised = torch.randint(3, (6,)), torch.rand(6) < 0.6
        centroids.update(values, labels, recognised, 0.2)
        for c in labels[recognised].unique().tolist():
            new = values[recognised & (labels == c)].mean(0)
            expected[c] = 0.8 * expected[c] + 0.2 * new if c in expected else new
    assert centroids.seen.tolist() == [float(c in expected) for c in range(4)]
    for c, centroid in expected.items():
        assert_close(centroids.values[c], centroid)


# ------------------------------------------------------------------------------------------ generator

def test_generator_draws_pixels_and_learns(script):
    for size in (24, 32, 65, 96):
        generator = script.Generator(size, 7, MEAN, STD)
        images, labels = generator.sample(8)
        assert images.shape == (8, 3, size, size) and len(labels) == 8
        pixels = images * generator.std + generator.mean
        assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6 and pixels.std() > 0.1
        (images * torch.randn_like(images)).sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in generator.parameters())


# ----------------------------------------------------------------------------------------- whole runs

OPTIONS = dict(image_size=8, num_classes=5, mean=MEAN, std=STD, w_bits=3, a_bits=3, iterations=8,
               batch_size=8, warmup=0.5, evaluate=lambda model: {"top1": 50.0 * model.train().training})
FILES = {"checkpoint.pt", "log.csv", "result.json", "samples.png", "student.pt"}
KEYS = {"fp_top1", "ptq_top1", "calibrated_top1", "q_top1", "seconds", "iterations_per_s", "fp_mb", "q_mb",
        "method", "w_bits", "a_bits", "iterations", "seed", "torch", "device"}


def run(script, teacher=None, **changes):
    return script.quantize(teacher or Small(), **{**OPTIONS, **changes})


@functools.cache
def bits_of(script, **changes):
    return quant.pack(run(script, **changes)[0])["state"]


def names_in(folder):
    return {file.name for file in folder.iterdir()}


def test_run_leaves_the_teacher_and_writes_its_files(script, tmp_path):
    teacher, folder = Small().train(), tmp_path / "new" / "run"
    before = state_of(teacher)
    result = run(script, teacher, out=folder, evaluate=None)[1]
    assert same(before, state_of(teacher)) and teacher.training and teacher.head.weight.requires_grad
    assert without_hooks(teacher)
    assert names_in(folder) == FILES and KEYS <= set(result)
    assert result == json.loads((folder / "result.json").read_text())
    assert result["fp_agreement"] == 100 and result["never_ran"] == ["unused"]
    packed = torch.load(folder / "student.pt", weights_only=True)
    assert same(packed["state"], bits_of(script))                       # the same seed
    *_, last = rows = list(csv.DictReader((folder / "log.csv").open()))
    assert len(rows) == 8 and last["step"] == "8"
    for name in ("L_CE", "L_BNS", "L_Q", *(["L_SFDA"] if script is clusterq else [])):
        assert math.isfinite(float(last[name]))


def test_every_part_changes_the_student(script):
    parts = {lrq: ({"lka": False}, {"ama": "centre"}, {"ama": "none"}, {"kd": "kl"}),
             clusterq: ({"sfda": False}, {"variance": False}, {"ema": False})}
    both = {}, {"plain": True}, {"symmetric": True}, {"seed": 1}
    students = [bits_of(script, iterations=16, **off) for off in (*both, *parts[script])]
    assert not any(same(a, b) for a, b in itertools.combinations(students, 2))


@pytest.mark.parametrize("stop", (3, 7))  # in warm-up, in training
def test_resumed_run_ends_in_the_same_bits(script, stop, tmp_path, monkeypatch):
    calls, original = [], script.batch_norm_loss

    def stopping(*args):
        calls.append(1)
        script.STOP.extend(calls[stop - 1:])
        return original(*args)
    monkeypatch.setattr(script, "batch_norm_loss", stopping)
    with pytest.raises(KeyboardInterrupt, match="resume"):
        run(script, out=tmp_path)
    monkeypatch.undo()
    script.STOP.clear()
    assert names_in(tmp_path) == {"checkpoint.pt", "log.csv"}
    with pytest.raises(script.BadInput, match="seed"):
        run(script, out=tmp_path, resume=True, seed=1)
    assert same(bits_of(script), quant.pack(run(script, out=tmp_path, resume=True)[0])["state"])
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 9


def test_killed_run_goes_on_to_the_same_bits(tmp_path):
    code = ("import os, lrq, test_smoke\n"
            f"test_smoke.run(lrq, out={str(tmp_path)!r}, evaluate=lambda model: os.kill(os.getpid(), 9))")
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True).returncode == -9
    assert same(bits_of(lrq), quant.pack(run(lrq, out=tmp_path, resume=True)[0])["state"])


def test_many_bits_are_learnt_in_float32(script, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": True})
    assert run(script)[1]["precision"] == "bfloat16"
    assert run(script, w_bits=7, a_bits=8)[1]["precision"] == "float32"


# -------------------------------------------------------------------------------------------- commands

TINY = "--arch resnet20 --weights resnet20.pt --workers 0 --iterations 4 --batch-size 4 "


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with what commands need: weights, ten classes of one image each, a run."""
    folder = tmp_path_factory.mktemp("files")
    model = lrq.CifarResNet(3, 10)
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, 3, 32, 32))
    torch.save(model.state_dict(), folder / "resnet20.pt")
    torch.save(lrq.CifarResNet(1, 10).state_dict(), folder / "resnet8.pt")
    torch.save(models.squeezenet1_1().state_dict(), folder / "squeezenet.pt")
    torch.save([1, 2], folder / "list.pt")
    for index in range(10):
        (folder / f"images/ten/{index}").mkdir(parents=True)
        utils.save_image(torch.rand(3, 32, 32), folder / f"images/ten/{index}/image.png")
    (folder / "used").mkdir()
    (folder / "used/checkpoint.pt").touch()
    return folder


@pytest.fixture
def command(script, files, monkeypatch):
    def call(arguments):
        monkeypatch.setattr(sys, "argv", [script.__file__, *shlex.split(arguments)])
        runpy.run_path(script.__file__, run_name="__main__")
    monkeypatch.chdir(files)
    monkeypatch.setenv("TORCH_HOME", str(files))
    return call


@pytest.mark.parametrize("arguments, message", (
    ("--arch resnet81", "resnet18"), ("--arch squeezenet1_1 --weights squeezenet.pt", "batch norms"),
    *((TINY + more, message) for more, message in (
        ("--w 9", "2 to 8"), ("--weights none.pt", "none.pt"), ("--weights list.pt", "list.pt"),
        ("--weights resnet8.pt", "resnet8.pt"), ("--data none", "none"), ("--data images", "1 classes"),
        ("--out none --resume", "checkpoint.pt"), ("--out used", "--resume"),
        ("--out used --resume", "checkpoint.pt"), ("--evaluate none.pt --data images/ten", "none.pt"),
        ("--device nonsense", "nonsense"), ("--iterations 0", "iterations"), ("--nonsense", "--nonsense")))))
def test_bad_input_is_one_line(arguments, message, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(arguments)
    error, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and message in error


class Picky(Small):
    def forward(self, x):
        assert isinstance(self.head, nn.Linear), "no linear layer"
        return super().forward(x)


def spoiled():
    model = Small()
    model.norm2.running_mean[3] = torch.nan
    return model


@pytest.mark.parametrize("make, changes, message", (
    (lambda: nn.Sequential(Small(), nn.Softmax(1)), {}, "softmax"), (Picky, {}, "no linear layer"),
    (lambda: nn.Sequential(Small(), nn.Linear(6, 5)), {}, "mat1 and mat2"),
    (spoiled, {}, "norm2.running_mean"), (Small, {"num_classes": 7}, "7 logits"),
    (Small, {"evaluate": state_of}, "top1")))
def test_teacher_that_cannot_be_used_is_refused(make, changes, message, script):
    with pytest.raises(script.BadInput, match=message):
        run(script, make(), **changes)


def test_other_words_are_refused():
    for other in ({"kd": "none"}, {"ama": "center"}):
        with pytest.raises(lrq.BadInput, match="ama and kd"):
            run(lrq, **other)


def test_whole_command(script, command, files, capsys):
    out, data = files / script.METHOD, "--workers 0 --data images/ten "
    off = {lrq: "--no-lka --ama centre --kd kl", clusterq: "--no-variance --no-ema"}[script]
    arguments = f"{TINY} {data} {off} --w 4 --a 4 --out {out} "
    command(arguments)
    result = json.loads((out / "result.json").read_text())
    assert names_in(out) == FILES and KEYS <= set(result)
    assert result["about"]["arch"] == "resnet20" and False in (result.get("lka"), result.get("ema"))
    assert 6 < result["fp_mb"] / result["q_mb"] < 8
    capsys.readouterr()
    command(f"--arch resnet20 --weights resnet20.pt {data} --evaluate {out}/student.pt")
    assert f"{result['q_top1']:.4g}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(arguments + "--resume --student-lr 1")
    assert "student_lr was 0.003" in capsys.readouterr().err


@pytest.mark.parametrize("script", [lrq])
def test_demonstration(command, files):
    command("--iterations 40 --out demonstration")
    result = json.loads((files / "demonstration/result.json").read_text())
    assert result["fp_top1"] > 95 and result["calibrated_top1"] > result["ptq_top1"]


@pytest.mark.parametrize("reader", (">&-", "| head -n 1"))
def test_output_that_nobody_reads_ends_no_run(reader, files, tmp_path):
    line = f"{sys.executable} {HERE}/lrq.py {TINY} --data images/ten --out {tmp_path} {reader}"
    error = subprocess.run(["bash", "-c", line], cwd=files, capture_output=True, text=True).stderr
    assert names_in(tmp_path) == FILES and "Error" not in error


def test_old_names_of_weights():
    for name in ("module.denselayer2.norm.1.bias", "denselayer2.norm1.bias"):
        assert re.sub(lrq.OLD_NAMES, r"\1", name) == "denselayer2.norm1.bias"


# ------------------------------------------------------------------------------------ the files themselves

def test_plumbing_of_both_scripts_is_equal():
    one, other = (re.split(b"shared plumbing: (?:begin|end)", Path(script.__file__).read_bytes())
                  for script in (lrq, clusterq))
    assert len(one) == len(other) == 3 and one[1] == other[1]


def blocks(language):
    found = re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    assert found
    return "\n".join(found)


def test_readme_commands_have_flags_that_exist(script, command, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def only_parse(*args):
        parse(*args)
        raise SystemExit(0)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    commands = re.findall(rf"python {script.__name__}\.py([^\n#&|>]*)", blocks("bash").replace("\\\n", " "))
    assert commands
    for arguments in commands:
        with pytest.raises(SystemExit) as stopped:
            command(arguments)
        assert stopped.value.code == 0, arguments


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(re.sub(r"(iterations|batch_size|image_size)=[\d_]+", r"\1=8", blocks("python")), {})
