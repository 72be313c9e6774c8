# SPDX-License-Identifier: MIT
"""Uniform fake quantization for PyTorch: b-bit weights and activations, simulated in float32.

    student = quantize_model(model, w_bits=4, a_bits=4)   # a copy; `model` stays as it is
    student(images)                                       # it observes the activation ranges
    freeze(student)                                       # ranges fixed: quantization alone
    calibrate(student, model, [images])                   # or, better than these two lines
    torch.save(pack(student), "student.pt")               # integer codes, b bits each
    student = unpack(torch.load("student.pt", weights_only=True), model)

The maths and the words are those of torch.fake_quantize_per_tensor_affine, to the bit:

    q = clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max)    rounding half to even
    y = (q - zero_point) * scale

Quantized: the weight (a range for each output channel) and the input (one range) of every Conv1d,
Conv2d and Linear, first and last included. In float32: biases, batch norms, sums, other layers.
"""
import contextlib
import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# ---------------------------------------------------------------------------------------- the maths


def calculate_qparams(min_val, max_val, bits, symmetric):
    """Scale and zero point for values from min_val to max_val; zero is represented exactly.

    min_val, max_val: tensors of one shape, () for a whole tensor, (C, 1, 1, 1) for C channels.
    bits: 2 to 8. Codes are 0 .. 2^b - 1, or -(2^(b-1) - 1) .. 2^(b-1) - 1 if symmetric.
    Returns (scale, zero_point, quant_min, quant_max): float32 and int32 tensors, two ints.
    Raises ValueError for other bits. Source: Jacob et al., arXiv 1712.05877, section 3.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits must be a whole number from 2 to 8, not {bits!r}")
    # Within half of the largest float32 all products are finite, from the smallest on 1 / scale.
    limit, tiny = 1.7e38, 1.2e-38
    min_val, max_val = min_val.float().clamp(-limit, 0), max_val.float().clamp(0, limit)
    if symmetric:
        quant_max = 2 ** (bits - 1) - 1
        scale = (torch.maximum(-min_val, max_val) / quant_max).clamp(min=tiny)
        return scale, torch.zeros_like(scale).int(), -quant_max, quant_max
    quant_max = 2 ** bits - 1
    scale = (max_val / quant_max - min_val / quant_max).clamp(min=tiny)
    zero_point = (-min_val / scale).round().clamp(0, quant_max).int()
    return scale, zero_point, 0, quant_max


def calculate_range(x, bits, symmetric, least_error=True):
    """(min_val, max_val), each (R, 1), for the values in each of R rows, x: (R, N) float32.

    At few bits, rare extremes cost all other values resolution. So the range is a share, 1, 0.9
    ... 0.3, of that from minimum to maximum: the one with the least mean |error|^3, clipping
    included. (The square, arXiv 2106.08295, is worse at 2 bits.) Without least_error the whole
    range. Raises ValueError if x is empty or not finite.
    """
    if not x.numel() or not x.isfinite().all():
        raise ValueError("cannot find a range: values are NaN or infinite, or there are none")
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    if not least_error:
        return low, high
    x = x[:, ::x.shape[1] // 2 ** 18 | 1]                               # enough to tell the errors
    shares = torch.arange(10, 2, -1) / 10
    span = (high - low).clamp(min=1.2e-38)
    errors = []
    for share in shares:
        qparams = calculate_qparams(share * low, share * high, bits, symmetric)
        errors.append(((fake_quantize(x, *qparams) - x) / span).abs().pow(3).mean(1, keepdim=True))
    share = shares.to(x)[torch.stack(errors).argmin(0)]
    return share * low, share * high


class _Quantize(torch.autograd.Function):
    """Rounding has gradient zero almost everywhere, so the backward pass leaves it out (straight-
    through estimator, Bengio et al., arXiv 1308.3432). Where the code was clipped the gradient is
    zero. torch's own operator is the same, and takes four to five times as long on a CPU."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max):
        q = (x * (1 / scale)).round_().add_(zero_point)
        clipped = q.clamp(quant_min, quant_max)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(q.eq_(clipped))  # 1.0 where not clipped: faster than Booleans
        return clipped.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * ctx.saved_tensors[0], None, None, None, None


def fake_quantize(x, scale, zero_point, quant_min, quant_max):
    """Round x to the grid of (scale, zero_point) and back to float32.

    x: any shape, float32. scale, zero_point: (), or (C, 1, 1, 1) for a weight (C, I, H, W).
    The gradient passes straight through, except where x was clipped (zero).
    """
    return _Quantize.apply(x, scale, zero_point, quant_min, quant_max)


# ---------------------------------------------------------------------------------------- the layer


class QuantLayer(nn.Module):
    """A Conv1d, Conv2d or Linear, or a subclass with a forward of its own, with quantized weight
    (a range for each output channel, found here, then fixed) and input (one range).

    While `observing`, as at first, the input passes in float and its range is tracked: a moving
    average, momentum 0.1, of each batch's calculate_range, widened to input_range, (min, max).
    Then `layer.observing = False`. What the layer has (weight, stride, methods) this has too.
    Buffers: weight_scale, weight_zero_point (C, 1, ...); of the input, min_val, max_val, scale,
    zero_point, ().
    """

    def __init__(self, layer, w_bits, a_bits, symmetric=False, input_range=None, least_error=True):
        super().__init__()
        self.layer, self.observing, self.input_range = layer, True, input_range or (0, 0)
        self.a_bits, self.symmetric, self.least_error = a_bits, symmetric, least_error
        weight = layer.weight.detach()
        bounds = calculate_range(weight.flatten(1), w_bits, symmetric, least_error)
        low, high = (bound.view(-1, *[1] * (weight.dim() - 1)) for bound in bounds)
        scale, zero_point, *self.w_bounds = calculate_qparams(low, high, w_bits, symmetric)
        self.weight_scale, self.weight_zero_point = nn.Buffer(scale), nn.Buffer(zero_point)
        nothing = weight.new_tensor(torch.inf)                       # min_val above max_val
        self.min_val, self.max_val = nn.Buffer(nothing), nn.Buffer(-nothing)
        scale, zero_point, *self.a_bounds = calculate_qparams(nothing, -nothing, a_bits, symmetric)
        self.scale, self.zero_point = nn.Buffer(scale), nn.Buffer(zero_point)

    @torch.no_grad()
    def observe(self, x):
        """Move the input's range towards that of x, any shape. ValueError if x is not finite."""
        x = x.flatten()[None].float()
        low, high = calculate_range(x, self.a_bits, self.symmetric, self.least_error)
        low = low.squeeze().clamp(max=self.input_range[0])
        high = high.squeeze().clamp(min=self.input_range[1])
        if self.min_val <= self.max_val:  # not the first time
            low, high = self.min_val.lerp(low, 0.1), self.max_val.lerp(high, 0.1)
        self.min_val.copy_(low)
        self.max_val.copy_(high)
        scale, zero_point, *_ = calculate_qparams(low, high, self.a_bits, self.symmetric)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def quantize_input(self, x):
        return fake_quantize(x.float(), self.scale, self.zero_point, *self.a_bounds)

    def round_weight(self, weight):
        """The layer's weight, (C, ...), or one number a channel, (C, 1, ...), fake-quantized."""
        return fake_quantize(weight, self.weight_scale, self.weight_zero_point, *self.w_bounds)

    def forward(self, x):
        if self.observing:
            self.observe(x)
        else:
            x = self.quantize_input(x)
        # A shallow copy of the layer takes the rounded weight, so that other threads may run it.
        layer = copy.copy(self.layer)
        layer._parameters = {**layer._parameters, "weight": self.round_weight(self.layer.weight)}
        return layer(x)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


# ------------------------------------------------------------------------------------ whole models


def quant_layers(model):
    """{name: QuantLayer} of a quantized model, in the order of modules(), by all of its names."""
    named = model.named_modules(remove_duplicate=False)
    return {name: m for name, m in named if isinstance(m, QuantLayer)}


def batch_norms(model):
    """{name: layer} of the batch norms that have running statistics."""
    return {name: m for name, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats}


def quantize_model(model, w_bits, a_bits, symmetric=False, input_bits=8, input_range=None,
                   least_error=True):
    """Copy of `model`, float32, in which each Conv1d, Conv2d and Linear is a QuantLayer.

    w_bits, a_bits: 2 to 8. symmetric: signed codes with zero point 0. input_bits, input_range:
    bits and (min, max) of the images, which the first layer, in the order of modules(), takes.
    least_error=False: ranges from minimum to maximum. The copy is in evaluation mode and
    has to stay there, so that its batch norms keep their statistics. It observes ranges until
    `freeze`. What its QuantLayers and batch norms hold learns, nothing else does.
    Raises ValueError for other bits, TypeError for a layer whose weight is computed (pruned,
    parametrized).
    """
    student = copy.deepcopy(model).float().eval().requires_grad_(False)
    student.quant_config = {"w_bits": int(w_bits), "a_bits": int(a_bits),
                            "symmetric": symmetric, "input_bits": int(input_bits)}
    done = {}  # a layer that stands in several places stays one
    for name, layer in student.named_modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            if "weight" not in layer._parameters:
                raise TypeError(f"cannot quantize layer '{name}': its weight is computed from "
                                "others: remove that first, see torch.nn.utils")
            bits, known = (a_bits, None) if done else (input_bits, input_range)
            done[layer] = QuantLayer(layer, w_bits, bits, symmetric, known, least_error)
    for parent in list(student.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = done.get(child, child)
    for layer in [*done, *batch_norms(student).values()]:
        for p in layer.parameters():
            p.requires_grad_(True)
    return student


def observe(model):
    """From here on activations pass in float, and their ranges are tracked. Returns the model."""
    for layer in quant_layers(model).values():
        layer.observing = True
    return model


def freeze(model):
    """Fix the ranges observed so far: from here on activations are quantized. Returns the model.
    The input of a layer that never ran stays in float. Raises RuntimeError if none did."""
    layers = quant_layers(model).values()
    for layer in layers:
        layer.observing = bool(layer.min_val > layer.max_val)
    if all(layer.observing for layer in layers):
        raise RuntimeError("no activation range: run images through the model, then freeze it")
    return model


# -------------------------------------------------------------------------------------- calibration


class _Calls(TorchFunctionMode):
    """While active, passes each convolution and linear map that runs, and its output, to `keep`."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        y = function(*args, **kwargs)
        if function in (F.conv1d, F.conv2d, F.linear):
            self.keep(y, *args, **kwargs)
        return y


def samples(y, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, count=40_000):
    """Outputs and inputs of a convolution or linear map as those of a matrix W for each group:
    y = W x without bias, (groups, O / groups, N), and x, (groups, n, N), at N places on a grid,
    about `count`. Arguments: the output, then those of F.conv2d, F.conv1d or F.linear."""
    kernel = weight.shape[2:]
    dims, x = len(kernel), input                                        # of space; 0: linear
    skip = max(1, round((y.numel() / len(weight) / count) ** (1 / (dims or 1))))
    if not dims:
        x, y = (v.flatten(0, -2)[::skip] for v in (x, y))                   # (N, n), (N, O)
    if bias is not None:
        y = y - bias.view(-1, *[1] * dims)
    for dim, k in enumerate(kernel):
        s, d, p = (v if isinstance(v, (int, str)) else v[dim] for v in (stride, dilation, padding))
        reach = d * (k - 1)                                             # of the window's last pixel
        pads = {"same": (reach // 2, reach - reach // 2), "valid": (0, 0)}.get(p, (p, p))
        x = F.pad(x, [0, 0] * (dims - 1) + list(pads))
        x = x.unfold(2 + dim, reach + 1, skip * s)[..., ::d]            # (B, groups C, ..., k)
        y = y.unfold(2 + dim, 1, skip)[..., 0]
    space = range(3, 3 + dims)
    x, y = (v.unflatten(1, (groups, -1)).float() for v in (x, y))
    x = x.permute(1, 2, *range(3 + dims, x.dim()), 0, *space)           # (groups, C, k.., B, ..)
    return y.permute(1, 2, 0, *space).flatten(2), x.flatten(2 + dims).flatten(1, -2)


def gptq_layer(w, x, y, quantize, ridge=100, damping=0.3, block=1024):
    """Weights w, (groups, R, n), moved so that, rounded, they give y from x; shapes as of samples.

    quantize: rounds a column of all groups, (groups R,). With H = sum of x x^T and r = ridge times
    the mean of |x|^2, so that w counts as much, in every direction, as `ridge` places,
        w <- w + (sum of (y - w x) x^T) (H + r I)^-1
    Then one column after the other is rounded, and those after it take up what that did,
        q_j = quantize(w_j)        w_k -= (w_j - q_j) U_jk / U_jj,  k > j
    with U the upper Cholesky factor of the inverse of H + damping mean(diag H) I. Columns are done
    in blocks: what rounding the earlier ones did is part of what the next is fitted to. Returns w,
    which rounds to q. Source: GPTQ, arXiv 2210.17323, section 3, and for the teacher's outputs as
    target GPTAQ, arXiv 2504.02692. The ridge is ours: with few places w stays where it is.
    """
    r = (ridge * x.square().sum(1).mean(1)).clamp(min=1e-12)[:, None, None].double()
    w, rest = w.double(), y - w @ x                                     # yet to be made up for
    for start in range(0, w.shape[2], block):
        part = slice(start, start + block)
        h = (x[:, part] @ x[:, part].mT).double()
        eye = torch.eye(h.shape[1]).to(h)
        mean = h.diagonal(0, 1, 2).mean(1).clamp(min=1e-12)[:, None, None]
        v = w[:, :, part] + torch.linalg.solve(h + r * eye, (x[:, part] @ rest.mT).double()).mT
        u = torch.linalg.cholesky(torch.linalg.inv(h + damping * mean * eye), upper=True)
        q = torch.empty_like(v)
        for j in range(v.shape[2]):
            q[:, :, j] = quantize(v[:, :, j].float().flatten()).view_as(q[:, :, j])
            step = (v[:, :, j] - q[:, :, j]) / u[:, j, j, None]
            v[:, :, j + 1:] -= step[:, :, None] * u[:, None, j, j + 1:]
        rest -= (q - w[:, :, part]).float() @ x[:, part]
        w[:, :, part] = v
    return w.float()


@torch.no_grad()
def calibrate(student, teacher, batches):
    """Find ranges, weights and batch-norm statistics that bring a student near to its teacher.

    batches: a list of images, (B, C, H, W). All go through both networks at once: memory has to
    hold a few of the largest layer's outputs, and 40,000 places of each. As they pass, each
    part is set when it runs, from what the parts before it, already set, make of the images:
    - a QuantLayer: its input's range, anew; its weights (gptq_layer), for the teacher's outputs,
      if they go as they are into F.conv1d, F.conv2d or F.linear;
    - a batch norm: with m, v mean and variance of its input in the teacher, m', v' in the student,
      and r^2 = (v' + eps) / (v + eps), the running statistics mu, var of the teacher become
      mu' = m' + r (mu - m) and var' + eps = r^2 (var + eps). r is kept within 1/4 to 4.
    Of a layer that runs again, weights and statistics stay as the first run made them. Returns the
    student, frozen. Not part of LRQ or ClusterQ. Sources: see gptq_layer; Nagel et al., arXiv
    1906.04721, section 4.2 (means); Banner et al., arXiv 1810.05723 (variances, by weights alone).
    """
    teacher = copy.deepcopy(teacher).float().eval()
    pairs = {teacher.get_submodule(name): layer for name, layer in quant_layers(student).items()}
    norms = dict(zip(batch_norms(teacher).values(), batch_norms(student).values()))
    outputs, statistics = {}, {}

    def keep_output(y, input, weight, *args, **kwargs):
        outputs.setdefault(weight, samples(y, input, weight, *args, **kwargs)[0].cpu().clone())

    def fit_layer(original, layer, args):
        def round_column(w):
            return layer.round_weight(w.view_as(layer.weight_scale)).flatten()

        def fit_weight(y, input, weight, *args, **kwargs):
            if weight is layer.weight and original.weight in outputs:
                x = samples(y, input, weight, *args, **kwargs)[1]
                target = outputs.pop(original.weight).to(x)
                w = weight.flatten(1).unflatten(0, (len(x), -1))        # (groups, O / groups, n)
                weight.copy_(gptq_layer(w, x, target, round_column).view_as(weight))

        for x in args[0].split(len(batches[0])):
            layer.observe(x)
        layer.input_range = layer.min_val.item(), layer.max_val.item()  # if it runs again: no less
        with _Calls(fit_weight):
            layer.layer(layer.quantize_input(args[0]))

    def variance_and_mean(x):
        return torch.var_mean(x, [0, *range(2, x.dim())], correction=0)

    def keep_statistics(original, args):
        statistics.setdefault(original, variance_and_mean(args[0]))

    def correct(original, norm, args):
        if original in statistics:
            (v, m), (student_v, student_m) = statistics.pop(original), variance_and_mean(args[0])
            r = ((student_v + norm.eps) / (v + norm.eps)).sqrt().clamp(1 / 4, 4)
            norm.running_mean.copy_(student_m + r * (original.running_mean - m))
            var = r.square() * (original.running_var + norm.eps) - norm.eps
            norm.running_var.copy_(var.clamp(min=0))

    images = torch.cat(batches)
    for original in norms:
        original.register_forward_pre_hook(keep_statistics)
    with _Calls(keep_output):
        teacher(images.clone())                                         # it may change them
    with contextlib.ExitStack() as hooks:
        for original, layer in pairs.items():
            hooks.callback(setattr, layer, "input_range", layer.input_range)
            layer.min_val.fill_(torch.inf)                              # ranges start anew
            layer.observing = False
            hooks.enter_context(layer.register_forward_pre_hook(partial(fit_layer, original)))
        for original, norm in norms.items():
            hooks.enter_context(norm.register_forward_pre_hook(partial(correct, original)))
        student(images)
    return freeze(student)


# --------------------------------------------------------------------------------- integers on disk


def pack_bits(codes, bits):
    """uint8 codes 0 .. 2^bits - 1 -> uint8 bytes: a row of all their bits, lowest first."""
    row = ((codes.flatten()[:, None] >> torch.arange(bits, dtype=torch.uint8)) & 1).flatten()
    row = F.pad(row, (0, -len(row) % 8)).view(-1, 8)
    return (row << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed, bits, count):
    """Inverse of pack_bits: (count,) uint8."""
    row = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
    row = row[:count * bits].view(count, bits)
    return (row << torch.arange(bits, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


@torch.no_grad()
def pack(student):
    """A quantized model for torch.save: "config", bits and symmetric, as for quantize_model, and
    "state", weights as packed uint8 codes if their layer ran. RuntimeError before freeze."""
    layers = {name: m for name, m in quant_layers(student).items() if m.min_val <= m.max_val}
    if not layers or any(layer.observing for layer in layers.values()):
        raise RuntimeError("nothing to pack: run images through the model, then freeze it")
    state = copy.deepcopy(student).cpu().state_dict()
    for name, layer in layers.items():
        steps = (layer.round_weight(layer.weight) / layer.weight_scale).round()
        codes = (steps + layer.weight_zero_point - layer.w_bounds[0]).to("cpu", torch.uint8)
        state[f"{name}.layer.weight"] = pack_bits(codes, student.quant_config["w_bits"])
    return {"config": student.quant_config, "state": state}


def unpack(packed, model):
    """The quantized model again, from what `pack` gave and a float model of its architecture, which
    is not changed. Outputs equal the packed model's exactly. ValueError if it does not fit."""
    student, state = quantize_model(model, **packed["config"]), copy.copy(packed["state"])
    try:
        for name, layer in quant_layers(student).items():
            codes, shape = state[f"{name}.layer.weight"], layer.weight.shape
            if codes.dtype == torch.uint8:
                q = unpack_bits(codes, packed["config"]["w_bits"], shape.numel())
                steps = q.view(shape).int() + layer.w_bounds[0] - state[f"{name}.weight_zero_point"]
                state[f"{name}.layer.weight"] = steps * state[f"{name}.weight_scale"]
        student.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError("the packed student is of another architecture than the model") from error
    return freeze(student)
