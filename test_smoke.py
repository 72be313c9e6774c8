# SPDX-License-Identifier: MIT
"""Everything that must hold, in a few minutes on two cores and without a download: `python -m pytest -q`."""
import argparse
import copy
import inspect
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torchvision import models

import clusterq
import lrq
import quant

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=(lrq, clusterq), ids=("lrq", "clusterq"))
def script(request):
    return request.param


# ------------------------------------------------------------------------------------------------ quant.py

INPUTS = {"normal": torch.randn(5, 4, 3), "constant": torch.full((5, 4, 3), 3.0), "zero": torch.zeros(5, 4, 3),
          "negative": -torch.rand(5, 4, 3) - 1, "positive": torch.rand(5, 4, 3) + 1, "huge": torch.randn(5, 4, 3) * 3e37,
          "tiny": torch.randn(5, 4, 3) * 1e-35, "denormal": torch.randn(5, 4, 3) * 1e-41}


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_quantize_equals_torch_bit_for_bit(bits, symmetric):
    for name, x in INPUTS.items():
        scale, zero_point, low, high = quant.calculate_qparams(x.min(), x.max(), bits, symmetric)
        assert (low, high) == ((-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2 ** bits - 1))
        assert low <= zero_point <= high and scale > 0 and (zero_point == 0 or not symmetric)
        y = quant.fake_quantize(x, scale, zero_point, low, high)
        assert torch.equal(y, torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)), name
        assert y.isfinite().all() and len(y.unique()) <= 2 ** bits
        if name not in ("tiny", "denormal"):  # the error is at most half a step, and a rounded zero point's half step
            assert (y - x).abs().max() <= scale * 1.001
        assert torch.equal(quant.fake_quantize(torch.zeros(3), scale, zero_point, low, high), torch.zeros(3))
        qparams = quant.calculate_qparams(x.flatten(1).amin(1), x.flatten(1).amax(1), bits, symmetric)
        expected = torch.fake_quantize_per_channel_affine(x, qparams[0], qparams[1], 0, low, high)
        assert torch.equal(quant.fake_quantize(x, *qparams, axis=0), expected), name


def test_fake_quantize_saturates_far_outside_its_range():
    y = quant.fake_quantize(torch.tensor([-1e30, 1e30, -torch.inf, torch.inf]), torch.tensor(0.1),
                            torch.tensor(3, dtype=torch.int32), 0, 15)
    assert torch.allclose(y, torch.tensor([-0.3, 1.2, -0.3, 1.2]))


@pytest.mark.parametrize("axis", (None, 1))
def test_gradient_is_the_straight_through_estimator(axis):
    x = (torch.randn(6, 5, 4) * 2).requires_grad_()
    scale, zero_point = torch.rand(5) * 0.1 + 0.1, torch.arange(5, dtype=torch.int32)
    if axis is None:
        scale, zero_point = scale[2], zero_point[2]
    weight = torch.randn(6, 5, 4)
    (quant.fake_quantize(x, scale, zero_point, 0, 15, axis) * weight).sum().backward()
    expected = torch.zeros_like(x)
    for i, j, k in np.ndindex(6, 5, 4):
        s, z = (scale, zero_point) if axis is None else (scale[j], zero_point[j])
        if 0 <= round((x[i, j, k] / s).item()) + z.item() <= 15:
            expected[i, j, k] = weight[i, j, k]
    assert torch.equal(x.grad, expected) and 0 < (expected == 0).sum() < expected.numel()


@pytest.mark.parametrize("bits", (1, 9, 0, 3.5, "4"))
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 8"):
        quant.quantize_model(nn.Conv2d(3, 3, 1), bits, 4)


class Odd(nn.Module):
    """Every kind of layer that must work: the head is registered first, one convolution runs twice, ReLU is functional."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 7)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, padding_mode="reflect")
        self.twice = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 12, (1, 3), bias=False)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(F.pad(x, (0, 1, 0, 1)))))
        x = self.twice(F.relu6(self.dilated(self.depthwise(x))))
        return self.head(F.relu(self.last(self.twice(50 * x))).mean((2, 3)))


def calibrated(model, bits=(4, 4), size=16, images=None, **kwargs):
    student = quant.quantize_model(model, *bits, **kwargs)
    quant.observe(student)(torch.randn(8, 3, size, size) if images is None else images)
    return quant.freeze(student)


def state_bytes(model):
    return copy.deepcopy(model.state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
                                        for key in a)


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_range_is_the_share_of_least_cubed_error_in_each_row(bits, symmetric):
    rows = torch.cat([torch.randn(5, 400), torch.randn(1, 400).pow(3), torch.rand(1, 400), torch.full((1, 400), 3.0),
                      torch.zeros(1, 400), 1e-20 * torch.randn(1, 400), 1e30 * torch.randn(1, 400)])
    low, high = quant.calculate_range(rows, bits, symmetric)

    def error(row, share):
        qparams = quant.calculate_qparams(share * row.min(), share * row.max(), bits, symmetric)
        return (quant.fake_quantize(row, *qparams) - row).double().abs().pow(3).mean().item()
    shares = []
    for row, least, largest in zip(rows, low, high):
        shares.append(min((share / 10 for share in range(10, 2, -1)), key=lambda share: error(row, share)))
        qparams = quant.calculate_qparams(least, largest, bits, symmetric)
        found = (quant.fake_quantize(row, *qparams) - row).double().abs().pow(3).mean().item()
        assert found <= 1.001 * error(row, shares[-1]) and (largest <= row.max() or row.max() < 0)
    assert bits > 2 or shares[5] < shares[6]                                            # long tails, no tails


def test_grid_of_the_weights_is_fixed_while_they_learn():
    student, x = calibrated(Odd(), bits=(3, 3)), torch.randn(8, 3, 16, 16)
    before = {name: quant.weight_qparams(layer)[:2] for name, layer in quant.quant_layers(student).items()}
    optimizer, weight = torch.optim.SGD(student.parameters(), 0.1), student.stem.weight.clone()
    student(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(weight, student.stem.weight)
    for name, layer in quant.quant_layers(student).items():
        assert all(torch.equal(*pair) for pair in zip(before[name], quant.weight_qparams(layer)))
        codes = quant.integer_weight(layer) + quant.broadcast_along(before[name][1], layer.weight, 0)
        assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() <= 7


def test_quantize_model_makes_a_learning_copy_and_leaves_the_original():
    model = Odd().train().requires_grad_(False)
    calls, x = [], torch.randn(4, 3, 16, 16)
    model.bn.register_forward_hook(lambda *_: calls.append(1))
    before, expected = state_bytes(model), copy.deepcopy(model).eval()(x)
    calls.clear()
    student = calibrated(model)
    loss = student.train()(x).square().sum()
    loss.backward()
    assert not calls and len(model.bn._forward_hooks) == 1 and model.training
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert same(before, state_bytes(model)) and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model.eval()(x), expected)
    assert {type(layer) for layer in student.modules()} >= {quant.QuantConv2d, quant.QuantLinear}
    assert not any(type(layer) in (nn.Conv2d, nn.Linear) for layer in student.modules())


@pytest.mark.parametrize("bits", (2, 4, 8))
@pytest.mark.parametrize("symmetric", (False, True))
def test_layers_are_those_of_fake_quantized_weights_and_inputs(symmetric, bits):
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Flatten(), nn.Linear(96, 5)), torch.randn(4, 3, 4, 4)
    student = calibrated(model, (bits, bits), 4, symmetric=symmetric, input_bits=bits)

    def parts(layer, x):
        quantizer, bounds = layer.input_quantizer, quant.quant_bounds(bits, symmetric)
        return (quant.fake_quantize(x, quantizer.scale[0], quantizer.zero_point[0], *bounds),
                quant.fake_quantize(layer.weight, *quant.weight_qparams(layer), axis=0), layer.bias)

    def plain(x):
        return F.linear(*parts(student[2], F.conv2d(*parts(student[0], x), padding=1, groups=3).flatten(1)))
    results = []
    for run in (student, plain):
        images = x.clone().requires_grad_()
        y = run(images)
        results.append([y, *torch.autograd.grad(y.square().sum(), [images, *student.parameters()])])
    for ours, expected in zip(*results):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_autocast_loses_nothing_of_the_grid(bits):
    """Weights and inputs enter exactly; of the sums bfloat16 keeps eight digits, also where large terms cancel."""
    for model, x in ((nn.Conv2d(16, 8, 3), torch.randn(4, 16, 8, 8)), (nn.Linear(64, 8), torch.randn(99, 64))):
        student = quant.quantize_model(nn.Sequential(model), bits, bits, input_bits=bits)
        quant.observe(student)(x)
        student[0].bias.data.zero_()
        exact = quant.freeze(student)(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = student(x)
        assert half.dtype == torch.float32 and torch.allclose(half, exact, rtol=2 ** -8, atol=0)
        assert bits == 2 or not torch.equal(half, exact)  # sums of 2 bits are small enough to be kept


def test_batch_norm_stays_in_evaluation_mode():
    student = calibrated(Odd())
    before = state_bytes(student.bn)
    student.train()
    student(torch.randn(4, 3, 16, 16) + 3).sum().backward()
    assert not student.bn.training and same(before, state_bytes(student.bn))


def test_ranges_are_for_each_run_of_a_layer_and_the_network_input_has_8_bits():
    student = calibrated(Odd(), bits=(3, 2))
    ranges = student.twice.input_quantizer
    assert ranges.bits == [2, 2] and ranges.max_val[1] > 1.5 * ranges.max_val[0] > 0
    assert student.stem.input_quantizer.bits == [8] and student.head.input_quantizer.bits == [2]
    assert sum(1 for name, _ in student.named_parameters() if name.startswith("twice.")) == 2
    seen = []
    student.twice.input_quantizer.register_forward_hook(lambda _, args, result: seen.append(result[0] * result[1]))
    student(torch.randn(8, 3, 16, 16))
    assert [len(y.unique()) <= 4 for y in seen] == [True, True] and seen[1].max() > seen[0].max()


def test_ranges_are_moving_averages_and_fixed_after_freeze():
    student = quant.quantize_model(nn.Sequential(nn.Conv2d(3, 2, 1)), 4, 4)
    with pytest.raises(RuntimeError, match="observe"):
        student(torch.randn(1, 3, 4, 4))
    quant.observe(student)
    for high in (1.0, 2.0, 4.0):
        student(torch.linspace(-1, high, 48).view(1, 3, 4, 4))
    quantizer = quant.freeze(student)[0].input_quantizer
    assert torch.allclose(quantizer.max_val, torch.tensor([1.0 + 0.1 * 1 + 0.1 * (4 - 1.1)]))
    before = state_bytes(student)
    student(torch.randn(1, 3, 4, 4) * 100)
    assert same(before, state_bytes(student))


def test_state_dict_brings_the_ranges_along():
    student, x = calibrated(Odd()), torch.randn(2, 3, 16, 16)
    again = quant.quantize_model(Odd(), 4, 4)
    again.load_state_dict(student.state_dict())
    assert torch.equal(again(x), student(x)) and torch.equal(copy.deepcopy(student)(x), student(x))


@pytest.mark.parametrize("activations", ("float", "quantized", "float, then quantized", "quantized, with weights moved"))
def test_batch_norms_after_correction_give_what_they_give_in_the_teacher(activations):
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
                            nn.BatchNorm2d(8, affine=False)).eval()
    for layer in (teacher[1], teacher[4]):
        layer.running_mean.normal_(0, 0.1)
        layer.running_var.uniform_(0.5, 2)
    student, batches = calibrated(teacher, bits=(2, 3)), [torch.randn(16, 3, 16, 16) for _ in range(3)]
    if activations == "float":
        quant.observe(student)

    def apart():
        """Between teacher and student, of channels' means and of the logarithms of their standard deviations: (2, 3)."""
        ours, theirs = [torch.stack([torch.stack([y.mean((0, 2, 3)), y.std((0, 2, 3)).log()]) for y in map(model, batches)])
                        for model in (student, teacher)]
        return (ours - theirs).abs().mean(2).T
    off = apart()
    if activations == "float, then quantized":
        quant.freeze(quant.correct_batch_norm(quant.observe(student), teacher, batches))
    correct = quant.compensate_rounding if "moved" in activations else quant.correct_batch_norm
    before, of_teacher = state_bytes(student), state_bytes(teacher)
    assert correct(student, teacher.train(), batches) is student                        # the teacher's mode does not matter
    assert same(of_teacher, state_bytes(teacher)) and teacher.training
    teacher.eval()
    once = apart()
    assert (once.amax(1) < torch.tensor([0.1, 0.4]) * off.amin(1)).all()
    correct(student, teacher, batches)                                                  # nothing is corrected twice
    assert torch.allclose(apart(), once, atol=0.01)
    changed = {key for key, value in student.state_dict().items() if torch.is_tensor(value) and not torch.equal(value, before[key])}
    if activations == "float":                                                          # whose ranges go on moving
        changed = {key for key in changed if "quantizer" not in key}
    assert changed - {"0.weight", "3.weight"} == {f"{i}.running_{name}" for i in (1, 4) for name in ("mean", "var")}
    assert ({"0.weight", "3.weight"} <= changed) == ("moved" in activations)
    assert not any(layer._forward_pre_hooks for model in (teacher, student) for layer in (model[1], model[4]))


def test_correction_of_a_batch_norm_that_runs_twice_is_by_the_average_of_all_its_runs():
    norm = nn.BatchNorm2d(4)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1), norm).eval()
    student = quant.observe(calibrated(teacher))
    student[2].bias.data += 8                                                           # the second run alone is off
    quant.correct_batch_norm(student, teacher, [torch.randn(16, 3, 8, 8)])
    assert ((student[1].running_mean - teacher[1].running_mean).mean() - 4).abs() < 1


class Depthwise(nn.Module):
    """Channels of very different sizes before a depthwise convolution, and before one that sums them in two groups. What feeds a
    third one is used twice, and what a fourth takes is no multiple of what its batch norm gives."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.spread = nn.Conv2d(8, 16, 3, stride=2, groups=8)
        self.bn4, self.grouped = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1, groups=2)
        self.bn2, self.relu, self.second = nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.bn3, self.silu, self.third = nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, groups=16)
        self.head = nn.Linear(16, 5)
        nn.init.uniform_(self.bn1.bias, -0.1, 0.1)
        self.bn1.weight.data.copy_(torch.logspace(-1.5, 0, 8))
        self.bn4.weight.data.copy_(torch.logspace(-0.8, 0, 16))

    def forward(self, x):
        y = self.spread(F.pad(F.relu(self.bn1(self.stem(x))), (0, 1, 0, 1)))
        y = self.relu(self.bn2(self.grouped(F.relu6(self.bn4(y)))))
        return self.head(self.third(self.silu(self.bn3(self.second(y) + y))).mean((2, 3)))


def test_channels_share_the_range_of_an_input_more_evenly():
    teacher, images = Depthwise().eval(), torch.randn(64, 3, 12, 12)
    assert quant.feeding_batch_norms(teacher) == {"spread": "bn1", "grouped": "bn4"}
    plain, student = (quant.observe(quant.quantize_model(teacher, 8, 3, input_range=(-4, 4))) for _ in range(2))
    with torch.no_grad():
        plain(images), student(images)
        seen = []
        handle = student.spread.register_forward_hook(lambda layer, args, y: seen.append(y))
        before, of_teacher, codes = student(images), state_bytes(teacher), quant.integer_weight(student.spread)
        assert quant.equalize_channels(student, teacher, [images]) is student
        assert torch.allclose(student(images), before, atol=2e-3)                       # the grid of `grouped` is another
        assert torch.allclose(*seen, atol=1e-5)                                         # that of `spread` is, for each channel,
        assert torch.equal(quant.integer_weight(student.spread), codes)                 # the same: in float the same network
        assert all(torch.equal(getattr(student, name).weight, getattr(teacher, name).weight) for name in ("bn1", "bn2", "bn3", "bn4"))
        handle.remove()
        for name, norm, low, high in (("spread", "bn1", 0, 0.4), ("grouped", "bn4", 0.4, 0.6)):  # what is left of the unevenness
            size = teacher.get_submodule(norm).weight
            left = size * student.get_submodule(name).input_quantizer.factor
            assert low < left.log().std() / size.log().std() < high
        assert not any(layer.input_quantizer.factor.numel() for layer in (student.stem, student.second, student.third, student.head))
        assert same(of_teacher, state_bytes(teacher)) and not teacher.spread._forward_pre_hooks
        outputs = []
        for model in (teacher, quant.freeze(plain), quant.freeze(student)):
            model.spread.register_forward_hook(lambda layer, args, y: outputs.append(y))
            model(images)
    size = outputs[0].square().mean((0, 2, 3))                                          # of each channel
    uneven, even = (((y - outputs[0]).square().mean((0, 2, 3)) / size).mean() for y in outputs[1:])
    assert even < 0.5 * uneven
    again = quant.unpack(quant.pack(student), teacher)
    assert torch.equal(again(images), student(images))


def test_an_equalized_channel_is_what_a_batch_norm_that_multiplies_it_gives():
    teacher, images = Depthwise().eval(), torch.randn(16, 3, 12, 12)
    student = quant.observe(quant.quantize_model(teacher, 4, 4))
    with torch.no_grad():
        student(images)
        quant.freeze(quant.equalize_channels(student, teacher, [images]))
        folded = copy.deepcopy(student)
        for name, norm in (("spread", folded.bn1), ("grouped", folded.bn4)):
            layer = folded.get_submodule(name)
            norm.weight.mul_(layer.input_quantizer.factor), norm.bias.mul_(layer.input_quantizer.factor)
            layer.weight.div_(quant.weight_factor(layer))
            layer.input_quantizer.factor = torch.empty(0)
        assert torch.allclose(folded(images), student(images), atol=1e-5)


def test_tracing_leaves_nothing_in_a_model_that_keeps_what_it_sees():
    class Keeping(Depthwise):
        shift = None

        def forward(self, x):
            if self.shift is None:
                self.shift = 0 * x.mean()
            return super().forward(x + self.shift)
    teacher, images = Keeping().eval(), torch.randn(8, 3, 12, 12)
    student = quant.observe(quant.quantize_model(teacher, 4, 4))
    with torch.no_grad():
        student(images)
        quant.equalize_channels(student, teacher, [images, images])
    assert teacher.shift is None and student.spread.input_quantizer.factor.numel()


def test_a_forward_that_cannot_be_traced_and_shared_weights_are_left_alone():
    class Branching(Depthwise):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)
    tied, images = Depthwise(), torch.rand(8, 3, 12, 12)
    tied.second.weight, tied.bn3.weight = tied.spread.weight, tied.bn4.weight
    for teacher in (Branching().eval(), tied.eval()):
        student = quant.observe(quant.quantize_model(teacher, 4, 4))
        with torch.no_grad():
            student(images)
        assert quant.feeding_batch_norms(teacher) == {}
        before = state_bytes(student)
        assert same(before, state_bytes(quant.equalize_channels(student, teacher, [images])))


def test_a_batch_norm_of_other_channels_than_the_convolution_s_input_cannot_hold_their_factors():
    class Widened(nn.Sequential):
        def forward(self, x):
            return self[2](F.pad(self[1](self[0](x)), (0, 0, 0, 0, 2, 2)))
    for extra, pairs in ((4, {}), (0, {"2": "1"})):
        teacher = (Widened if extra else nn.Sequential)(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6 + extra, 6 + extra, 3, groups=6 + extra))
        assert quant.feeding_batch_norms(teacher.eval()) == pairs


def test_a_filter_of_zeros_stays_zero_where_its_channel_has_a_small_factor():
    teacher = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, groups=3, bias=False))
    teacher[1].weight.data[1] = 0
    student, images = calibrated(teacher, images=torch.randn(4, 3, 8, 8)), torch.randn(4, 3, 8, 8)
    student[1].input_quantizer.factor = torch.full((3,), 1 / 8)
    quant.set_grid(student[1])
    out = student(images)
    assert out.isfinite().all() and (out[:, 1] == 0).all() and (out[:, 0] != 0).any()


def test_correction_bounds_what_a_channel_without_spread_is_multiplied_by():
    teacher = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    student = quant.observe(calibrated(teacher))
    student[0].weight.data.mul_(torch.tensor([0.0, 100.0]).view(2, 1, 1, 1))
    student[0].weight_scale.mul_(torch.tensor([1.0, 100.0]))
    quant.correct_batch_norm(student, teacher, [torch.randn(16, 3, 8, 8)])
    ratio = (student[1].running_var + 1e-5) / (teacher[1].running_var + 1e-5)
    assert torch.allclose(ratio, torch.tensor([1 / 16, 16]))


def layer_errors(student, teacher, images):
    """Mean squared difference of each layer's output, in a Sequential, between student and teacher."""
    errors, x, y = {}, images, images
    student.calls_so_far.clear()
    for index, (ours, theirs) in enumerate(zip(student, teacher)):
        x, y = ours(x), theirs(y)
        if hasattr(ours, "weight_scale"):
            errors[index] = (x - y).square().mean()
    return errors


@pytest.mark.parametrize("activations", ("float", "quantized"))
def test_rounding_errors_make_up_for_one_another(activations):
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, dilation=2, groups=4), nn.ReLU(),
        nn.Conv2d(12, 6, (3, 1), padding="same", padding_mode="reflect"), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5)).eval()
    batches = [F.avg_pool2d(torch.randn(24, 3, 20, 20), 5, 1) for _ in range(3)]
    plain, moved = (calibrated(teacher, images=batches[0], bits=(3, 4)) for _ in range(2))
    if activations == "float":
        quant.observe(plain), quant.observe(moved)
    before, of_teacher = state_bytes(moved), state_bytes(teacher)
    assert quant.compensate_rounding(moved, teacher.train(), batches) is moved
    assert same(of_teacher, state_bytes(teacher)) and teacher.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for model in (teacher, moved) for m in model.modules() if m is not moved)
    changed = {key for key, value in moved.state_dict().items() if torch.is_tensor(value) and not torch.equal(value, before[key])}
    assert {key for key in changed if "quantizer" not in key} == {f"{i}.weight" for i in (0, 3, 5, 8)} | {"1.running_mean", "1.running_var"}
    assert activations == "float" or not any("quantizer" in key for key in changed)
    x = torch.cat(batches)
    plain, moved = (layer_errors(student, teacher.eval(), x) for student in (plain, moved))
    assert plain.keys() == moved.keys() == {0, 3, 5, 8} and all(moved[i] < 0.7 * plain[i] for i in plain)


def test_weights_make_up_for_what_the_layers_before_them_lost():
    teacher = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    images = F.avg_pool2d(torch.randn(64, 3, 16, 16), 3, 1)
    fitted, kept = (quant.compensate_rounding(calibrated(teacher, images=images, bits=(8, 2)), teacher, [images], prior=prior)
                    for prior in (1, 1e9))
    fitted, kept = (layer_errors(student, teacher, images) for student in (fitted, kept))
    assert fitted[2] < 0.9 * kept[2] and fitted[4] < 0.9 * kept[4]


def test_what_a_rounded_weight_did_is_taken_up_by_the_next_as_least_squares_would():
    teacher, images = nn.Sequential(nn.Linear(2, 40, bias=False)), torch.randn(50, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.5]])
    w0, w1 = teacher[0].weight.detach().unbind(1)
    x0, x1 = images.unbind(1)
    for block in (2, 1):
        student = quant.observe(quant.quantize_model(teacher, 2, 8))
        quant.compensate_rounding(student, teacher, [images], prior=1e-6, damping=1e-9, block=block)
        q0 = quant.fake_quantize(teacher[0].weight.detach(), *quant.weight_qparams(student[0]), axis=0)[:, 0]
        assert torch.allclose(student[0].weight[:, 0], w0, atol=1e-5)
        assert torch.allclose(student[0].weight[:, 1], w1 + (w0 - q0) * (x0 @ x1) / (x1 @ x1), atol=1e-5)


def test_a_weight_is_fitted_as_if_it_had_been_seen_at_as_many_places_as_the_prior_says():
    teacher, images = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).eval(), torch.randn(50, 6)
    student = quant.observe(quant.quantize_model(teacher, 8, 8))
    student[0].bias.data += torch.tensor([0.6, 0, -0.4, 0.2])                           # what the second layer is to make up for
    student[1].weight_scale.mul_(2)                                                     # room for it
    quant.compensate_rounding(student, teacher, [images], prior=20)
    with torch.no_grad():
        x, w, rounded = student[0](images), teacher[1].weight, quant.fake_quantize(student[1].weight, *quant.weight_qparams(student[1]), axis=0)
        fit = w + (F.linear(teacher[0](images) - x, w)).T @ x @ torch.linalg.inv(x.T @ x + 20 * x.square().sum(1).mean() * torch.eye(4))
    assert (rounded - fit).abs().max() < 0.1 * (fit - w).abs().max()


@pytest.mark.parametrize("kind", ("a weight that two layers have", "padding changed later", "three dimensions", "many places"))
def test_layers_of_unusual_kinds_are_compensated_too(kind):
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    if kind == "a weight that two layers have":
        layers[4].weight = layers[2].weight
    elif kind == "padding changed later":
        layers[2].padding = layers[2].dilation = (2, 2)
    elif kind == "three dimensions":
        layers[2:] = [nn.Flatten(2), nn.Linear(196, 20)]
    teacher, images = nn.Sequential(*layers).eval(), F.avg_pool2d(torch.randn(64, 3, 18, 18), 3, 1)
    plain, moved = (calibrated(teacher, images=images, bits=(3, 8)) for _ in range(2))
    quant.compensate_rounding(moved, teacher, [images], places=200 if kind in ("many places", "three dimensions") else 40_000)
    plain, moved = (layer_errors(student, teacher, images) for student in (plain, moved))
    last = max(plain)
    assert moved[last] < 0.7 * plain[last]


def test_compensation_goes_by_no_more_images_than_said_and_by_some_of_every_batch():
    teacher, seen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), []
    student = quant.observe(quant.quantize_model(teacher, 3, 8))
    student.register_forward_pre_hook(lambda model, args: seen.append(args[0][:, 0, 0, 0].tolist()))
    batches = torch.arange(12.0).view(3, 4, 1, 1, 1).expand(3, 4, 3, 8, 8)
    quant.compensate_rounding(student, teacher, batches, numbers=7 * 4 * 6 * 6 + 9)  # of outputs
    assert seen == [[0, 1, 3, 5, 6, 8, 10]]


def test_a_layer_that_does_not_run_or_sees_nothing_is_compensated_without_harm():
    teacher = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)).eval()
    nn.init.zeros_(teacher[0].weight), nn.init.zeros_(teacher[0].bias)
    teacher[1].unused = nn.Linear(3, 3)
    student = quant.observe(quant.quantize_model(teacher, 3, 8))
    for images in (torch.rand(2, 3, 8, 8), torch.full((2, 3, 8, 8), torch.nan)):
        quant.compensate_rounding(student, teacher, [images])
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), teacher.parameters()))


def test_a_layer_with_its_own_forward_or_a_computed_weight_is_refused():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight / self.weight.std())

    class Deeper(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight / weight.std(), bias)
    with torch.no_grad():
        pruned = prune.l1_unstructured(nn.Conv2d(3, 3, 1), "weight", 0.5)
    replaced = nn.Conv2d(3, 3, 1)
    replaced.forward = lambda x: 2 * x
    for layer in (Standardized(3, 3, 1), Deeper(3, 3, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), pruned, replaced):
        with pytest.raises(TypeError, match="'0'"):
            quant.quantize_model(nn.Sequential(layer), 4, 4)


def test_a_transformer_layer_is_quantized_with_and_without_gradient():
    student, x = calibrated(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), images=torch.randn(8, 5, 8)), torch.randn(4, 5, 8)
    with torch.no_grad():
        without = student(x)
    assert torch.allclose(student(x), without, atol=1e-5)


def test_values_that_a_matmul_under_autocast_rounded_are_quantized_in_float32():
    student, x = calibrated(nn.Sequential(nn.Linear(16, 4))), torch.randn(64, 16).bfloat16()
    assert torch.equal(student(x), student(x.float()))


def test_a_batch_norm_with_its_own_forward_keeps_it():
    class WithActivation(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu(super().forward(x))
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), WithActivation(8), nn.Conv2d(8, 8, 3)).eval(), torch.randn(8, 3, 16, 16)
    student = copy.deepcopy(calibrated(model, bits=(8, 8))).train()
    assert not student[1].training and (student(x) - model(x)).abs().max() < 0.03 * model(x).abs().max()
    assert torch.equal(quant.quantize_model(student, 8, 8).state_dict()["1.weight"], student[1].weight)  # a student as teacher
    assert torch.equal(quant.unpack(quant.pack(student), model)(x), student(x))


def test_input_range_is_widened_to_what_is_observed():
    """Pixels reach the first layer in another range where a model normalises them itself."""
    for scale, expected in ((0.01, (0, 1)), (4, (-4, 4))):
        student = quant.quantize_model(nn.Sequential(nn.Conv2d(3, 2, 1)), 4, 4, input_range=(0, 1))
        quant.observe(student)(torch.linspace(-scale, scale, 48).view(1, 3, 4, 4).clamp(min=-scale if scale > 1 else 0))
        quantizer = quant.freeze(student)[0].input_quantizer
        assert (quantizer.min_val.item(), quantizer.max_val.item()) == expected


def test_a_model_that_scales_its_images_itself_has_the_range_of_what_it_makes_of_them():
    class Scaled(nn.Sequential):
        def forward(self, x):
            return super().forward(x / 255)
    images = torch.rand(4, 3, 8, 8) * 255
    for model, top in ((Scaled(nn.Conv2d(3, 2, 1)), 1), (nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 2, 3)), 255)):
        student = quant.quantize_model(model, 4, 4, input_range=(0.0, 255.0))
        quant.freeze((quant.observe(student)(images), student)[1])
        quantizer = next(iter(quant.input_quantizers(student).values()))
        assert 0.9 * top < quantizer.max_val.item() <= top and quantizer.bits == [8]


def test_each_branch_that_takes_the_images_takes_them_at_eight_bits():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1))
    student = quant.quantize_model(Branches(), 4, 2, input_range=(-3.0, 3.0))
    quant.observe(student)(torch.rand(2, 3, 8, 8))
    assert [layer.input_quantizer.bits for layer in (student.a, student.b, student.c)] == [[8], [8], [2]]
    assert [layer.input_quantizer.max_val.item() for layer in (student.a, student.b)] == [3, 3]


class Attention(nn.Module):
    """One layer is used through its weight alone, one has two names, and a parameter has the name of a quantizer's."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.alias = self.stem
        self.attention, self.weight_scale = nn.MultiheadAttention(8, 2, batch_first=True), nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2) * self.weight_scale
        return self.head(self.attention(x, x, x)[0].mean(1))


@pytest.mark.parametrize("kind", (Attention, lambda: models.mnasnet0_5(weights=None)))  # MNASNet's modules have versions
def test_packed_student_is_exact_whatever_its_layers_are_used_for(kind):
    model, x = kind().eval(), torch.randn(2, 3, 32, 32)
    student = calibrated(model, bits=(2, 4), size=32)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.1)
    packed = quant.pack(student)
    assert torch.equal(quant.unpack(packed, model)(x), student(x)) and packed["rest"].keys() <= model.state_dict().keys()


@pytest.mark.parametrize("ready", ("not observed", "not fixed"))
def test_a_student_without_activation_ranges_is_not_packed(ready):
    student = quant.quantize_model(nn.Sequential(nn.Conv2d(3, 4, 3)), 4, 4)
    if ready == "not fixed":
        quant.observe(student)(torch.rand(2, 3, 8, 8))
    with pytest.raises(RuntimeError, match="then freeze"):
        quant.pack(student)


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_student_is_small_and_exact(bits, symmetric, tmp_path):
    model, x = Odd(), torch.randn(4, 3, 16, 16)
    student = calibrated(model, bits=(bits, 4), symmetric=symmetric)
    optimizer = torch.optim.SGD(student.parameters(), 0.05)
    student(x).square().mean().backward()
    optimizer.step()
    torch.save(quant.pack(student), tmp_path / "student.pt")
    packed = torch.load(tmp_path / "student.pt", weights_only=True)
    before = state_bytes(model)
    again = quant.unpack(packed, model)
    assert torch.equal(again(x), student(x)) and not torch.equal(again(x), model.eval()(x))
    assert same(before, state_bytes(model)) and same(quant.pack(again)["rest"], packed["rest"])
    for name, layer in packed["layers"].items():
        count = int(np.prod(layer["shape"]))
        assert layer["codes"].dtype == torch.uint8 and layer["codes"].numel() == -(-count // 8) * bits
        assert torch.equal(quant.pack(again)["layers"][name]["codes"], layer["codes"])
        codes = quant.unpack_bits(layer["codes"], bits, count)
        assert 0 <= codes.min() and codes.max() <= 2 ** bits - 1 and len(codes.unique()) > 1
    with pytest.raises(ValueError, match="another architecture"):
        quant.unpack(packed, nn.Sequential(nn.Conv2d(3, 8, 3)))


def test_two_codes_of_4_bits_in_a_byte():
    assert quant.pack_bits(torch.arange(1, 9), 4).tolist() == [0x21, 0x43, 0x65, 0x87]
    assert quant.pack_bits(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [0b11010001, 0b01011000, 0b00011111]


# ------------------------------------------------------------------------------------------------ losses

def test_decoupled_distillation_identity():
    """KL(P || Q) = TCKD + (1 - p_t of P) NCKD, and T^2 scales both."""
    p, q, labels = torch.randn(6, 9) * 3, torch.randn(6, 9) * 3, torch.randint(9, (6,))
    for i in range(6):  # one image at a time: NCKD's weight is each image's own
        one = slice(i, i + 1)
        tckd, nckd = (lrq.dkd_loss(q[one], p[one], labels[one], a, b, 4.0) for a, b in ((1, 0), (0, 1)))
        others = 1 - (p[i] / 4).softmax(0)[labels[i]]
        assert torch.allclose(lrq.kd_loss(q[one], p[one], 4.0), tckd + others * nckd, rtol=1e-4)
    assert lrq.dkd_loss(p, p, labels, 1, 8, 4.0).abs() < 1e-5
    huge = lrq.dkd_loss(q * 1e4, p * 1e4, labels, 1, 8, 4.0)
    assert huge.isfinite()


def test_kd_loss_against_numpy():
    p, q = torch.randn(6, 9).double(), torch.randn(6, 9).double()
    softmax = lambda x: np.exp(x / 3) / np.exp(x / 3).sum(1, keepdims=True)
    pp, qq = softmax(p.numpy()), softmax(q.numpy())
    assert np.isclose(lrq.kd_loss(q, p, 3.0).item(), (pp * np.log(pp / qq)).sum() / 6 * 9)


def test_margin_zero_is_cross_entropy():
    f, w, b, y = torch.randn(8, 16), torch.randn(5, 16), torch.randn(5), torch.randint(5, (8,))
    assert torch.equal(lrq.ama_logits(f, w, b, y, 0.0), F.linear(f, w, b))


@pytest.mark.parametrize("margin", (-0.4, -0.1, 0.1, 0.4, 1.6))
def test_margin_is_added_to_the_angle(margin):
    w = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    theta = torch.linspace(0, torch.pi, 181)
    f = 3 * torch.stack([theta.cos(), theta.sin()], 1)
    b, labels = torch.tensor([0.5, -0.5]), torch.zeros(181, dtype=torch.long)
    logits = lrq.ama_logits(f, w, b, labels, margin)
    inside = (theta + margin >= 0) & (theta + margin <= torch.pi)
    assert torch.allclose(logits[inside, 0], 6 * torch.cos(theta[inside] + margin) + 0.5, atol=1e-5)
    assert torch.equal(logits[:, 1], F.linear(f, w, b)[:, 1])
    assert (logits[:, 0].diff() < 1e-6).all() and logits[:, 0].diff().abs().max() < 0.25  # falls, without a jump


def test_margin_has_finite_gradients_at_every_angle():
    w, labels = torch.cat([torch.randn(3, 4), torch.zeros(1, 4)]), torch.tensor([0, 0, 1, 1, 2, 3])
    f = torch.stack([w[0], -w[0], 1e-20 * w[1], torch.zeros(4), 1e6 * w[2], w[1]]).requires_grad_()
    for margin in (-0.3, 0.0, 0.3):
        F.cross_entropy(lrq.ama_logits(f, w, None, labels, margin), labels).backward()
        assert f.grad.isfinite().all() and f.grad.abs().sum() > 0


def test_label_angles():
    w = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    f = torch.tensor([[3.0, 0.0], [1.0, 1.0], [-5.0, 0.0], [0.0, 7.0]])
    angles = lrq.label_angles(f, w, torch.tensor([0, 1, 0, 0]))
    assert torch.allclose(angles, torch.tensor([0.0, 45.0, 180.0, 90.0]), atol=0.1)


def test_a_batch_norm_without_variance_leaves_the_loss_finite(script):
    norm, h = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    norm.running_var.zero_()
    assert script.batch_norm_loss(*script.image_statistics([h]), *script.layer_constants([norm])).isfinite()


def test_batch_norm_loss_against_numpy(script):
    h, norms = [torch.randn(4, 3, 5, 5) * 2 + 1, torch.randn(4, 6, 2, 2)], [nn.BatchNorm2d(3), nn.BatchNorm2d(6)]
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_()
    mu, var, own, weight = script.layer_constants(norms)
    for units in (torch.ones(9), own):                                                  # as published, and ours
        layers = []
        for x, norm, s in zip(h, norms, (units[0].item(), units[8].item())):
            m, v = norm.running_mean.numpy(), norm.running_var.numpy()
            assert s == 1 or np.isclose(s ** 2, v.mean())
            layers.append((((x.numpy().mean((0, 2, 3)) - m) / s) ** 2).mean() + (((x.numpy().var((0, 2, 3)) - v) / s ** 2) ** 2).mean())
        loss = script.batch_norm_loss(*script.image_statistics(h), mu, var, units, weight)
        assert np.isclose(loss.item(), np.mean(layers), rtol=1e-5)


def test_mean_and_variance_are_those_of_torch_and_so_are_their_gradients(script):
    h = (torch.randn(4, 5, 6, 7) * 3 + 10).requires_grad_()
    weights, grads = None, []
    for mean, var in (script.MeanVariance.apply(h), torch.var_mean(h.double(), (2, 3), unbiased=False)[::-1]):
        weights = weights or (torch.randn_like(mean), torch.randn_like(var))
        grads.append((mean, var, *torch.autograd.grad((mean * weights[0]).sum() + (var * weights[1]).sum(), h)))
    for own, of_torch in zip(*grads):
        assert torch.allclose(own.double(), of_torch.double(), atol=1e-5)


def test_upsampled_convolution_is_that_of_the_upsampled_image(script):
    conv, x = nn.Conv2d(6, 5, 3, padding=1), torch.randn(2, 6, 7, 9)
    assert torch.allclose(script.upsampled(conv, x), conv(F.interpolate(x, scale_factor=2)), atol=1e-5)


NORMALISATION = [0.5] * 3, [0.25] * 3  # mean, std


@pytest.mark.parametrize("loss", ("ama", "bns", "sfda"))
@pytest.mark.parametrize("num_classes, size, start", ((7, 16, 4), (200, 64, 8), (7, 68, 17)))
def test_generator_losses_train_every_parameter_of_the_generator(loss, num_classes, size, start):
    script = clusterq if loss == "sfda" else lrq
    teacher = Odd()
    teacher.head = nn.Linear(12, num_classes)
    teacher.eval().requires_grad_(False)
    generator = script.Generator(size, teacher.head.weight, *NORMALISATION)
    z, labels = torch.randn(8, generator.latent_dim), torch.randint(num_classes, (8,))
    images = generator(z, labels)
    assert images.shape == (8, 3, size, size) and generator.start_size == start
    logits, features, norms, inputs = script.teacher_forward(teacher, teacher.head, images)
    if loss == "ama":
        value = F.cross_entropy(lrq.ama_logits(features, teacher.head.weight, teacher.head.bias, labels, 0.2), labels)
    elif loss == "bns":
        value = lrq.batch_norm_loss(*lrq.image_statistics(inputs), *lrq.layer_constants(norms))
    else:
        means, variances = clusterq.image_statistics(inputs)
        value = clusterq.sfda_loss(means, variances, torch.randn(8, 8), torch.rand(8, 8), torch.full((8,), 1 / 8), labels >= 0)
    value.backward()
    dead = [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A constant added in front of a batch norm changes nothing: only rounding reaches those biases.
    assert not [name for name in dead if not name.endswith("bias")]
    assert not any(layer._forward_pre_hooks for layer in teacher.modules())


@pytest.mark.parametrize("loss", ("dkd", "tckd", "nckd", "kl"))
def test_student_losses_train_every_parameter_of_the_student(loss):
    student, labels = calibrated(Odd()), torch.randint(7, (8,))
    teacher_logits, logits = torch.randn(8, 7) * 3, student(torch.randn(8, 3, 16, 16))
    if loss == "kl":
        lrq.kd_loss(logits, teacher_logits, 4.0).backward()
    else:
        lrq.dkd_loss(logits, teacher_logits, labels, loss != "nckd", loss != "tckd", 4.0).backward()
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())


@pytest.mark.parametrize("num_classes, mean, std, precision", (
    (10, [0.5] * 3, [0.25] * 3, torch.float32), (10, [0.485, 0.456, 0.406], [0.5] * 3, torch.float32),
    (200, [0.0], [1.0], torch.bfloat16)))
def test_images_have_pixels_of_images_with_the_contrast_and_brightness_of_their_noise(num_classes, mean, std, precision, script):
    """Whatever the normalisation: beyond the pixels' range the student, whose input is quantized to it, sees other images."""
    generator, z = script.Generator(16, torch.randn(num_classes, 12), mean, std), torch.randn(64, 100)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        x = generator(z, torch.full((64,), num_classes - 1))
    low, high = script.pixel_range(mean, std)
    assert x.dtype == torch.float32 and x.shape == (64, len(mean), 16, 16) and low - 1e-6 < x.min() and x.max() < high + 1e-6
    pixels = x * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    assert (pixels.mean((0, 2, 3)) - 0.5).abs().max() < 0.01 and (pixels.std((0, 2, 3)) - 0.25).abs().max() < 0.03
    for i, figure in enumerate((pixels.std((2, 3)).mean(1).log(), pixels.mean((1, 2, 3)))):
        assert torch.corrcoef(torch.stack([z[:, i], figure]))[0, 1] > 0.85


def test_the_last_half_of_the_images_is_mirrored_magnified_and_shifted(script):
    places = (2 * torch.arange(64) + 1) / 64 - 1                                        # of pixels, from -1 to 1
    images = torch.stack([places.expand(64, 64), places[:, None].expand(64, 64)]).expand(801, 2, 64, 64)
    changed = script.half_transformed(images)
    assert changed.shape == images.shape and torch.equal(changed[:400], images[:400]) and changed.abs().max() < 1
    (x, y), kernel = changed[400:].unbind(1), 64 / 2                                    # where each pixel comes from
    zooms = [(kernel * values.diff(dim=dim).abs()).flatten(1).median(1).values for values, dim in ((x, 2), (y, 1))]
    assert torch.allclose(*zooms, atol=0.05)
    assert 0.39 < zooms[0].min() < 0.42 and 1.9 < zooms[0].max() < 2.05                 # magnified by their inverses
    assert abs(zooms[0].log().mean() - (math.log(0.4) + math.log(2)) / 2) < 0.08
    assert 0.4 < (x[:, 32, 32] < x[:, 32, 31]).float().mean() < 0.6                     # mirrored from left to right
    assert (y[:, 32, 32] < y[:, 31, 32]).float().mean() < 0.05                          # never upside down
    shifts = torch.stack([x, y])[:, :, 31:33, 31:33].mean((2, 3))
    assert shifts.min() < -0.9 and shifts.max() > 0.9 and (shifts.std(1) - 3 ** -0.5).abs().max() < 0.05
    assert len(script.half_transformed(images[:1])) == 1


def test_codes_of_many_classes_are_as_alike_as_their_rows_of_the_classifier(script):
    rows = (torch.randn(20, 1, 12) + 0.3 * torch.randn(20, 10, 12)).flatten(0, 1)       # 200 classes of 20 kinds
    codes = script.Generator(16, rows, *NORMALISATION).embedding.weight.detach()
    assert codes.shape == (200, 100) and abs(codes.square().mean().sqrt() - 10) < 1e-3
    apart, expected = torch.cdist(codes, codes), torch.cdist(rows, rows)
    assert torch.allclose(apart / apart.mean(), expected / expected.mean(), atol=1e-3)  # D < latent_dim: no distance is lost
    wide = script.Generator(16, torch.randn(200, 300), *NORMALISATION).embedding.weight.detach()
    assert wide.shape == (200, 100) and wide.square().mean(0).diff().max() < 1e-3       # the largest components first


def test_generator_has_a_long_range_only_with_attention():
    """The gradient of one output pixel of a block reaches 23 x 23 pixels, the 7 x 7 (dilation 3) of a 5 x 5."""
    x = torch.randn(1, 4, 41, 41, requires_grad=True)
    (lrq.LargeKernelAttention(4)(x)[0, 0, 20, 20]).backward()
    reached = x.grad.abs().sum((0, 1)).nonzero()
    assert reached.min().item() == 20 - 11 and reached.max().item() == 20 + 11
    block = lrq.LargeKernelAttention(4)
    for size in (6, 8, 41):
        y = torch.randn(2, 4, size, size + 1)
        assert torch.allclose(block.dilated(y), block.long_range(y), atol=1e-5)
    generator = lrq.Generator(16, torch.randn(7, 12), *NORMALISATION, lka=False)
    assert not any(isinstance(layer, lrq.LargeKernelAttention) for layer in generator.modules())


def statistics_of(*shapes):
    inputs = [torch.randn(shape) * 2 + 1 for shape in shapes]
    weight = torch.cat([torch.full((shape[1],), 1 / shape[1] / len(shapes)) for shape in shapes])
    return inputs, weight, clusterq.image_statistics(inputs)


def test_semantic_statistics_are_those_of_the_last_layers_in_their_units():
    _, _, (means, variances) = statistics_of((4, 3, 5, 5), (4, 6, 2, 2))
    m, v = clusterq.semantic_statistics(means, variances, torch.tensor([2.0] * 4 + [0.5] * 2))
    for column, unit in ((0, 2), (5, 0.5)):
        assert torch.allclose(m[:, column], means[:, 3 + column] / unit)
        assert torch.allclose(v[:, column], variances[:, 3 + column] / unit ** 2)
    assert m.shape == v.shape == (4, 6)


def test_alignment_loss_against_numpy():
    inputs, weight, (means, variances) = statistics_of((4, 3, 5, 5), (4, 6, 2, 2))
    mu, var, seen = torch.randn(4, 9), torch.rand(4, 9), torch.tensor([True, False, True, True])
    per_image = []
    for i in range(4):
        layers = [(h[i].numpy(), part) for h, part in zip(inputs, (slice(0, 3), slice(3, 9)))]
        per_image.append(np.mean([((h.mean((1, 2)) - mu[i, part].numpy()) ** 2).mean() +
                                  ((h.var((1, 2)) - var[i, part].numpy()) ** 2).mean() for h, part in layers]))
    expected = np.mean([value for value, one in zip(per_image, seen) if one])
    assert np.isclose(clusterq.sfda_loss(means, variances, mu, var, weight, seen).item(), expected, rtol=1e-5)
    assert clusterq.sfda_loss(means, variances, mu, var, weight, torch.zeros(4, dtype=torch.bool)) == 0


def test_alignment_pulls_towards_the_centroid_and_rests_on_it():
    inputs, weight, _ = statistics_of((4, 3, 5, 5), (4, 6, 2, 2))
    inputs = [h.requires_grad_() for h in inputs]
    means, variances = clusterq.image_statistics(inputs)
    seen = torch.ones(4, dtype=torch.bool)
    clusterq.sfda_loss(means, variances, means.detach(), variances.detach(), weight, seen).backward(retain_graph=True)
    assert all((h.grad == 0).all() for h in inputs)
    noise = clusterq.intra_class_noise(means, 0.3)
    seen[1] = False
    clusterq.sfda_loss(means, variances, means.detach() + noise, variances.detach() + noise, weight, seen).backward()
    assert all(h.grad[i].abs().sum() > 0 for h in inputs for i in (0, 2, 3)) and all((h.grad[1] == 0).all() for h in inputs)


def test_spread_loss_is_alignment_to_the_nearest_noise_of_its_size():
    inputs, weight, (means, variances) = statistics_of((4, 3, 5, 5), (4, 6, 2, 2))
    mu, var, seen = torch.randn(4, 9), torch.rand(4, 9), torch.tensor([True, False, True, True])
    loss = lambda amplitude: clusterq.spread_loss(means, variances, mu, var, weight, seen, amplitude)
    assert torch.allclose(loss(0.0), clusterq.sfda_loss(means, variances, mu, var, weight, seen), rtol=1e-4)
    e = [0.3 * d / (d[seen].square().mean(0)).sqrt() for d in (means - mu, variances - var)]  # root mean square 0.3, nearest
    assert torch.allclose(loss(0.3), clusterq.sfda_loss(means, variances, mu + e[0], var + e[1], weight, seen), rtol=1e-4)
    other = [noise[torch.tensor([2, 1, 3, 0])] for noise in e]
    other = [0.3 * d / (d[seen].square().mean(0)).sqrt() for d in other]
    assert loss(0.3) < clusterq.sfda_loss(means, variances, mu + other[0], var + other[1], weight, seen)
    assert clusterq.spread_loss(means, variances, mu, var, weight, torch.zeros(4, dtype=torch.bool), 0.3) == 0


def test_spread_loss_pushes_outwards_below_its_size_and_inwards_above():
    mu, weight, seen = torch.zeros(6, 2), torch.full((2,), 0.5), torch.ones(6, dtype=torch.bool)
    for size, direction in ((0.1, -1), (1.0, 1)):
        means = (torch.randn(6, 2).sign() * size).requires_grad_()
        clusterq.spread_loss(means, mu, mu, mu, weight, seen, 0.3).backward()
        assert (means.grad.sign() == direction * means.sign()).all()
    means = torch.zeros(6, 2, requires_grad=True)
    clusterq.spread_loss(means, mu, mu, mu, weight, seen, 0.0).backward()
    assert (means.grad == 0).all()


def test_published_noise_has_its_size_and_is_drawn_anew():
    like = torch.zeros(500, 30)
    noise = clusterq.intra_class_noise(like, 0.3)
    assert (noise.std() - 0.3).abs() < 0.01 and noise.mean().abs() < 0.01
    assert (noise != clusterq.intra_class_noise(like, 0.3)).all() and (clusterq.intra_class_noise(like, 0.0) == 0).all()


BATCHES = {"usual": ([0, 1, 1, 4, 0, 1], [1, 1, 0, 1, 1, 1]), "one class": ([2] * 6, [1, 0, 1, 1, 1, 1]),
           "all labels wrong": ([0, 1, 2, 3, 4, 0], [0] * 6)}


@pytest.mark.parametrize("num_classes", (5, 1000))  # K > B too
@pytest.mark.parametrize("rho", (0.2, 0.0, None))
def test_centroids_against_a_plain_loop(num_classes, rho):
    centroids = clusterq.Centroids(num_classes, 3)
    expected, count = np.zeros((2, num_classes, 3)), np.zeros(num_classes)
    for labels, recognised in list(BATCHES.values()) * 2:
        values = torch.randn(2, 6, 3)
        centroids.update(*values, torch.tensor(labels), torch.tensor(recognised, dtype=torch.bool), rho)
        for c in set(labels):
            own = [i for i in range(6) if labels[i] == c and recognised[i]]
            if own:
                mean = values[:, own].numpy().mean(1)
                rate = len(own) / (count[c] + len(own)) if rho is None else rho if count[c] else 1
                expected[:, c] = (1 - rate) * expected[:, c] + rate * mean
                count[c] += len(own)
        assert np.allclose(torch.stack([centroids.means, centroids.variances]).numpy(), expected, atol=1e-6)
        assert centroids.seen.tolist() == (count > 0).tolist()
    assert not centroids.seen[3] and (centroids.means[3] == 0).all()


def test_hooks_are_removed_after_an_exception(script):
    teacher = Odd().eval()
    with pytest.raises(RuntimeError):
        script.teacher_forward(teacher, teacher.head, torch.randn(2, 5, 16, 16))
    assert not any(layer._forward_pre_hooks for layer in teacher.modules())


def test_separability_is_the_ratio_of_variances():
    teacher = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)).eval()
    for p, value in zip(teacher.parameters(), (torch.eye(2).view(2, 2, 1, 1), torch.zeros(2), None, None, torch.eye(2), torch.zeros(2))):
        p.data.copy_(p.data if value is None else value)
    x = torch.tensor([[5.0, 0], [7, 0], [0, 5], [0, 7]]).view(4, 2, 1, 1)
    watched = clusterq.Watched(teacher, teacher[-1])
    watched(x[:3]), watched(x[3:])
    at_norm, at_classifier, spread = watched.separability()
    assert np.isclose(at_norm, 18 / 1) and np.isclose(at_classifier, 18, rtol=1e-3) and np.isclose(spread, 0.5 ** 0.5, rtol=1e-3)


# ------------------------------------------------------------------------------------------------ quantize(...)

SMALL = dict(image_size=16, num_classes=7, w_bits=3, a_bits=3, mean=(0.5,) * 3, std=(0.25,) * 3, batch_size=8, device="cpu")


@pytest.fixture
def teacher():
    return Odd().eval()


def test_quantize_leaves_the_teacher_as_it_is(teacher, script, capsys):
    before = state_bytes(teacher)
    script.quantize(teacher, **SMALL, iterations=1)
    teacher.train()
    assert "hooks" not in capsys.readouterr().out
    teacher.bn.register_forward_hook(lambda *_: pytest.fail("a hook of the user's was called"))
    student, result = script.quantize(teacher, **SMALL, iterations=4)
    assert "the teacher's hooks do not run here" in capsys.readouterr().out
    assert same(before, state_bytes(teacher)) and teacher.training and len(teacher.bn._forward_hooks) == 1
    assert not torch.equal(student.stem.weight, teacher.stem.weight)
    assert 0 <= result["ptq_agreement"] <= 100 and "q_top1" not in result


def test_weights_are_moved_before_the_student_learns(teacher, script, monkeypatch):
    options = dict(iterations=2, warmup=0.5, student_lr=0.0, norm_lr=0.0)
    moved, _ = script.quantize(teacher, **SMALL, **options)
    assert not torch.equal(moved.stem.weight, teacher.stem.weight) and torch.equal(moved.bn.weight, teacher.bn.weight)
    assert moved.depthwise.input_quantizer.factor.numel() == 8                         # equalized too
    monkeypatch.setattr(script, "compensate_rounding", lambda student, teacher, batches: student)
    assert torch.equal(script.quantize(teacher, **SMALL, **options)[0].stem.weight, teacher.stem.weight)


def test_batch_norms_are_corrected_with_activations_in_float_and_then_quantized(teacher, script, monkeypatch):
    observing = []

    def watching(student, *args):
        observing.append({quantizer.observing for quantizer in quant.input_quantizers(student).values()})
        return quant.correct_batch_norm(student, *args)
    for name in ("equalize_channels", "correct_batch_norm"):
        monkeypatch.setattr(script, name, watching)
    monkeypatch.setattr(script, "compensate_rounding", watching)                        # which corrects them too
    student, _ = script.quantize(teacher, **SMALL, iterations=2, warmup=0.5)
    assert observing == [{False}, {True}, {False}]
    assert not torch.equal(student.bn.running_mean, teacher.bn.running_mean)
    assert not torch.equal(student.bn.running_var, teacher.bn.running_var)


def test_half_of_the_images_are_transformed_and_the_teacher_asked_what_it_sees_now(teacher, script, monkeypatch):
    changed, corrected_by, pairs, drawn, losses = [], [], [], [], []
    real, real_kd, real_draw, real_report = script.half_transformed, script.kd_loss, script.draw, script.Run.report
    monkeypatch.setattr(script, "half_transformed", lambda images: changed.append(real(images)) or changed[-1])
    monkeypatch.setattr(script, "kd_loss", lambda *args: pairs.append(args[:2]) or real_kd(*args))
    monkeypatch.setattr(script, "draw", lambda *args: drawn.append(real_draw(*args)) or drawn[-1])
    monkeypatch.setattr(script.Run, "report", lambda run, step, values: losses.append(values) or real_report(run, step, values))
    for name in ("correct_batch_norm", "compensate_rounding"):
        monkeypatch.setattr(script, name, lambda student, teacher, batches: corrected_by.append(batches) or student)
    options = {**SMALL, "batch_size": 64, "iterations": 2, "warmup": 0.5, "student_lr": 0.0, "norm_lr": 0.0,
               "precision": "float32"}
    with torch.no_grad():                                       # a teacher to which not all images are of one class
        logits = teacher(torch.randn(64, 3, 16, 16))
        teacher.head.bias -= logits.mean(0)
    student, _ = script.quantize(teacher, **options, **(dict(kd="kl") if script is lrq else {}))
    assert len(changed) == 21 and all(map(torch.equal, changed[:20] * 2, corrected_by[0] + corrected_by[1]))
    (logits, teacher_logits), labels = pairs[0], drawn[21][1]
    with torch.no_grad():
        assert torch.allclose(logits, student(changed[20]), atol=1e-4)
        assert torch.allclose(teacher_logits, teacher(changed[20]), atol=1e-4)
    seen = teacher_logits.argmax(1) == labels
    assert seen.any() and torch.allclose(losses[1]["L_QCE"], (F.cross_entropy(logits, labels, reduction="none") * seen).mean())


def test_ce_weight_is_that_of_the_students_cross_entropy(teacher, script, monkeypatch):
    norms, clip, kd_loss = [], nn.utils.clip_grad_norm_, script.kd_loss
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args).item()))
    monkeypatch.setattr(script, "kd_loss", lambda *args: 0 * kd_loss(*args))
    with torch.no_grad():                                       # a teacher to which not all images are of one class
        teacher.head.bias -= teacher(torch.randn(64, 3, 16, 16)).mean(0)
    for ce_weight in (0, 1, 2):
        script.quantize(teacher, **{**SMALL, "batch_size": 64}, iterations=2, warmup=0.5, precision="float32",
                        ce_weight=ce_weight, **(dict(kd="kl") if script is lrq else {}))
    assert norms[:2] == [0, 0] and min(norms[2:4]) > 0 and norms[4:] == pytest.approx([2 * norm for norm in norms[2:4]])


@pytest.mark.parametrize("num_classes, iterations, student_lr, norm_lr, pull, bns_weight, ce_weight", (
    (7, 1, 3e-3, 1e-2, 1e-2, 1, 1), (7, 1000, 3e-3, 1e-2, 1e-2, 1, 1), (7, 4000, 1.5e-3, 5e-3, 5e-3, 1, 1),
    (101, 4000, 1e-3, 1e-2, 0, 100, 0), (101, 400000, 1e-4, 1e-3, 0, 100, 0)))
@pytest.mark.parametrize("w_bits", (2, 3))
def test_rates_and_weights_left_out_follow_from_classes_and_iterations_not_bits(
        w_bits, num_classes, iterations, student_lr, norm_lr, pull, bns_weight, ce_weight, teacher, script, monkeypatch):
    teacher.head = nn.Linear(12, num_classes)
    chosen, rates = {}, []

    def begin(settings, *args, student_optimizer, **parts):
        chosen.update(settings)
        rates.extend(group["rate"] for group in student_optimizer.param_groups)
        raise InterruptedError
    monkeypatch.setattr(script, "Run", begin)
    with pytest.raises(InterruptedError):
        script.quantize(teacher, **{**SMALL, "w_bits": w_bits, "num_classes": num_classes}, iterations=iterations)
    assert [chosen[name] for name in ("student_lr", "norm_lr", "bns_weight", "ce_weight")] == [student_lr, norm_lr, bns_weight,
                                                                                              ce_weight]
    assert rates == [chosen["student_lr"], chosen["norm_lr"]]
    assert script is clusterq or (chosen["margin"], chosen["pull"]) == (-0.5 if num_classes <= 100 else 0, pull)


def test_the_student_learns_by_sgd_at_rates_that_fall_as_a_cosine_and_the_generator_by_adam(teacher, script, monkeypatch):
    seen, clipped, clip = {}, [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: clipped.append(args) or clip(*args))
    for kind in (torch.optim.SGD, torch.optim.Adam):
        class Watched(kind):
            def step(self, *args):
                seen.setdefault(type(self).__bases__[0].__name__, []).append([dict(group) for group in self.param_groups])
                return super().step(*args)
        monkeypatch.setattr(torch.optim, kind.__name__, Watched)
    student, _ = script.quantize(teacher, **SMALL, iterations=10, warmup=0.2, student_lr=0.02, norm_lr=0.04)
    rates = [0.01 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    for i, (weights, rest) in enumerate(seen["SGD"]):
        assert (weights["lr"], rest["lr"]) == pytest.approx((rates[i], 2 * rates[i]))
        assert all((group["momentum"], group["nesterov"]) == (0.9, True) for group in (weights, rest))
        assert (weights["weight_decay"], rest["weight_decay"]) == (1e-4, 0)
        assert all(args[0] is group["params"] and args[1] == 3 for args, group in zip(clipped[2 * i:], (weights, rest)))
    assert i == 7 and len(clipped) == 16
    assert {p.dim() for p in weights["params"]} == {2, 4} and {p.dim() for p in rest["params"]} == {1}
    assert len(weights["params"]) + len(rest["params"]) == len(list(student.parameters()))
    assert [(group["lr"], group["betas"]) for group, in seen["Adam"]] == [(1e-3, (0.5, 0.999))] * 10


def test_quantize_is_the_same_for_the_same_seed(teacher, script):
    a, b, c = (script.quantize(teacher, **SMALL, iterations=4, seed=seed)[0] for seed in (1, 1, 2))
    assert same(state_bytes(a), state_bytes(b)) and not same(state_bytes(a), state_bytes(c))


def test_measuring_does_not_change_the_student(teacher, script):
    def evaluate(model):
        model.train()
        return torch.rand(()).item()
    measured, plain = (script.quantize(teacher, **SMALL, iterations=4, evaluate=how)[0] for how in (evaluate, None))
    assert same(state_bytes(measured), state_bytes(plain))


def test_separability_is_left_out_where_evaluate_does_not_run_the_model(teacher):
    _, result = clusterq.quantize(teacher, **SMALL, iterations=4, evaluate=lambda model: 50, separability=True)
    assert list(result["separability"]) == ["generated"]


def test_separability_of_a_finished_run_is_measured_by_resuming_it(teacher, tmp_path):
    first, _ = clusterq.quantize(teacher, **SMALL, iterations=4, out=tmp_path)
    again, result = clusterq.quantize(teacher, **SMALL, iterations=4, out=tmp_path, resume=True, separability=True)
    assert same(state_bytes(first), state_bytes(again)) and list(result["separability"]) == ["generated"]


def test_evaluate_may_leave_what_it_measures_in_training_mode(teacher, script):
    images, seen = torch.randn(8, 3, 16, 16), []

    def evaluate(model):
        assert not any(earlier.training for earlier in seen)
        seen.append(model.train())
        model(images)
        return 50
    script.quantize(teacher, **SMALL, iterations=4, evaluate=evaluate, **({"separability": True} if script is clusterq else {}))
    assert not any(model.training for model in seen) and len(seen) == (4 if script is clusterq else 3)


def test_evaluate_may_return_several_figures(teacher, script):
    _, result = script.quantize(teacher, **SMALL, iterations=4, evaluate=lambda model: {"top1": np.float32(50), "top5": 75})
    assert [[result[f"{name}_{key}"] for name in ("fp", "ptq", "q")] for key in ("top1", "top5")] == [[50.0] * 3, [75.0] * 3]
    _, result = script.quantize(teacher, **SMALL, iterations=4, evaluate=lambda model: {"top1": 50, "divergence": 0.1})
    assert result["q_divergence"] == 0.1 and "q_real_agreement" not in result           # one of what the commands measure


def test_a_figure_that_is_no_number_leaves_result_json_valid(teacher, tmp_path, script):
    _, result = script.quantize(teacher, **SMALL, iterations=4, evaluate=lambda model: {"top1": 5, "loss": math.inf}, out=tmp_path)
    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result["q_loss"] == math.inf and written["q_loss"] is None and written["q_top1"] == 5


def test_figures_on_real_images_are_those_of_their_definitions(script):
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 4), nn.Linear(6, 4)
    x, y = torch.randn(50, 6), torch.randint(4, (50,))
    batches = torch.utils.data.DataLoader(list(zip(x, y)), 32)                          # the last is smaller
    figures = script.figures_on(batches, student, teacher, torch.device("cpu"))
    p, q = teacher(x).double().softmax(1), student(x).double().softmax(1)
    expected = {"top1": 2.0 * (q.argmax(1) == y).sum().item(), "real_agreement": 2.0 * (q.argmax(1) == p.argmax(1)).sum().item(),
                "divergence": (p * (p.log() - q.log())).sum(1).mean().item()}
    assert figures == pytest.approx(expected, rel=1e-5) and 0 < figures["real_agreement"] < 100
    alone = script.figures_on(batches, student, None, torch.device("cpu"))              # its own teacher
    assert alone["top1"] == figures["top1"] and alone["real_agreement"] == 100 and alone["divergence"] == 0


def test_evaluate_may_take_gradients(teacher, script):
    def evaluate(model):  # accuracy under attack, say
        images = torch.randn(4, 3, 16, 16, requires_grad=True)
        model(images).sum().backward()
        return 50 if images.grad.any() else 0
    _, result = script.quantize(teacher, **SMALL, iterations=4, evaluate=evaluate)
    assert [result[f"{name}_top1"] for name in ("fp", "ptq", "q")] == [50, 50, 50]


@pytest.mark.parametrize("able, dtype", (
    ({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16), ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
    ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.float32),
    ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16)))
def test_bfloat16_is_chosen_where_the_processor_is_faster_in_it(able, dtype, script, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert script.choose_device("cpu", "auto")[1] == dtype
    assert script.choose_device("cpu", "float32")[1] == torch.float32


def test_reduced_precision_leaves_the_quantization_grid_alone(teacher, script, monkeypatch):
    seen, real = [], quant.quantize_tensor

    def watching(x, scale, zero_point, quant_min, quant_max, axis=None):
        steps = real(x, scale, zero_point, quant_min, quant_max, axis)
        codes = steps.detach() + quant.broadcast_along(zero_point, x, axis)
        seen.append(x.dtype == steps.dtype == torch.float32 and torch.equal(codes, codes.round())
                    and codes.min() >= quant_min and codes.max() <= quant_max)
        return steps
    monkeypatch.setattr(quant, "quantize_tensor", watching)
    half, _ = script.quantize(teacher, **SMALL, iterations=4, precision="bfloat16")
    assert len(seen) > 50 and all(seen)
    full, _ = script.quantize(teacher, **SMALL, iterations=4, precision="float32")
    assert not same(state_bytes(half), state_bytes(full))


def test_an_iteration_never_waits_for_the_device(teacher, script, monkeypatch):
    """No value travels from a tensor to Python in an iteration (on a GPU each would stop the queue of work)."""
    waits, at_start = [], []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal,
                                           torch.ops.aten._unique2, torch.ops.aten.masked_select):
                waits.append(function)
            return function(*args, **(kwargs or {}))

    real_draw = script.draw
    monkeypatch.setattr(script, "draw", lambda *args: (at_start.append(len(waits)), real_draw(*args))[1])
    monkeypatch.setattr(script.Run, "report", lambda self, step, losses: setattr(self, "step", step))
    monkeypatch.setattr(script, "Progress", lambda *args: None)
    with Watching():
        script.quantize(teacher, **SMALL, iterations=8, warmup=0.25)
    assert len(at_start) == 28 and at_start[-1] == at_start[-6] and len(waits) > 0


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def in_fixed_order():
    """Sums that a GPU would take in any order; two runs of ClusterQ differ by a fifth of their way without."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@on_a_gpu
@pytest.mark.parametrize("precision", ("float32", "bfloat16"))
def test_a_recorded_iteration_does_what_it_does_when_started_from_python(precision, teacher, script, monkeypatch):
    made = []

    class Kept(script.Repeated):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    def parameters(repeated):
        monkeypatch.setattr(script, "Repeated", repeated)
        student, result = script.quantize(teacher, **{**SMALL, "device": "cuda"}, iterations=16, warmup=0.5, precision=precision)
        assert result["precision"] == precision
        return nn.utils.parameters_to_vector(student.parameters()).detach()
    plain, recorded = parameters(lambda function, device: function), parameters(Kept)
    start = nn.utils.parameters_to_vector(teacher.parameters()).to(plain)
    assert [one.graph is not None for one in made] == [True, True]
    # Sums in another order round another weight up, in bfloat16 soon many; two ways at random would differ by 1.4.
    assert (recorded - plain).norm() < {"float32": 0.02, "bfloat16": 0.7}[precision] * (plain - start).norm()


@on_a_gpu
@pytest.mark.parametrize("stop_at", (2, 13))
def test_on_a_gpu_a_resumed_run_ends_as_one_that_never_stopped(stop_at, teacher, tmp_path, script, monkeypatch, in_fixed_order):
    arguments = {**SMALL, "device": "cuda", "iterations": 16, "warmup": 0.5, "precision": "float32"}
    whole, _ = script.quantize(teacher, **arguments)
    report = script.Run.report

    def stopping(self, step, losses):
        if step == stop_at:
            self.requests.append(signal.SIGINT)
        return report(self, step, losses)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script.Run, "report", stopping)
        script.quantize(teacher, **arguments, out=tmp_path)
    parts, _ = script.quantize(teacher, **arguments, out=tmp_path, resume=True)
    whole, parts, start = (nn.utils.parameters_to_vector(model.parameters()).cpu() for model in (whole, parts, teacher))
    assert (parts - whole).norm() < 0.02 * (whole - start).norm()


@on_a_gpu
def test_a_teacher_that_waits_for_the_gpu_runs_as_it_is(script, capsys):
    class Waits(Odd):
        def forward(self, x):
            return super().forward(x if x.mean().item() < 1e9 else -x)
    before = torch.cuda.current_stream()
    script.quantize(Waits().eval(), **{**SMALL, "device": "cuda"}, iterations=12, warmup=0.5)
    assert capsys.readouterr().out.count("no CUDA graph") == 2 and torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    script.quantize(Odd().eval(), **{**SMALL, "device": "cuda"}, iterations=12, warmup=0.5)
    assert "no CUDA graph" not in capsys.readouterr().out


def test_resume_may_bring_the_images_to_measure_on(teacher, tmp_path, capsys, script):
    script.quantize(teacher, **SMALL, iterations=2, out=tmp_path)
    _, result = script.quantize(teacher, **SMALL, iterations=2, out=tmp_path, resume=True, evaluate=lambda model: 50.0)
    assert result["fp_top1"] == result["q_top1"] == 50.0
    assert "nan" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("value", (torch.tensor(50.0), np.float32(50)))
def test_an_accuracy_may_be_a_tensor_or_a_number_of_numpy(value, teacher, tmp_path, script):
    for resume in (False, True):
        _, result = script.quantize(teacher, **SMALL, iterations=2, out=tmp_path, resume=resume, evaluate=lambda model: value)
        assert result["fp_top1"] == result["ptq_top1"] == result["q_top1"] == 50


def test_a_teacher_that_normalises_its_images_itself(teacher, script):
    """Then its first layer's input has another range than pixels, to which it must not be clipped."""
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), teacher).eval()
    model[0].running_mean.fill_(0.5)
    model[0].running_var.fill_(0.25 ** 2)
    student, _ = script.quantize(model, **{**SMALL, "mean": (0.0,) * 3, "std": (1.0,) * 3, "w_bits": 8, "a_bits": 8}, iterations=2)
    ranges = student[1].stem.input_quantizer
    assert ranges.bits == [8] and ranges.min_val < -1 and ranges.max_val > 1


def test_seconds_do_not_count_measuring(teacher, script, monkeypatch):
    clock, measured = time.monotonic, []
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 10000 * len(measured))  # as if measuring took hours
    fresh_images = script.Run.fresh_images
    monkeypatch.setattr(script.Run, "fresh_images", lambda *args: measured.append(1) or fresh_images(*args))

    def evaluate(model):
        measured.append(1)
        return model(torch.randn(8, 3, 16, 16)).abs().mean().item()
    options = dict(separability=True) if script is clusterq else {}
    _, result = script.quantize(teacher, **SMALL, iterations=4, evaluate=evaluate, **options)
    assert len(measured) >= 6 and 0 < result["seconds"] < 5000


def test_numbers_of_numpy_and_torch_are_taken_as_numbers(teacher, tmp_path, script):
    arguments = {**SMALL, "mean": np.full(3, 0.5), "std": torch.full((3,), 0.25), "w_bits": np.int64(3), "temperature": np.float32(4),
                 "student_lr": np.float32(0.01), "generator_lr": np.float64(0.001), "about": {"made": np.int64(2026), "method": "mine", "with": torch.__version__}}  # a str of a class of its own
    for resume in (False, True):
        _, result = script.quantize(teacher, **arguments, iterations=2, out=tmp_path, resume=resume)
        assert result["mean"] == [0.5] * 3 and result["std"] == [0.25] * 3 and result["temperature"] == 4
        assert result["made"] == 2026 and result["method"] == script.METHOD
    torch.load(tmp_path / "student.pt", weights_only=True)


def test_two_runs_in_one_folder_are_refused(teacher, tmp_path, script):
    lock = script.lock_folder(tmp_path)
    with pytest.raises(script.BadInput, match="another run"):
        script.quantize(teacher, **SMALL, iterations=4, out=tmp_path)
    os.close(lock)
    script.quantize(teacher, **SMALL, iterations=2, out=tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, script):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError):
        with script.atomically(tmp_path / "file") as path:
            path.write_text("half")
            1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_write_that_the_disk_refuses_is_bad_input(teacher, tmp_path, monkeypatch, script):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(script.torch, "save", full)
    with pytest.raises(script.BadInput, match="checkpoint.pt cannot be written .*No space left on device.*--resume"):
        script.quantize(teacher, **SMALL, iterations=4, out=tmp_path)


@pytest.mark.parametrize("warmup", (0, 0.5))
def test_interrupted_twice_in_calibration_a_run_goes_on_from_its_start(warmup, teacher, tmp_path, monkeypatch, script, capfd):
    arguments = dict(SMALL, iterations=8, warmup=warmup)
    whole, _ = script.quantize(teacher, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(script, "correct_batch_norm", lambda *args: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
        with pytest.raises(KeyboardInterrupt):
            script.quantize(teacher, **arguments, out=tmp_path)
    assert "once more: at once" in capfd.readouterr().err
    parts, _ = script.quantize(teacher, **arguments, out=tmp_path, resume=True)
    assert same(state_bytes(whole), state_bytes(parts))


@pytest.mark.parametrize("stop_at", (2, 5, 8))
def test_resume_gives_the_same_bits_as_an_uninterrupted_run(teacher, tmp_path, stop_at, monkeypatch, script):
    arguments = dict(SMALL, iterations=8, warmup=0.5, evaluate=lambda model: 50.0)
    whole, expected = script.quantize(teacher, **arguments, out=tmp_path / "whole")
    real_loss, calls = script.batch_norm_loss, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return real_loss(*args)
    monkeypatch.setattr(script, "batch_norm_loss", interrupting)
    with pytest.raises(KeyboardInterrupt, match=f"iteration {stop_at} of 8"):
        script.quantize(teacher, **arguments, out=tmp_path / "parts")
    with pytest.raises(script.BadInput, match="seed"):
        script.quantize(teacher, **arguments, seed=5, out=tmp_path / "parts", resume=True)
    with pytest.raises(script.BadInput, match="from another teacher"):
        script.quantize(Odd(), **arguments, out=tmp_path / "parts", resume=True)
    parts, result = script.quantize(teacher, **arguments, out=tmp_path / "parts", resume=True)
    assert len(calls) == 8 and same(state_bytes(whole), state_bytes(parts))
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "parts/log.csv").read_text()
    for key in ("fp_top1", "ptq_agreement", "q_agreement", "recognised"):
        assert result[key] == expected[key]


def test_a_stop_in_the_first_measurement_is_at_once_and_leaves_the_signals_as_they_were(teacher, tmp_path, script):
    before = signal.getsignal(signal.SIGTERM)

    def evaluate(model):
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        script.quantize(teacher, **SMALL, iterations=4, evaluate=evaluate, out=tmp_path)
    assert signal.getsignal(signal.SIGTERM) == before
    script.quantize(teacher, **SMALL, iterations=4, out=tmp_path)  # the folder is free


@pytest.mark.parametrize("change, message", (
    (dict(image_size=18), "multiple of 4"), (dict(num_classes=8), "num_classes"), (dict(classifier="stem2"), "stem2"),
    (dict(classifier="twice"), "classifier"), (dict(mean=(0.5,) * 4, std=(0.25,) * 4), "cannot be copied and run"), (dict(mean=(0.5,) * 2), "mean has 2 channels"),
    (dict(mean="half"), "^mean"), (dict(num_classes="7"), "^num_classes"), (dict(warmup=None), "^--warmup"), (dict(std=(0.25, 0, 0.25)), "^std"), (dict(num_classes=1), "^num_classes"),
    (dict(w_bits=1), "2 to 8"), (dict(w_bits=4.0), "2 to 8"), (dict(iterations=1e3), "1000.0: choose a whole number"), (dict(checkpoint_every=-1), "seconds"),
    (dict(bns_weight=float("nan")), "bns-weight"), (dict(classifier="stem"), "one vector an image"), (dict(classifier="unused"), "through its classifier"), (dict(about={"made": {1, 2}}), "^about"),
    (dict(w_bits="4"), "^--w '4': choose 2 to 8 bits"), (dict(evaluate=0.9), "^evaluate 0.9: choose a function"), (dict(evaluate=lambda model: None), "evaluate returns None"),
    (dict(evaluate=lambda model: math.nan), "evaluate returns nan"), (dict(evaluate=lambda model: 101), "evaluate returns 101"), (dict(about=["a"]), "^about"),
    (dict(evaluate=lambda model: {"top5": 9.0}), "has it as top1"), (dict(evaluate=lambda model: {"top1": 9.0, "which": "a"}), "dict of numbers"),
    (dict(evaluate=lambda model: {"top1": 9.0, "agreement": 9.0}), "no agreement"),
    (dict(symmetric="no"), "^symmetric 'no': choose True or False"), (dict(resume=1), "^resume 1: choose True"), (dict(student_lr=float("inf")), "student-lr"), (dict(out="/dev/null/x"), "/dev/null/x")))
def test_quantize_refuses_what_it_cannot_use(teacher, change, message, script):
    teacher.unused = nn.Linear(12, 9)
    with pytest.raises(script.BadInput, match=message):
        script.quantize(teacher, **{**SMALL, "iterations": 4, **change})


def test_every_yes_or_no_setting_refuses_another_value(teacher, script):
    for name, parameter in inspect.signature(script.quantize).parameters.items():
        if isinstance(parameter.default, bool):
            with pytest.raises(script.BadInput, match=f"^{name} 'no': choose True or False"):
                script.quantize(teacher, **SMALL, iterations=4, **{name: "no"})


def test_a_teacher_that_gives_nan_or_has_no_batch_norm_is_refused(teacher, script):
    teacher.last.weight.data[0, 0] = torch.nan
    with pytest.raises(script.BadInput, match="NaN"):
        script.quantize(teacher, **SMALL, iterations=4)
    plain = nn.Sequential(nn.Conv2d(3, 7, 16), nn.Flatten(), nn.Linear(7, 7))
    with pytest.raises(script.BadInput, match="no BatchNorm2d"):
        script.quantize(plain, **SMALL, iterations=4)


class Several(Odd):
    def forward(self, x):
        return super().forward(x), x


class Sized(Odd):
    def forward(self, x):
        assert x.shape[-1] == 32, "32 x 32 images only"


class Normalises(Odd):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


class WithoutGradient(Odd):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class ForInference(Odd):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 7)

    def forward(self, x):
        x = self.bn(self.conv(x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 8, 8)))
        return self.head(x.mean((2, 3)).view(-1, 4, 6).mean(1))


@pytest.mark.parametrize("kind, message", (
    (Several, "'tuple' object.*return logits alone"), (Sized, "32 x 32 images only"), (Normalises, "in place"),
    (WithoutGradient, "no gradient"), (ForInference, "no gradient"), (Patches, "other than one map an image")))
def test_a_teacher_that_cannot_be_run_as_it_must_is_refused(kind, message, script):
    with pytest.raises(script.BadInput, match=message):
        script.quantize(kind(), **SMALL, iterations=4)


def test_a_state_dict_in_the_place_of_a_teacher_is_refused(teacher, script):
    with pytest.raises(script.BadInput, match="the teacher is a OrderedDict"):
        script.quantize(teacher.state_dict(), **SMALL, iterations=4)


def test_a_teacher_that_cannot_be_copied_is_refused(teacher, script):
    prune.random_unstructured(teacher.twice, "weight", 0.5)
    teacher(torch.randn(2, 3, 16, 16))
    with pytest.raises(script.BadInput, match="cannot be copied"):
        script.quantize(teacher, **SMALL, iterations=4)


def test_a_teacher_in_half_precision_is_taken_in_full(teacher, script):
    student, _ = script.quantize(teacher.to(torch.bfloat16), **SMALL, iterations=2)
    assert student.stem.weight.dtype == torch.float32 and teacher.stem.weight.dtype == torch.bfloat16
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(quant.unpack(quant.pack(student), teacher)(images), student(images))


def test_a_compiled_teacher_is_taken_as_the_module_that_was_compiled(teacher, script):
    compiled, plain = (script.quantize(model, **SMALL, iterations=2)[0] for model in (torch.compile(teacher), teacher))
    assert same(state_bytes(compiled), state_bytes(plain))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(quant.unpack(quant.pack(compiled), torch.compile(teacher))(images), plain(images))


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)))
def test_where_nothing_can_be_trained_quantize_says_so(context, teacher, script):
    with context(), pytest.raises(script.BadInput, match="call it outside"):
        script.quantize(teacher, **SMALL, iterations=2)


@pytest.mark.parametrize("off", (dict(sfda=False), dict(variance=False), dict(ema=False), dict(fresh_noise=True), dict(rho=0.9),
                                 dict(noise=2.0), dict(sfda_weight=5.0), dict(bns_weight=9.0), dict(temperature=9.0),
                                 dict(symmetric=True)))
def test_every_part_of_clusterq_changes_the_student(teacher, off, monkeypatch):
    monkeypatch.setattr(clusterq, "intra_class_noise", torch.full_like)  # draws nothing: the random numbers stay the same
    whole, part = (clusterq.quantize(teacher, **SMALL, iterations=6, **options)[0] for options in ({}, off))
    assert not same(state_bytes(whole), state_bytes(part))


@pytest.mark.parametrize("off", ("attention", dict(lka=False), dict(margin=0.3), dict(kd="kl"), dict(alpha=3.0), dict(beta=3.0),
                                 dict(temperature=9.0), dict(bns_weight=9.0), dict(symmetric=True)))
def test_every_part_of_lrq_changes_the_student(teacher, off, monkeypatch):
    whole, _ = lrq.quantize(teacher, **SMALL, iterations=6)
    if off == "attention":  # still there, so that the random numbers stay the same, but without effect
        monkeypatch.setattr(lrq.LargeKernelAttention, "forward", lambda self, x: x)
    part, _ = lrq.quantize(teacher, **SMALL, iterations=6, **({} if off == "attention" else off))
    assert not same(state_bytes(whole), state_bytes(part))


def test_a_run_that_diverges_stops_and_says_so(teacher, tmp_path, script):
    with pytest.raises(script.BadInput, match="nan at iteration"):
        script.quantize(teacher, **SMALL, iterations=8, student_lr=1e30, out=tmp_path)


def test_a_large_gradient_does_not_throw_the_student_far(teacher, monkeypatch, script):
    """One step of Nesterov's SGD moves it by 1.9 learning rates times the gradient, whose norm is cut to 3: that of weights, and
    that of batch norms and biases, by itself."""
    real_loss = script.kd_loss
    monkeypatch.setattr(script, "kd_loss", lambda *args: 1e5 * real_loss(*args))
    monkeypatch.setattr(script, "compensate_rounding", lambda student, teacher, batches: student)  # it moves weights too
    options = dict(kd="kl") if script is lrq else {}
    student, _ = script.quantize(teacher, **SMALL, iterations=2, warmup=0.5, student_lr=0.01, norm_lr=0.03, **options)
    before = dict(teacher.named_parameters())
    for weights, rate in ((True, 0.01), (False, 0.03)):
        moved = sum((p - before[name]).square().sum() for name, p in student.named_parameters()
                    if (p.dim() > 1) == weights and name != "bn.bias").sqrt()
        assert rate < moved < rate * 1.9 * 3 * 1.05


def test_after_each_step_the_student_of_lrq_goes_back_a_share_of_the_way_to_where_it_began(teacher, monkeypatch):
    before, after = [], []

    class Watched(torch.optim.SGD):
        def step(self):
            params = [p for group in self.param_groups for p in group["params"]]
            before.append([p.detach().clone() for p in params])
            super().step()
            after.append([p.detach().clone() for p in params])
    monkeypatch.setattr(torch.optim, "SGD", Watched)
    lrq.quantize(teacher, **SMALL, iterations=6, warmup=0.2, pull=0.6)
    assert len(before) == 5
    for i in range(4):
        share = 0.6 * 0.5 * (1 + math.cos(math.pi * i / 5))
        for start, stepped, pulled in zip(before[0], after[i], before[i + 1]):
            assert torch.allclose(pulled, stepped + share * (start - stepped), rtol=1e-5, atol=1e-7)
    assert not any(torch.equal(start, stepped) for start, stepped in zip(before[0], after[0]))


def test_a_teacher_without_scales_and_biases_is_quantized(script):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(8, 7, bias=False))
    student, _ = script.quantize(model, **SMALL, iterations=3)
    assert not torch.equal(student[0].weight, model[0].weight)


def test_a_convolution_can_be_the_classifier(script):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 7, 1), nn.Flatten())
    student, result = script.quantize(model, **SMALL, iterations=3)
    assert student(torch.randn(2, 3, 16, 16)).shape == (2, 7)


# ------------------------------------------------------------------------------------------------ the command line

@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Weights and images to run on: random ResNet-20 and ResNet-18, two pictures for each of ten classes, bad files."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    for name, model in (("resnet20", lrq.CifarResNet(3, 10)), ("resnet20-100", lrq.CifarResNet(3, 100)),
                        ("resnet18", models.resnet18())):
        torch.save({"state_dict": {"module." + key: value for key, value in model.state_dict().items()}}, folder / f"{name}.pt")
    nan = lrq.CifarResNet(3, 10)
    nan.conv1.weight.data[0] = torch.nan
    torch.save(nan.state_dict(), folder / "nan.pt")
    torch.save(nan, folder / "pickled.pt")
    (folder / "text.pt").write_text("no weights")
    for kind, classes in (("images", 10), ("nine", 9), ("broken", 10)):
        for c in range(classes):
            (folder / kind / f"test/class{c}").mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng(c * 2 + i).integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / kind / f"test/class{c}/{i}.png")
    (folder / "broken/test/class3/0.png").write_bytes(b"not a picture")
    for c in range(100):
        (folder / f"numbers/{c}").mkdir(parents=True)
        Image.fromarray(pixels).save(folder / f"numbers/{c}/0.png")
    (folder / "half/cifar-10-batches-py").mkdir(parents=True)
    torch.save({**quant.pack(calibrated(lrq.CifarResNet(1, 10), size=32)), "settings": {"arch": "resnet20", "dataset": "cifar10"}},
               folder / "student.pt")
    torch.save({"settings": {"arch": "resnet20", "dataset": "cifar10"}, "student": {}}, folder / "checkpoint.pt")
    (folder / "empty").mkdir()
    (folder / "file").touch()
    return folder


RESNET20 = "--arch resnet20 --weights {0}/resnet20.pt --iterations 4 --batch-size 4 --device cpu"
BAD_INPUT = (
    ("--arch resnet81", "resnet18"), ("--arch resnet18 --weights {0}/none.pt", "none.pt"),
    ("--arch vit_b_16 --weights {0}/none.pt", "batch norm"), ("--w 9", "--w 9"), ("--a 1", "--a 1"), ("--w four", "--w: invalid int value: 'four'"),
    ("--arch resnet20 --weights {0}/text.pt", "text.pt"), ("--arch resnet20 --weights {0}/pickled.pt", "pickled.pt"),
    ("--arch resnet20 --weights {0}", "--weights"), ("--arch resnet20 --weights {0}/resnet18.pt", "conv1.weight"),
    ("--arch resnet18 --weights {0}/resnet20.pt", "Missing key(s)"),
    ("--arch resnet20 --weights {0}/resnet20-100.pt", "torch.Size([100, 64])"), ("--arch resnet20 --weights {0}/nan.pt", "NaN"),
    (RESNET20 + " --data {0}/none", "--data {0}/none"), (RESNET20 + " --data " + "a" * 300, "File name too long"), (RESNET20 + " --data {0}/empty", "--data {0}/empty"),
    (RESNET20 + " --data {0}/nine", "9 classes"), (RESNET20 + " --data {0}/broken", "class3/0.png"),
    (RESNET20 + " --out {0}/file", "--out {0}/file"), (RESNET20 + " --out {0}/file/folder", "--out {0}/file/folder"),
    (RESNET20 + " --resume --out {0}/empty", "--resume"), (RESNET20 + " --batch-size 1", "--batch-size 1"),
    (RESNET20 + " --batch-size 0", "--batch-size 0"), (RESNET20 + " --iterations 0", "--iterations 0"),
    (RESNET20 + " --margin inf", "--margin inf"), (RESNET20 + " --margin nan", "--margin nan"),
    (RESNET20 + " --warmup 1", "--warmup 1"), (RESNET20 + " --precision int8", "--precision 'int8'"), (RESNET20 + " --device cuda:99", "--device cuda:99"), ("--dataset cifar11", "--dataset"),
    ("--arch resnet18 --dataset cifar10", "--weights"), ("--arch resnet20 --dataset imagenet", "--weights"), ("--no-such-flag", "--no-such-flag"),
    (RESNET20 + " --seed -1", "--seed -1"), (RESNET20 + " --seed 99999999999999999999", "--seed"),
    (RESNET20 + " --data {0}/half", "half is not a whole CIFAR folder"),
    ("--arch resnet20 --dataset cifar100 --weights {0}/resnet20-100.pt --data {0}/numbers", "rename them to as many digits"),
    ("--evaluate {0}/text.pt", "text.pt"), ("--evaluate {0}/none.pt", "none.pt"), ("--evaluate {0}/checkpoint.pt", "is not a student.pt"),
    ("--evaluate {0}/student.pt --data {0}/images", "of another architecture"))


def command(script, arguments, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    script.run(lambda: script.main(shlex.split(arguments.format(folder))))


@pytest.mark.parametrize("arguments, message", BAD_INPUT)
def test_bad_input_is_one_clear_line(arguments, message, made, monkeypatch, capsys, script):
    with pytest.raises(SystemExit) as stop:
        command(script, arguments, made, monkeypatch)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"{script.__name__}.py: ") and error.count("\n") == 1, error
    assert message.format(made) in error


@pytest.mark.parametrize("error", (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")))
def test_too_little_memory_is_one_clear_line(error, script, capsys):
    def failing(error):
        raise error
    with pytest.raises(SystemExit) as stop:
        script.run(lambda: failing(error))
    assert stop.value.code == 2 and re.fullmatch(r".*: not enough memory \(.*\): choose a smaller --batch-size\n", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="a bug"):
        script.run(lambda: failing(RuntimeError("a bug")))


def test_published_weights_are_read_as_torchvision_reads_them(monkeypatch, script):
    """Those of DenseNet have names that its constructor mends."""
    expected = models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value for key, value in expected.items()
           if not key.endswith("num_batches_tracked")}
    assert old.keys() != expected.keys()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: dict(old))
    model, *_, published = script.build_teacher("densenet121", "imagenet")
    args = argparse.Namespace(arch="densenet121", dataset="imagenet", weights=None)
    assert same(script.load_teacher(args, model, published).state_dict(), expected)


def test_weights_that_cannot_be_fetched_are_said_so(made, monkeypatch, capsys, script):
    def refuse(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(made / "nothing cached"))
    for arch in ("resnet18", "resnet20"):
        with pytest.raises(SystemExit):
            command(script, f"--arch {arch} --w 4 --a 4", made, monkeypatch)
        error = capsys.readouterr().err
        assert "could not be fetched" in error and "--weights" in error and error.count("\n") == 1


FILES = ["checkpoint.pt", "log.csv", "result.json", "samples.png", "student.pt"]


def test_a_whole_run_of_the_command(made, monkeypatch, capsys, script):
    arguments = RESNET20 + " --w 4 --a 4 --data {0}/images --out {0}/run-" + script.__name__
    run = made / f"run-{script.__name__}"
    process = subprocess.run([sys.executable, HERE / f"{script.__name__}.py", *shlex.split(arguments.format(made))], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    last = process.stdout.splitlines()[-1]
    assert re.fullmatch(rf"full precision [\d.]+ %  plain 4-bit [\d.]+ %  {script.METHOD} [\d.]+ % \(agreement [\d.]+ %, divergence [\d.]+\)  "
                        r"[\d.]+x smaller", last), last
    assert sorted(path.name for path in (run).iterdir()) == FILES
    result = json.loads((run / "result.json").read_text())
    assert result["w_bits"] == 4 and result["q_mb"] < result["fp_mb"] / 4 and result["seed"] == 0 and result["arch"] == "resnet20"
    rows = (run / "log.csv").read_text().splitlines()
    assert rows[0] == {lrq: "step,L_AMA,L_BNS,L_QCE,L_DKD", clusterq: "step,L_CE,L_BNS,L_SFDA,L_QCE,L_KL"}[script] and len(rows) == 5 and "nan" not in "".join(rows)
    assert Image.open(run / "samples.png").size == (8 * 34 + 2, 10 * 34 + 2)

    command(script, f"--evaluate {run}/student.pt --data {made}/images", made, monkeypatch)
    assert f"top-1 {result['q_top1']:.2f} %" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(script, f"--evaluate {run}/student.pt", made, monkeypatch)
    assert "--data" in capsys.readouterr().err

    command(script, arguments + " --resume", made, monkeypatch)  # of a run that is over: evaluates again, and changes nothing
    assert json.loads((run / "result.json").read_text())["q_top1"] == result["q_top1"]
    command(script, arguments + " --seed 1", made, monkeypatch)  # another run there: the first one is moved aside
    assert sorted(path.name for path in (run / "earlier-1").iterdir()) == FILES


def test_resnet18_at_224_without_data(made, monkeypatch, capsys, script):
    command(script, "--arch resnet18 --w 4 --a 4 --weights {0}/resnet18.pt --iterations 2 --batch-size 2 --warmup 0.5 --out {0}/large-" + script.__name__,
            made, monkeypatch)
    assert "agreement with the teacher on synthetic images: plain 4-bit" in capsys.readouterr().out.splitlines()[-1]
    assert sorted(path.name for path in (made / f"large-{script.__name__}").iterdir()) == FILES
    result = json.loads((made / f"large-{script.__name__}/result.json").read_text())
    assert 44 < result["fp_mb"] < 48 and 5.5 < result["q_mb"] < 6.5 and "q_top1" not in result


def test_progress_is_one_line_in_a_terminal_and_plain_lines_in_a_log(monkeypatch):
    for terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdout", stream)
        progress = lrq.Progress("LRQ", 3)
        for step in (1, 2, 3):
            progress.last_time -= 60
            progress(step, {"L_AMA": torch.tensor(0.5)})
        text = stream.getvalue()
        assert text.count("L_AMA 0.5000") == 3 and "left" in text and ("\r" in text) == terminal
        assert text.count("\n") == (1 if terminal else 3)


def test_a_cached_teacher_that_does_not_fit_is_trained_as_if_there_were_none(tmp_path, monkeypatch, script):
    drawn, file = script.draw_shapes, tmp_path / "hub" / "checkpoints" / "zsq_shapes_resnet8_v3.pt"
    monkeypatch.setattr(script, "draw_shapes", lambda count, seed: drawn(200, seed))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    first = state_bytes(script.shapes_teacher())
    assert same(first, state_bytes(script.shapes_teacher()))                            # from the cache
    spoiled = {key: torch.ones_like(value) for key, value in torch.load(file).items()}
    torch.save({**spoiled, "fc.weight": torch.ones(3, 64)}, file)                       # of other classes
    assert same(first, state_bytes(script.shapes_teacher()))


# ------------------------------------------------------------------------------------------------ README and the rest

def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def test_readme_commands_have_flags_that_exist(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    name = f"python {script.__name__}.py"
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if name in line]
    assert len(commands) >= 3

    class Parsed(Exception):
        pass

    def parsed(*args, **kwargs):
        raise Parsed
    monkeypatch.setattr(script, "build_teacher", parsed)
    monkeypatch.setattr(script, "evaluate_student", parsed)
    for line in commands:
        arguments = shlex.split(line.split(name, 1)[1], comments=True)
        if "--resume" in arguments:
            Path(arguments[arguments.index("--out") + 1]).mkdir(parents=True, exist_ok=True)
            Path(arguments[arguments.index("--out") + 1], "checkpoint.pt").touch()
        with pytest.raises(Parsed):
            script.main(arguments)


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        short = re.sub(r"iterations=\d+, batch_size=\d+", "iterations=3, batch_size=4", block)
        assert short != block or "iterations" not in block
        exec(compile(short, "README.md", "exec"), {})


def test_drawn_pictures_are_ten_classes_of_valid_images():
    images, labels = lrq.draw_shapes(200, seed=3)
    assert images.shape == (200, 3, 24, 24) and images.min() >= 0 and images.max() <= 1 and len(labels.unique()) == 10
    assert torch.equal(images, lrq.draw_shapes(200, seed=3)[0]) and not torch.equal(images, lrq.draw_shapes(200, seed=4)[0])


def test_plumbing_of_the_two_scripts_is_the_same_byte_for_byte():
    begin, end = b"shared plumbing: begin", b"shared plumbing: end"
    texts = [(HERE / name).read_bytes() for name in ("lrq.py", "clusterq.py")]
    one, other = (text[text.index(begin):text.index(end)] for text in texts)
    assert one == other and len(one) > 10000


@pytest.mark.parametrize("name", ("class_codes", "upsampled", "half_transformed", "MeanVariance", "image_statistics",
                         "layer_constants", "batch_norm_loss", "kd_loss", "teacher_forward"))
def test_what_both_methods_define_is_the_same(name):
    assert inspect.getsource(getattr(lrq, name)) == inspect.getsource(getattr(clusterq, name))


def test_files_state_their_licence():
    for name in ("lrq.py", "clusterq.py", "quant.py", "test_smoke.py"):
        assert (HERE / name).read_text().startswith("# SPDX-License-Identifier: MIT\n")
